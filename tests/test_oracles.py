"""The oracles: their closed forms against numerical ones, and the networks made of them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from perrin import GaussianDiffusion, ModelMeanType, ModelVarType, get_named_beta_schedule
from perrin.denoiser import DiffusionDenoiser
from perrin.errors import ArgumentError, ShapeError
from perrin.oracles import CorrelatedData, Data, GaussianData, MixtureData, OptimalVariance, Oracle, normal

LEVEL, EARLIER = (0.8, 0.6), (math.sqrt(0.9), math.sqrt(0.1))
COVARIANCE = torch.tensor([[0.4, 0.2, 0.1], [0.2, 0.3, -0.1], [0.1, -0.1, 0.2]], dtype=torch.float64)
SEPARATE = [GaussianData(0.3, 0.5), MixtureData(), MixtureData((-0.5, 0.9), 0.3)]
ALL: list[Data] = [*SEPARATE, CorrelatedData(COVARIANCE, 0.1), CorrelatedData.decaying(3, correlation=0.7)]
each_data = pytest.mark.parametrize("data", ALL, ids=["gaussian", "mixture", "two", "full", "decaying"])

GRID = torch.linspace(-6, 6, 24001, dtype=torch.float64)
STEP = float(GRID[1] - GRID[0])


def density(data: Data, x: Tensor) -> Tensor:
    """p(x_0) on a grid of one dimension, by its definition."""
    means = data.means if isinstance(data, MixtureData) else (data.mean,)
    return torch.stack([normal_density(x, mean, data.std) for mean in means]).mean(0)


def normal_density(x: Tensor, mean: Any, std: float) -> Tensor:
    return torch.exp(-0.5 * ((x - mean) / std) ** 2) / (math.sqrt(2 * math.pi) * std)


def posterior(data: Data, x_t: float) -> Tensor:
    """p(x_0 | x_t) on the grid, by Bayes' rule."""
    alpha, sigma = LEVEL
    joint = density(data, GRID) * normal_density(alpha * GRID, x_t, sigma)
    return joint / (joint.sum() * STEP)


# Densities by quadrature


@pytest.mark.parametrize("data", SEPARATE)
@pytest.mark.parametrize("x_t", [-1.3, 0.0, 0.45])
def test_the_moments_of_x_start_are_those_of_bayes_rule(data: Data, x_t: float) -> None:
    p, x = posterior(data, x_t), torch.full((1, 1), x_t, dtype=torch.float64)
    mean = float((p * GRID).sum() * STEP)
    variance = float((p * (GRID - mean) ** 2).sum() * STEP)
    assert float(data.x_start(x, *LEVEL)) == pytest.approx(mean, abs=1e-9)
    assert float(data.x_start_variance(x, *LEVEL)) == pytest.approx(variance, rel=1e-7)


@pytest.mark.parametrize("data", SEPARATE)
@pytest.mark.parametrize("x_t", [-1.3, 0.45])
def test_the_reverse_step_has_the_moments_of_bayes_rule(data: Data, x_t: float) -> None:
    (alpha, sigma), (alpha_s, sigma_s) = LEVEL, EARLIER
    decay, x = alpha / alpha_s, torch.tensor([[x_t]], dtype=torch.float64)
    beta = sigma**2 - decay**2 * sigma_s**2
    noisy = data.log_prob(GRID[:, None], alpha_s, sigma_s)
    joint = (noisy - 0.5 * (x_t - decay * GRID) ** 2 / beta).exp()
    p = joint / (joint.sum() * STEP)
    exact = float((p * GRID).sum() * STEP)
    mean, variance = data.previous(x, LEVEL, EARLIER)
    assert float(mean) == pytest.approx(exact, abs=1e-9)
    assert float(variance) == pytest.approx(float((p * (GRID - exact) ** 2).sum() * STEP), rel=1e-7)


@pytest.mark.parametrize("data", SEPARATE)
@pytest.mark.parametrize("level", [(1.0, 0.0), LEVEL, (1e-3, 1.0)])
def test_the_density_of_x_t_integrates_to_one_and_has_the_stated_variance(
    data: GaussianData | MixtureData, level: tuple[float, float]
) -> None:
    p = data.log_prob(GRID[:, None], *level).exp()
    assert float(p.sum() * STEP) == pytest.approx(1, abs=1e-7)
    mean = float((p * GRID).sum() * STEP)
    assert mean == pytest.approx(level[0] * data.mean, abs=1e-7)
    assert float((p * (GRID - mean) ** 2).sum() * STEP) == pytest.approx(
        float(data.total_variance(*level)), rel=1e-6
    )


def test_the_density_of_data_is_that_of_its_definition() -> None:
    for data in SEPARATE:
        torch.testing.assert_close(data.log_prob(GRID[:, None]).exp(), density(data, GRID))


@pytest.mark.parametrize("alpha", [1.0, 0.8])
def test_correlated_data_have_the_density_of_a_multivariate_normal(alpha: float) -> None:
    data, sigma, x = CorrelatedData(COVARIANCE, 0.1), math.sqrt(1 - alpha**2), normal(5, 3)
    exact = torch.distributions.MultivariateNormal(
        torch.full((3,), alpha * 0.1, dtype=torch.float64), alpha**2 * COVARIANCE + sigma**2 * torch.eye(3)
    )
    torch.testing.assert_close(data.log_prob(x, alpha, sigma), exact.log_prob(x))


def test_correlated_data_have_the_moments_of_conditioning() -> None:
    data, (alpha, sigma), x = CorrelatedData(COVARIANCE, 0.1), LEVEL, normal(5, 3)
    gain = alpha * COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(3))
    torch.testing.assert_close(data.x_start(x, *LEVEL), 0.1 + (x - alpha * 0.1) @ gain.T)
    left = (COVARIANCE - alpha * gain @ COVARIANCE).diagonal()
    torch.testing.assert_close(data.x_start_variance(x, *LEVEL), left.expand(5, 3))


def test_without_correlation_correlated_data_are_gaussian_data() -> None:
    plain, full, x = GaussianData(0.0, 0.5), CorrelatedData.decaying(6, correlation=0.0), normal(4, 2, 3)
    for level in ((1.0, 0.0), LEVEL):
        torch.testing.assert_close(full.log_prob(x, *level), plain.log_prob(x, *level))
        torch.testing.assert_close(full.x_start(x, *level), plain.x_start(x, *level))
    torch.testing.assert_close(full.flow(x, LEVEL, EARLIER), plain.flow(x, LEVEL, EARLIER))
    assert full.entropy_bpd == pytest.approx(plain.entropy_bpd)


# Identities


@each_data
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 1), (4, 1, 3)])
def test_the_score_is_the_gradient_of_the_density(data: Data, shape: tuple[int, ...]) -> None:
    x = normal(*shape).requires_grad_()
    (gradient,) = torch.autograd.grad(data.log_prob(x, *LEVEL).sum(), x)
    torch.testing.assert_close(data.score(x, *LEVEL), gradient)


@each_data
def test_x_start_and_eps_make_x_t(data: Data) -> None:
    x, (alpha, sigma) = normal(4, 3), LEVEL
    torch.testing.assert_close(alpha * data.x_start(x, *LEVEL) + sigma * data.eps(x, *LEVEL), x)


@each_data
def test_the_variance_of_x_start_is_the_slope_of_its_mean(data: Data) -> None:
    x, (alpha, sigma) = normal(4, 3).requires_grad_(), LEVEL
    slopes = torch.stack(
        [
            torch.autograd.grad(data.x_start(x, *LEVEL)[:, i].sum(), x, retain_graph=True)[0][:, i]
            for i in range(3)
        ],
        1,
    )
    torch.testing.assert_close(data.x_start_variance(x, *LEVEL).detach(), slopes * sigma**2 / alpha)


@each_data
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_may_differ_between_examples(data: Data, dtype: torch.dtype) -> None:
    x = normal(2, 1, 3).to(dtype)
    alpha, sigma = torch.tensor([0.8, 0.6]).to(dtype), torch.tensor([0.6, 0.8]).to(dtype)
    together = (alpha[:, None, None], sigma[:, None, None])
    for i, level in enumerate([(0.8, 0.6), (0.6, 0.8)]):
        for name in ("x_start", "x_start_variance", "score", "eps", "log_prob"):
            method: Callable[..., Tensor] = getattr(data, name)
            found = method(x, *together)
            assert found.dtype == dtype
            torch.testing.assert_close(found[i : i + 1], method(x[i : i + 1], *level))


@each_data
def test_draws_have_the_density_that_is_stated(data: Data) -> None:
    x = data.draw(20000, 3, seed=3)
    assert torch.equal(x, data.draw(20000, 3, seed=3))
    assert not torch.equal(x, data.draw(20000, 3, seed=4))
    scores = data.score(x, 1.0, 0.0)  # mean 0, and E[x score] = -1 (Stein's identity)
    products = x[:, :, None] * scores[:, None]
    for values, mean in ((scores, torch.zeros(3)), (products, -torch.eye(3))):
        assert bool(((values.mean(0) - mean).abs() < 5 * values.std(0) / math.sqrt(len(x))).all())


@pytest.mark.parametrize("data", [GaussianData(0.3, 0.2), CorrelatedData(COVARIANCE, 0.1)])
def test_the_entropy_is_the_mean_code_length(data: GaussianData | CorrelatedData) -> None:
    assert float(data.nll_bpd(data.draw(100000, 3)).mean()) == pytest.approx(data.entropy_bpd, abs=0.01)


def test_the_mixture_s_bits_are_its_density_s() -> None:
    data, x = MixtureData(), normal(4, 2, 3)
    torch.testing.assert_close(data.nll_bpd(x), -data.log_prob(x) / (6 * math.log(2)))


@pytest.mark.parametrize("data", [GaussianData(0.3, 0.5), CorrelatedData(COVARIANCE, 0.1)])
def test_the_flow_solves_its_equation(data: GaussianData | CorrelatedData) -> None:
    x = data.draw(4, 3)

    def level(angle: float) -> tuple[float, float]:
        return math.cos(angle), math.sin(angle)

    def scaled(angle: float) -> Tensor:  # y = x / alpha, whose slope in sigma / alpha is eps
        return data.flow(x, (1.0, 0.0), level(angle)) / level(angle)[0]

    angle, step = 0.7, 1e-5
    slope = (scaled(angle + step) - scaled(angle - step)) / (math.tan(angle + step) - math.tan(angle - step))
    now = data.flow(x, (1.0, 0.0), level(angle))
    torch.testing.assert_close(slope, data.eps(now, *level(angle)), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(data.flow(now, level(angle), (1.0, 0.0)), x)


@pytest.mark.parametrize(
    "wrong",
    [torch.ones(2, 3), torch.tensor([[1.0, 0.5], [0.4, 1.0]]), torch.tensor([[1.0, 2.0], [2.0, 1.0]])],
)
def test_what_is_no_covariance_is_refused(wrong: Tensor) -> None:
    with pytest.raises(ArgumentError, match="symmetric, positive definite"):
        CorrelatedData(wrong)


def test_examples_of_another_size_than_the_covariance_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"examples must have 3 dimensions, got \(2, 2\)"):
        CorrelatedData(COVARIANCE).score(normal(1, 2, 2), *LEVEL)


# Networks


def chain(
    mean_type: ModelMeanType = ModelMeanType.EPSILON,
    var_type: ModelVarType = ModelVarType.FIXED_SMALL,
    *,
    total: int = 60,
    rescale_timesteps: bool = False,
) -> GaussianDiffusion:
    return GaussianDiffusion(
        betas=get_named_beta_schedule("cosine", total),
        model_mean_type=mean_type,
        model_var_type=var_type,
        rescale_timesteps=rescale_timesteps,
        levels=None,
    )


def exact_level(t: int, total: int = 60) -> tuple[float, float]:
    signal = float(np.prod(1 - get_named_beta_schedule("cosine", total)[: t + 1]))
    return math.sqrt(signal), math.sqrt(1 - signal)


@each_data
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("mean_type", ModelMeanType)
def test_every_mean_type_is_read_as_what_is_known(
    data: Data, mean_type: ModelMeanType, rescale: bool
) -> None:
    diffusion, x = chain(mean_type, rescale_timesteps=rescale), normal(2, 3)
    denoise = DiffusionDenoiser(diffusion, Oracle(data, diffusion), clip_denoised=False)
    for t in (0, 7, 40):
        expected = data.x_start(x, *exact_level(t))
        torch.testing.assert_close(denoise(x, t).x_start, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("mean_type", ModelMeanType)
def test_float32_outputs_are_those_of_float64(mean_type: ModelMeanType) -> None:
    diffusion = chain(mean_type, total=1000)
    network, x, t = Oracle(MixtureData(), diffusion), normal(5, 3), torch.tensor([0, 1, 10, 500, 990])
    found = network(x.float(), t)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), network(x, t), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rescale", [False, True])
def test_a_fractional_time_is_read_at_the_level_between(rescale: bool) -> None:
    data, diffusion, x = MixtureData(), chain(rescale_timesteps=rescale), normal(2, 3)
    denoise = DiffusionDenoiser(diffusion, Oracle(data, diffusion), clip_denoised=False)
    alpha, sigma = denoise.schedule(12.4)
    torch.testing.assert_close(denoise(x, 12.4).eps, data.eps(x, alpha, sigma), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [None, (3, 20, 41, 59)])
@pytest.mark.parametrize("var_type", [ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE])
@pytest.mark.parametrize("data", [GaussianData(0.3, 0.5), MixtureData()])
def test_the_optimal_variance_is_that_of_the_reverse_step(
    data: Data, var_type: ModelVarType, kept: tuple[int, ...] | None
) -> None:
    whole = chain(ModelMeanType.START_X, var_type)
    diffusion = whole if kept is None else whole.respaced(kept)
    network, x = Oracle(data, whole, OptimalVariance(data, whole, kept)), normal(2, 3)
    times = range(60) if kept is None else kept
    for place in (0, 1, diffusion.num_timesteps - 1):
        before = exact_level(times[place - 1]) if place else (1.0, 0.0)
        mean, variance = data.previous(x, exact_level(times[place]), before)
        found = diffusion.p_mean_variance(network, x, place, clip_denoised=False)
        torch.testing.assert_close(found["mean"], mean, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(found["variance"], variance, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("kept", [(59,), (0, 59)])
def test_the_bound_of_an_exact_reverse_process_is_the_entropy(kept: tuple[int, ...]) -> None:
    data, whole = GaussianData(0.0, 0.5), chain(var_type=ModelVarType.LEARNED)
    network = Oracle(data, whole, OptimalVariance(data, whole, kept))
    x, noise = (
        torch.tensor(signs, dtype=torch.float64)[:, None] for signs in ([1, 1, -1, -1], [1, -1, 1, -1])
    )
    found = whole.respaced(kept).calc_bpd_loop(
        network, data.std * x, clip_denoised=False, noise_fn=lambda x, t: noise
    )
    assert float(found["total_bpd"].mean()) == pytest.approx(data.entropy_bpd, abs=1e-6)
