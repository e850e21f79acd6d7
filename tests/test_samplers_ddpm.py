"""Ancestral sampling: against a loop written by hand, and the marginals of known data."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from perrin import GaussianDiffusion, ModelMeanType, ModelVarType, SamplerDDPM, get_named_beta_schedule
from perrin.errors import ArgumentError
from perrin.oracles import GaussianData, Oracle, arbitrary, normal

T = 24
Array = NDArray[np.float64]


def chain(
    mean_type: ModelMeanType = ModelMeanType.EPSILON,
    var_type: ModelVarType = ModelVarType.FIXED_SMALL,
    betas: Array | None = None,
) -> GaussianDiffusion:
    return GaussianDiffusion(
        betas=get_named_beta_schedule("cosine", T) if betas is None else betas,
        model_mean_type=mean_type,
        model_var_type=var_type,
    )


def network_for(diffusion: GaussianDiffusion) -> Callable[..., Tensor]:
    """Arbitrary, with log-variances near -3 where they are learned directly."""
    network = arbitrary(diffusion.output_channels(1))
    if diffusion.model_var_type is not ModelVarType.LEARNED:
        return network
    return lambda x, t: network(x, t) - torch.cat([torch.zeros_like(x), torch.full_like(x, 3.0)], 1)


def ancestral_by_hand(
    diffusion: GaussianDiffusion, kept: list[int], x: Array, noises: Array, clip: bool
) -> Array:
    """DDPM algorithm 2 in numpy, from the betas alone."""
    betas = diffusion.betas.numpy()
    full = np.cumprod(1 - betas)
    signal = full[kept]
    before = np.concatenate([[1.0], signal[:-1]])
    beta = 1 - signal / before
    posterior = beta * (1 - before) / (1 - signal)
    log_small = np.log(np.concatenate([posterior[1:2] if len(kept) > 1 else beta[:1], posterior[1:]]))

    def longer(extra: Array, t: int, beta: float, signal: float, before: float) -> Array:
        """The log-variance of a step of the whole chain as one of the step from ``signal`` to ``before``."""
        own_before = full[t - 1] if t > 0 else 1.0
        own_least = betas[t] * (1 - own_before) / (1 - full[t])
        unknown = (np.exp(extra) - own_least) / (betas[t] * np.sqrt(own_before) / (1 - full[t])) ** 2
        unknown = np.minimum(np.where(unknown > 0, unknown, np.exp(extra)), 1)
        return np.log((beta * (1 - before) + beta**2 * before / (1 - signal) * unknown) / (1 - signal))

    network = network_for(diffusion)
    for i in reversed(range(len(kept))):
        t = kept[i]
        out = network(torch.from_numpy(x), torch.full((len(x),), t)).numpy()
        mean_part, extra = out[:, : x.shape[1]], out[:, x.shape[1] :]
        alpha, sigma = np.sqrt(signal[i]), np.sqrt(1 - signal[i])
        full_before = full[t - 1] if t > 0 else 1.0
        coef1 = betas[t] * np.sqrt(full_before) / (1 - full[t])
        coef2 = (1 - full_before) * np.sqrt(1 - betas[t]) / (1 - full[t])
        x_start = {
            ModelMeanType.EPSILON: (x - sigma * mean_part) / alpha,
            ModelMeanType.START_X: mean_part,
            ModelMeanType.VELOCITY: alpha * x - sigma * mean_part,
            ModelMeanType.PREVIOUS_X: (mean_part - coef2 * x) / coef1,
        }[diffusion.model_mean_type]
        x_start = np.clip(x_start, -1, 1) if clip else x_start
        mean = beta[i] * np.sqrt(before[i]) / sigma**2 * x_start
        mean = mean + (1 - before[i]) * np.sqrt(1 - beta[i]) / sigma**2 * x
        if diffusion.model_mean_type is ModelMeanType.PREVIOUS_X and len(kept) == len(betas):
            mean = mean_part
        share = (extra + 1) / 2
        log_variance = {
            ModelVarType.FIXED_SMALL: lambda i=i: log_small[i],
            ModelVarType.FIXED_LARGE: lambda i=i: np.log(beta[i]) if i else log_small[0],
            ModelVarType.LEARNED: lambda i=i, extra=extra, t=t: (
                extra if len(kept) == len(betas) else longer(extra, t, beta[i], signal[i], before[i])
            ),
            ModelVarType.LEARNED_RANGE: lambda i=i, share=share: (
                share * np.log(beta[i]) + (1 - share) * log_small[i]
            ),
        }[diffusion.model_var_type]()
        x = mean + (i > 0) * np.exp(0.5 * log_variance) * noises[t]
    return x


@pytest.mark.parametrize("var_type", ModelVarType)
@pytest.mark.parametrize("mean_type", ModelMeanType)
@pytest.mark.parametrize("steps", [1, 5, T])
def test_sampling_equals_a_loop_written_by_hand(
    mean_type: ModelMeanType, var_type: ModelVarType, steps: int
) -> None:
    diffusion = chain(mean_type, var_type)
    sampler, noises, start = SamplerDDPM(diffusion, steps), normal(T, 3, 2, 4), normal(3, 2, 4, seed=1)
    kept = list(sampler.times[-2::-1])
    expected = ancestral_by_hand(diffusion, kept, start.numpy(), noises.numpy(), clip=True)
    sample = sampler.sample(network_for(diffusion), start.shape, noise=start, noise_fn=lambda x, t: noises[t])
    torch.testing.assert_close(sample, torch.from_numpy(expected), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("var_type", ModelVarType)
@pytest.mark.parametrize("mean_type", ModelMeanType)
def test_single_steps_with_mixed_times_equal_the_loop(
    mean_type: ModelMeanType, var_type: ModelVarType
) -> None:
    diffusion = chain(mean_type, var_type)
    sampler, network = SamplerDDPM(diffusion, 6), network_for(diffusion)
    x, noise = normal(6, 2, 3), normal(6, 2, 3, seed=1)
    mixed = sampler.p_sample(network, x, torch.arange(6), noise=noise)
    denoise = sampler.denoiser(network)
    for i, (t, s) in enumerate(zip(sampler.times[-2::-1], sampler.times[:0:-1], strict=True)):
        whole = sampler.step(denoise, x[i : i + 1], t, s, lambda i=i: noise[i : i + 1])
        for key, value in whole.state.items():
            torch.testing.assert_close(mixed[key][i : i + 1], value, rtol=1e-9, atol=1e-9)


def test_a_single_step_is_the_reverse_distribution_of_the_diffusion() -> None:
    diffusion = chain(var_type=ModelVarType.LEARNED_RANGE)
    x, t, noise = normal(3, 2, 4), torch.tensor([0, 7, T - 1]), normal(3, 2, 4, seed=1)
    p = diffusion.p_mean_variance(arbitrary(2), x, t)
    step = SamplerDDPM(diffusion).p_sample(arbitrary(2), x, t, noise=noise)
    std = p["variance"].sqrt() * (t != 0).reshape(3, 1, 1)
    torch.testing.assert_close(step["sample"], p["mean"] + std * noise)
    torch.testing.assert_close(step["pred_xstart"], p["pred_xstart"])


def test_a_single_step_carries_gradients_to_both_halves() -> None:
    weights = torch.ones(2, requires_grad=True)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([weights[0] * x, weights[1] * x], 1)

    x = normal(3, 2).requires_grad_()
    diffusion = chain(var_type=ModelVarType.LEARNED_RANGE)
    step = SamplerDDPM(diffusion).p_sample(network, x, torch.tensor([3, 7, 9]), clip_denoised=False)
    step["sample"].sum().backward()
    assert weights.grad is not None
    assert bool((weights.grad.abs() > 1e-6).all())
    assert x.grad is not None
    assert bool((x.grad != 0).all())


@pytest.mark.parametrize("steps", [6, T])
def test_denoised_fn_moves_the_samples_of_a_network_that_predicts_the_previous_x(steps: int) -> None:
    data = GaussianData(0.3, 0.5)
    samples = [
        SamplerDDPM(diffusion, steps).sample(
            Oracle(data, diffusion), (4, 3), denoised_fn=lambda x_start: 0.5 * x_start, seed=0
        )
        for diffusion in (chain(ModelMeanType.PREVIOUS_X), chain(ModelMeanType.EPSILON))
    ]
    torch.testing.assert_close(*samples, rtol=1e-4, atol=1e-4)


def test_a_single_step_takes_the_options_of_the_loop() -> None:
    sampler, x, t = SamplerDDPM(chain(ModelMeanType.START_X), 6), normal(1, 2), torch.tensor([3])

    def network(x: Tensor, t: Tensor, level: float) -> Tensor:
        return torch.full_like(x, level)

    kwargs = {"level": 3.0}
    assert bool((sampler.p_sample(network, x, t, model_kwargs=kwargs)["pred_xstart"] == 1).all())
    free = sampler.p_sample(
        network, x, t, model_kwargs=kwargs, clip_denoised=False, denoised_fn=lambda x: x / 2
    )
    assert bool((free["pred_xstart"] == 1.5).all())


def test_a_single_step_without_noise_draws_it_from_torch() -> None:
    sampler, x, t = SamplerDDPM(chain(), 6), normal(2, 4), torch.tensor([3, 0])
    torch.manual_seed(0)
    drawn = sampler.p_sample(arbitrary(1), x, t)["sample"]
    torch.manual_seed(0)
    given = sampler.p_sample(arbitrary(1), x, t, noise=torch.randn_like(x))["sample"]
    silent = sampler.p_sample(arbitrary(1), x, t, noise=torch.zeros_like(x))["sample"]
    assert torch.equal(drawn, given)
    assert torch.equal(drawn[1], silent[1])  # the last step adds none
    assert not torch.allclose(drawn[0], silent[0], atol=1e-3)


def test_many_steps_sample_the_data() -> None:
    data = GaussianData(0.3, 0.5)
    diffusion = chain(betas=get_named_beta_schedule("linear", 1000))
    sample = SamplerDDPM(diffusion).sample(Oracle(data, diffusion), (8, 5000), clip_denoised=False, seed=0)
    assert float(sample.mean()) == pytest.approx(0.3, abs=0.0125)  # 5 standard errors
    assert float(sample.std()) == pytest.approx(
        0.5, rel=0.02
    )  # 5 standard errors, and 0.3% of discretisation


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_few_steps_with_the_ideal_learned_variance_sample_the_data(steps: int) -> None:
    data = GaussianData(0.3, 0.5)
    betas = get_named_beta_schedule("linear", 1000)
    signal = torch.from_numpy(np.cumprod(1 - betas))

    def log_variance(x: Tensor, t: Tensor) -> Tensor:
        now, then = signal[t[0]], signal[t[0] - 1] if t[0] > 0 else torch.tensor(1.0)
        beta = 1 - now / then
        gain = then.sqrt() * beta / (1 - now)
        spread = data.remaining_variance(now.sqrt(), (1 - now).sqrt())
        variance = beta * (1 - then) / (1 - now) + gain**2 * spread  # Cov[x_s | x_t], Analytic-DPM eq. 7
        return torch.full_like(x, float(variance.log()))

    diffusion = chain(var_type=ModelVarType.LEARNED, betas=betas)
    network = Oracle(data, diffusion, log_variance)
    start = normal(
        8, 20000
    )  # float64: of the noisiest steps float32 keeps too few digits of the log-variance
    sample = SamplerDDPM(diffusion, steps).sample(
        network, start.shape, noise=start, clip_denoised=False, seed=0
    )
    assert float(sample.mean()) == pytest.approx(0.3, abs=0.007)
    assert float(sample.std()) == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("var_type", [ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE])
def test_the_last_single_step_adds_no_noise(steps: int, var_type: ModelVarType) -> None:
    chain = GaussianDiffusion(betas=get_named_beta_schedule("linear", 10), model_var_type=var_type)
    sampler, x, t = SamplerDDPM(chain, steps), normal(4, 3), torch.zeros(4, dtype=torch.int64)
    drawn = [
        sampler.p_sample(lambda x, t: torch.zeros_like(x), x, t, noise=scale * torch.ones_like(x))["sample"]
        for scale in (0.0, 1.0)
    ]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=0)


def test_a_step_between_times_that_are_no_neighbours_is_refused() -> None:
    sampler = SamplerDDPM(GaussianDiffusion(betas=get_named_beta_schedule("linear", 10)))
    with pytest.raises(ArgumentError, match="t and s must be neighbours in the sampler's times, got 9 and 3"):
        sampler.step(sampler.denoiser(lambda x, t: x), normal(1, 3), 9, 3, lambda: normal(1, 3))
