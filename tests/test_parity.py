"""The engine against tests/reference.py: the full product of mean, variance and loss kinds, respaced or not."""

from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from perrin import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from perrin.schedules import cosine_betas, linear_betas, space_timesteps
from reference import Array, Reference

SHAPE = (3, 2, 2)
CHAINS: list[tuple[int, int | None]] = [(1, None), (2, None), (2, 1), (10, None), (10, 4), (50, 13)]
"""(T, steps kept)."""

MEANS, VARIANCES, LOSSES = list(ModelMeanType), list(ModelVarType), list(LossType)


def outputs(x: Array, time: Array | float, double: bool) -> Array:
    """A made-up network on arrays (..., C, H, W); the second half makes moderate log-variances."""
    mean = 0.4 * x + 0.3 * np.sin(3 * x + 0.01 * time) - 0.1
    return np.concatenate([mean, 0.8 * np.cos(x + 0.02 * time) - 0.9], axis=-3) if double else mean


def network(double: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def call(x: Tensor, time: Tensor) -> Tensor:
        times = time.double().reshape(-1, 1, 1, 1).numpy()
        return torch.from_numpy(outputs(x.double().numpy(), times, double)).to(x.dtype)

    return call


def pair(
    mean: ModelMeanType,
    var: ModelVarType,
    chain: tuple[int, int | None],
    loss: LossType = LossType.MSE,
    rescale: bool = False,
    levels: int | None = 17,
    schedule: Callable[[int], Array] = cosine_betas,
) -> tuple[GaussianDiffusion, Reference]:
    """The same chain, as the package and as the reference have it."""
    num_timesteps, steps = chain
    diffusion = GaussianDiffusion(
        betas=schedule(num_timesteps),
        model_mean_type=mean,
        model_var_type=var,
        loss_type=loss,
        rescale_timesteps=rescale,
        levels=levels,
    )
    keep = None if steps is None else sorted(space_timesteps(num_timesteps, steps))
    reference = Reference(schedule(num_timesteps), mean.value, var.value, loss.value, rescale, levels, keep)
    return (diffusion if keep is None else diffusion.respaced(keep)), reference


def batch(num_timesteps: int, seed: int = 0) -> tuple[Array, Array, list[int]]:
    """Data on 17 levels, noise, and a timestep for each example: both ends and some between."""
    generator = np.random.default_rng(seed)
    t = sorted({0, num_timesteps - 1, num_timesteps // 2, min(1, num_timesteps - 1)})
    x0 = 2 * generator.integers(17, size=(len(t), *SHAPE)) / 16 - 1
    return x0, generator.standard_normal(x0.shape), t


def assert_close(
    found: Tensor, expected: Array | list[float], rtol: float = 1e-9, atol: float = 1e-11
) -> None:
    wanted = torch.from_numpy(np.array(expected, dtype=np.float64))
    torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("schedule", [cosine_betas, linear_betas])
def test_forward_process(chain: tuple[int, int | None], schedule: Callable[[int], Array]) -> None:
    diffusion, reference = pair(ModelMeanType.START_X, ModelVarType.FIXED_SMALL, chain, schedule=schedule)
    x0, noise, t = batch(diffusion.num_timesteps)
    x, n, steps = torch.from_numpy(x0), torch.from_numpy(noise), torch.tensor(t)
    x_t = diffusion.q_sample(x, steps, n)
    assert_close(x_t, [reference.q_sample(*item) for item in zip(x0, t, noise, strict=True)])
    mean, variance, log_variance = diffusion.q_mean_variance(x, steps)
    bars = np.array([reference.bar(step) for step in t]).reshape(-1, 1, 1, 1)
    assert_close(mean, np.sqrt(bars) * x0)
    assert_close(variance, np.broadcast_to(1 - bars, x0.shape))
    assert_close(log_variance, np.broadcast_to(np.log(1 - bars), x0.shape), rtol=1e-7)
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x, x_t, steps)
    every = list(zip(x0, x_t.numpy(), t, strict=True))
    assert_close(mean, [reference.posterior(*item) for item in every])
    assert_close(variance, [np.full(SHAPE, reference.posterior_variance(step)) for step in t])
    assert_close(log_variance, [np.full(SHAPE, np.log(reference.clipped_variance(step))) for step in t])
    assert_close(diffusion.predict_xstart_from_eps(x_t, steps, n), x0, atol=1e-14 / np.sqrt(bars.min()))
    assert_close(diffusion.predict_eps_from_xstart(x_t, steps, x), noise)
    assert_close(diffusion.predict_xstart_from_xprev(x_t, steps, mean), x0, atol=1e-14 / np.sqrt(bars.min()))
    assert_close(diffusion.prior_bpd(x), [reference.prior_bits(item) for item in x0], rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("var", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("chain", CHAINS)
def test_p_mean_variance(chain: tuple[int, int | None], mean: ModelMeanType, var: ModelVarType) -> None:
    for rescale, clip, halve in product((False, True), (False, True), (False, True)):
        diffusion, reference = pair(mean, var, chain, rescale=rescale)
        _, x, t = batch(diffusion.num_timesteps)
        double = diffusion.output_channels(3) == 6
        found = diffusion.p_mean_variance(
            network(double),
            torch.from_numpy(x),
            torch.tensor(t),
            clip_denoised=clip,
            denoised_fn=(lambda x0: x0 / 2) if halve else None,
        )
        for i, step in enumerate(t):
            expected = reference.p_mean_variance(
                partial(outputs, double=double),
                x[i],
                step,
                clip,
                (lambda x0: x0 / 2) if halve else None,
            )
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert_close(found[name][i], value)


@pytest.mark.parametrize("var", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("chain", CHAINS)
def test_losses_and_bound_terms(
    chain: tuple[int, int | None], mean: ModelMeanType, var: ModelVarType
) -> None:
    for loss, rescale, levels in product(LOSSES, (False, True), (17, None)):
        diffusion, reference = pair(mean, var, chain, loss, rescale, levels)
        x0, noise, t = batch(diffusion.num_timesteps)
        double = diffusion.output_channels(3) == 6
        numpy_network = partial(outputs, double=double)
        x, n, steps = torch.from_numpy(x0), torch.from_numpy(noise), torch.tensor(t)
        found = diffusion.training_losses(network(double), x, steps, noise=n)
        x_t = diffusion.q_sample(x, steps, n)
        term = diffusion.vb_terms_bpd(network(double), x, x_t, steps, clip_denoised=True)
        for i, step in enumerate(t):
            expected = reference.training_losses(numpy_network, x0[i], step, noise[i])
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert_close(found[name][i], value)
            noisy = x_t[i].numpy()
            bits, pred = reference.vb_bits(
                reference.call(numpy_network, noisy, step), x0[i], noisy, step, True
            )
            assert_close(term["output"][i], bits)
            assert_close(term["pred_xstart"][i], pred)


@pytest.mark.parametrize("var", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("chain", [(1, None), (2, None), (10, None), (10, 4)])
def test_calc_bpd_loop(chain: tuple[int, int | None], mean: ModelMeanType, var: ModelVarType) -> None:
    diffusion, reference = pair(mean, var, chain)
    x0 = batch(4)[0][:2]
    noises = np.random.default_rng(1).standard_normal((diffusion.num_timesteps, *x0.shape))
    double = diffusion.output_channels(3) == 6
    asked: list[int] = []

    def noise_fn(x: Tensor, t: int) -> Tensor:
        asked.append(t)
        return torch.from_numpy(noises[len(asked) - 1])

    found = diffusion.calc_bpd_loop(network(double), torch.from_numpy(x0), noise_fn=noise_fn)
    assert asked == list(reversed(range(diffusion.num_timesteps)))
    for i, image in enumerate(x0):
        expected = reference.bound(partial(outputs, double=double), image, [noise[i] for noise in noises])
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(found[name][i], value, atol=1e-9)


@pytest.mark.parametrize("var", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_int_timestep_is_the_tensor_of_it(
    dtype: torch.dtype, mean: ModelMeanType, var: ModelVarType
) -> None:
    kinds = [((10, 4), True, loss) for loss in LOSSES] + [((10, None), False, LossType.RESCALED_MSE)]
    for chain, rescale, loss in kinds:
        diffusion, _ = pair(mean, var, chain, loss, rescale)
        x0, noise, _ = batch(4)
        x, n = torch.from_numpy(x0).to(dtype), torch.from_numpy(noise).to(dtype)
        model = network(diffusion.output_channels(3) == 6)
        for t in (0, 1, diffusion.num_timesteps - 1):
            steps = torch.full((len(x),), t)
            for ours, theirs in zip(
                everything(diffusion, model, x, n, t), everything(diffusion, model, x, n, steps), strict=True
            ):
                tolerance = (
                    {"rtol": 1e-12, "atol": 1e-13}
                    if dtype is torch.float64
                    else {
                        "rtol": 2e-4,
                        "atol": 2e-5,
                    }
                )
                torch.testing.assert_close(ours, theirs, **tolerance)


def everything(
    diffusion: GaussianDiffusion,
    model: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    noise: Tensor,
    t: int | Tensor,
) -> list[Tensor]:
    """Whatever the engine computes at ``t``."""
    x_t = diffusion.q_sample(x, t, noise)
    p = diffusion.p_mean_variance(model, x_t, t)
    return [
        x_t,
        *diffusion.q_mean_variance(x, t),
        *diffusion.q_posterior_mean_variance(x, x_t, t),
        diffusion.predict_eps_from_xstart(x_t, t, x),
        diffusion.predict_xstart_from_eps(x_t, t, noise),
        *p.values(),
        diffusion.condition_mean(lambda x, time: x / 3 + time.reshape(-1, 1, 1, 1) / 99, p, x_t, t),
        *diffusion.condition_score(lambda x, time: x / 3, p, x_t, t).values(),
        *diffusion.vb_terms_bpd(model, x, x_t, t).values(),
        *diffusion.training_losses(model, x, t, noise=noise).values(),
    ]


@pytest.mark.parametrize("var", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_float32_is_close_to_float64(mean: ModelMeanType, var: ModelVarType) -> None:
    for chain, loss in product([(10, None), (50, 13)], LOSSES):
        diffusion, _ = pair(mean, var, chain, loss)
        x0, noise, t = batch(diffusion.num_timesteps)
        model = network(diffusion.output_channels(3) == 6)
        t[-1] = diffusion.num_timesteps - 2  # at the cosine's end x_0 from eps is unusable without clipping
        precise, single = (
            diffusion.training_losses(
                model,
                torch.from_numpy(x0).to(dtype),
                torch.tensor(t),
                noise=torch.from_numpy(noise).to(dtype),
            )
            for dtype in (torch.float64, torch.float32)
        )
        for name, value in precise.items():
            assert single[name].dtype is torch.float32
            torch.testing.assert_close(single[name].double(), value, rtol=5e-4, atol=1e-6)
