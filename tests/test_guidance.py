"""Guidance by a classifier's gradient, against data whose conditional is known."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from perrin import GaussianDiffusion, ModelMeanType, ModelVarType, SamplerDDIM, SamplerDDPM
from perrin.denoiser import DiffusionDenoiser
from perrin.guidance import MeanGuided, ScoreGuided
from perrin.noise import CLEAN
from perrin.oracles import GaussianData, Oracle, arbitrary, normal
from perrin.schedules import cosine_betas, linear_betas, zero_terminal_snr

T = 50
PRIOR = GaussianData(0.2, 0.5)
SPREAD = 0.3  # y ~ N(x_0, SPREAD^2)
Y = -0.4


def chain(mean_type: ModelMeanType = ModelMeanType.EPSILON, **options: object) -> GaussianDiffusion:
    return GaussianDiffusion(betas=linear_betas(T), model_mean_type=mean_type, **options)


def conditional(y: float = Y) -> GaussianData:
    """p(x_0 | y)."""
    precision = PRIOR.std**-2 + SPREAD**-2
    return GaussianData((PRIOR.mean * PRIOR.std**-2 + y * SPREAD**-2) / precision, precision**-0.5)


def score_for(diffusion: GaussianDiffusion) -> Callable[..., Tensor]:
    """The gradient of log p(y | x_t) at x_t."""

    def cond_fn(x: Tensor, t: Tensor, y: float = Y) -> Tensor:
        signal = torch.cumprod(1 - diffusion.betas, 0)[t].reshape((-1,) + (1,) * (x.ndim - 1))
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            spread = PRIOR.remaining_variance(alpha, sigma) + SPREAD**2
            log_p = -0.5 * (y - PRIOR.x_start(x, alpha, sigma)) ** 2 / spread
            return torch.autograd.grad(log_p.sum(), x)[0]

    return cond_fn


@pytest.mark.parametrize("mean_type", ModelMeanType)
@pytest.mark.parametrize("t", [0, 7, T - 1])
def test_the_guided_score_is_the_conditional_score(mean_type: ModelMeanType, t: int) -> None:
    diffusion = chain(mean_type)
    plain = DiffusionDenoiser(diffusion, Oracle(PRIOR, diffusion), clip_denoised=False)
    x = normal(3, 4)
    guided, (alpha, sigma) = ScoreGuided(plain, score_for(diffusion))(x, t), plain.schedule(t)
    expected = conditional().x_start(x, alpha, sigma)
    torch.testing.assert_close(guided.x_start, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(guided.eps, (x - alpha * expected) / sigma, rtol=1e-9, atol=1e-9)


def test_each_example_may_have_its_own_time() -> None:
    diffusion, x, t = chain(), normal(3, 4), torch.tensor([0, 7, T - 1])
    guided = ScoreGuided(DiffusionDenoiser(diffusion, Oracle(PRIOR, diffusion)), score_for(diffusion))
    together = guided(x, t.reshape(3, 1))
    for i, time in enumerate(t.tolist()):
        alone = guided(x[i : i + 1], time)
        torch.testing.assert_close(together.x_start[i : i + 1], alone.x_start, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(together.eps[i : i + 1], alone.eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kwargs", [None, {"y": 0.9}])
@pytest.mark.parametrize("steps", [10, T])
def test_guided_ddim_is_ddim_of_the_conditional(kwargs: dict[str, float] | None, steps: int) -> None:
    diffusion, start = chain(), normal(3, 4)
    sampler = SamplerDDIM(diffusion, steps)
    prior, target = Oracle(PRIOR, diffusion), Oracle(conditional(**(kwargs or {})), diffusion)
    guided = sampler.sample(
        lambda x, t, y=None: prior(x, t),
        (3, 4),
        noise=start,
        cond_fn=score_for(diffusion),
        model_kwargs=kwargs,
        clip_denoised=False,
    )
    expected = sampler.sample(target, (3, 4), noise=start, clip_denoised=False)
    torch.testing.assert_close(guided, expected, rtol=1e-8, atol=1e-8)


def test_guided_ddim_inverts_along_the_conditional() -> None:
    diffusion, x = chain(), normal(3, 4)
    sampler = SamplerDDIM(diffusion)
    guided = sampler.round_trip(Oracle(PRIOR, diffusion), x, cond_fn=score_for(diffusion))
    expected = sampler.round_trip(Oracle(conditional(), diffusion), x)
    torch.testing.assert_close(guided.noise, expected.noise, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(guided.sample, expected.sample, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("var_type", ModelVarType)
def test_the_ancestral_mean_moves_by_variance_times_gradient(var_type: ModelVarType) -> None:
    diffusion = chain(model_var_type=var_type)
    sampler, network = SamplerDDPM(diffusion, 9), arbitrary(diffusion.output_channels(1))
    x, t, zero = normal(9, 4), torch.arange(9), torch.zeros(9, 4)

    def cond_fn(x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x - 0.01 * t.reshape(-1, 1)

    plain = sampler.p_sample(network, x, t, noise=zero)
    moved = sampler.p_sample(network, x, t, noise=zero, cond_fn=cond_fn)
    at_kept_times = torch.tensor(sampler.times[-2::-1])
    variance = sampler.chain.p_mean_variance(network, x, t)["variance"]
    torch.testing.assert_close(
        moved["sample"] - plain["sample"], variance * cond_fn(x, at_kept_times), rtol=1e-9, atol=1e-9
    )
    assert torch.equal(moved["pred_xstart"], plain["pred_xstart"])


@pytest.mark.parametrize("kwargs", [None, {"y": 0.9}])
def test_guided_ancestral_sampling_draws_from_the_conditional(kwargs: dict[str, float] | None) -> None:
    diffusion = GaussianDiffusion(betas=linear_betas(400), model_var_type=ModelVarType.FIXED_LARGE)
    prior, target = Oracle(PRIOR, diffusion), conditional(**(kwargs or {}))
    sample = SamplerDDPM(diffusion).sample(
        lambda x, t, y=None: prior(x, t),
        (8, 2000),
        cond_fn=score_for(diffusion),
        model_kwargs=kwargs,
        clip_denoised=False,
        seed=0,
    )
    assert float(sample.mean()) == pytest.approx(target.mean, abs=0.015)
    assert float(sample.std()) == pytest.approx(target.std, rel=0.05)


def test_single_ddim_steps_are_guided_too() -> None:
    diffusion, x, t = chain(), normal(4, 3), torch.tensor([0, 3, 7, 8])
    sampler, network = SamplerDDIM(diffusion, 10), Oracle(PRIOR, diffusion)
    for step in (sampler.ddim_sample, sampler.ddim_reverse_sample):
        guided = step(network, x, t, cond_fn=score_for(diffusion), clip_denoised=False)
        expected = step(Oracle(conditional(), diffusion), x, t, clip_denoised=False)
        torch.testing.assert_close(guided["sample"], expected["sample"], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("t", [0, T - 1])
def test_x_start_is_clipped_after_guidance_and_eps_matches(t: int) -> None:
    diffusion = chain()
    network, x = arbitrary(1), normal(3, 4)
    plain = DiffusionDenoiser(diffusion, network)
    guided, (alpha, sigma) = ScoreGuided(plain, lambda x, t: torch.full_like(x, 1e4))(x, t), plain.schedule(t)
    assert bool((guided.x_start == 1).all())
    torch.testing.assert_close(alpha * guided.x_start + sigma * guided.eps, x)


def test_denoised_fn_sees_the_guided_x_start_once() -> None:
    diffusion, calls = chain(), []

    def denoised_fn(x_start: Tensor) -> Tensor:
        calls.append(x_start)
        return x_start / 2

    plain = DiffusionDenoiser(diffusion, Oracle(PRIOR, diffusion), False, denoised_fn)
    x = normal(3, 4)
    guided = ScoreGuided(plain, score_for(diffusion))(x, 7)
    expected = conditional().x_start(x, *plain.schedule(7))
    assert len(calls) == 1
    torch.testing.assert_close(calls[0], expected)
    torch.testing.assert_close(guided.x_start, expected / 2)


@pytest.mark.parametrize("guide", [ScoreGuided, MeanGuided])
def test_cond_fn_sees_the_times_the_network_sees(guide: type[ScoreGuided | MeanGuided]) -> None:
    diffusion = chain(rescale_timesteps=True).respaced([1, 11, 49])
    seen: list[tuple[str, Tensor]] = []

    def record(name: str) -> Callable[..., Tensor]:
        return lambda x, t: (seen.append((name, t)), x)[1]

    guide(DiffusionDenoiser(diffusion, record("network")), record("cond_fn"))(normal(2, 3), 1)
    assert {name for name, _ in seen} == {"network", "cond_fn"}
    assert all(torch.equal(t, torch.full((2,), 11 * 1000 / T)) for _, t in seen)


@pytest.mark.parametrize("guide", [ScoreGuided, MeanGuided])
def test_guidance_keeps_the_schedule(guide: type[ScoreGuided | MeanGuided]) -> None:
    plain = DiffusionDenoiser(chain(), arbitrary(1))
    for t in (CLEAN, 0, 3.5, T - 1):
        assert guide(plain, arbitrary(1)).schedule(t) == plain.schedule(t)


@pytest.mark.parametrize("mean_type", [ModelMeanType.VELOCITY, ModelMeanType.START_X])
def test_guidance_waits_where_there_is_no_signal(mean_type: ModelMeanType) -> None:
    betas = zero_terminal_snr(cosine_betas(T))
    diffusion = GaussianDiffusion(betas=betas, model_mean_type=mean_type)
    sampler, network = SamplerDDIM(diffusion, 10), Oracle(PRIOR, diffusion)
    sample = sampler.sample(network, (4, 500), cond_fn=score_for(diffusion), seed=0)
    assert float(sample.mean()) == pytest.approx(conditional().mean, abs=0.15)


def test_a_single_guided_step_waits_where_there_is_no_signal() -> None:
    diffusion = GaussianDiffusion(
        betas=zero_terminal_snr(cosine_betas(T)), model_mean_type=ModelMeanType.VELOCITY
    )
    x, t = normal(2, 3), torch.tensor([T - 1, 3])
    sampler, network = SamplerDDIM(diffusion), Oracle(PRIOR, diffusion)
    guided = sampler.ddim_sample(network, x, t, cond_fn=lambda x, t: torch.ones_like(x))
    plain = sampler.ddim_sample(network, x, t)
    assert torch.equal(guided["sample"][0], plain["sample"][0])
    assert not torch.allclose(guided["sample"][1], plain["sample"][1], atol=1e-4)
