"""Beliefs about levels, and what Bayes' rule makes of them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from perrin import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from perrin.errors import ArgumentError
from perrin.likelihood import bound
from perrin.networks.posterior import (
    BIAS_GAIN,
    CHAIN_TABLES,
    COEFFICIENT_GAIN,
    LEVEL_INPUTS,
    LevelPosterior,
    _require_full_precision,
    level_functions,
)
from perrin.schedules import get_named_beta_schedule, log_snr_linear_betas, zero_terminal_snr

LEVELS = 5


class Constant(nn.Module):
    """Says the same of every value, whatever it sees."""

    def __init__(self, coefficients: Tensor) -> None:
        super().__init__()
        self.coefficients = coefficients
        self.seen = torch.empty(0)
        self.asked: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.seen, self.asked = x, y
        channels = x.shape[1] // LEVEL_INPUTS
        said = self.coefficients.repeat(channels).to(x.dtype)
        return said.reshape(1, -1, *[1] * (x.ndim - 2)).expand(len(x), -1, *x.shape[2:])


def chain(
    steps: int = 50, levels: int = LEVELS, var: ModelVarType = ModelVarType.LEARNED_RANGE
) -> GaussianDiffusion:
    return GaussianDiffusion(
        betas=log_snr_linear_betas(steps, 7.0, -7.0),
        model_mean_type=ModelMeanType.START_X,
        model_var_type=var,
        loss_type=LossType.RESCALED_KL,
        levels=levels,
    )


def posterior(diffusion: GaussianDiffusion, body: nn.Module | None = None, **options: Any) -> LevelPosterior:
    basis = options.pop("basis", 3)
    return LevelPosterior(
        body or Constant(torch.zeros(basis)),
        levels=diffusion.levels or 0,
        basis=basis,
        tables={name: diffusion.get_buffer(name) for name in CHAIN_TABLES},
        **{"learn_sigma": diffusion.variance.extra_channels > 0} | options,
    )


def believing(network: LevelPosterior, p: Tensor) -> LevelPosterior:
    """The network with ``p`` (L,) as its prior of every value."""
    with torch.no_grad():
        network.bias.copy_(p.log() / BIAS_GAIN)
    return network


def by_hand(x: Tensor, alpha: Tensor, sigma: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    levels = torch.linspace(-1, 1, len(p), dtype=torch.float64)
    weights = (p.log() - (x[..., None] - alpha * levels) ** 2 / (2 * sigma**2)).softmax(-1)
    mean = weights @ levels
    return mean, (weights * (levels - mean[..., None]) ** 2).sum(-1)


PRIOR = torch.tensor([0.4, 0.05, 0.1, 0.15, 0.3], dtype=torch.float64)


@pytest.mark.parametrize("t", [0, 10, 30, 49])
def test_the_mean_is_the_posterior_mean_of_the_levels(t: int) -> None:
    diffusion = chain(var=ModelVarType.FIXED_SMALL)
    network = believing(posterior(diffusion), PRIOR)
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    alpha, sigma = diffusion.sqrt_alphas_cumprod[t], diffusion.sqrt_one_minus_alphas_cumprod[t]
    mean, _ = by_hand(x, alpha, sigma, PRIOR)
    out = network(x, torch.full((3,), t))
    assert out.dtype == torch.float64
    assert_close(out, mean, atol=1e-6, rtol=0)  # the bias is float32


def test_the_coefficients_weigh_functions_of_the_level() -> None:
    diffusion = chain(var=ModelVarType.FIXED_SMALL)
    coefficients = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    network = posterior(diffusion, Constant(coefficients))
    prior = (COEFFICIENT_GAIN * coefficients @ network.functions.detach().double()).softmax(0)
    x = torch.randn(2, 1, 3, dtype=torch.float64)
    mean, _ = by_hand(
        x, diffusion.sqrt_alphas_cumprod[20], diffusion.sqrt_one_minus_alphas_cumprod[20], prior
    )
    assert_close(network(x, torch.full((2,), 20)), mean, atol=1e-12, rtol=0)


def test_the_variance_half_gives_the_best_variance_of_the_step() -> None:
    diffusion, t = chain(), 20
    network = believing(posterior(diffusion), PRIOR)
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    alpha, sigma = diffusion.sqrt_alphas_cumprod[t], diffusion.sqrt_one_minus_alphas_cumprod[t]
    mean, variance = by_hand(x, alpha, sigma, PRIOR)
    found = diffusion.p_mean_variance(network, x, t)
    assert_close(found["pred_xstart"], mean, atol=1e-6, rtol=0)
    coef = diffusion.get_buffer("posterior_mean_coef1")[t]
    best = diffusion.get_buffer("posterior_variance")[t] + coef**2 * variance
    assert_close(found["variance"], best, atol=0, rtol=1e-5)


def test_the_body_sees_the_input_and_what_the_bias_makes_of_it() -> None:
    diffusion = chain()
    body = Constant(torch.zeros(3))
    network = believing(posterior(diffusion, body), PRIOR)
    x = torch.randn(2, 2, 4, 4)
    labels = torch.tensor([1, 0])
    network(x, torch.tensor([3, 40]), labels)
    assert body.asked is labels
    assert body.seen.shape == (2, 3 * 2, 4, 4)
    mean, variance = by_hand(
        x[1].double(), diffusion.sqrt_alphas_cumprod[40], diffusion.sqrt_one_minus_alphas_cumprod[40], PRIOR
    )
    assert_close(body.seen[1], torch.cat([x[1], mean.float(), variance.sqrt().float()]), atol=1e-4, rtol=1e-3)


def test_the_bound_of_the_true_marginals_is_their_entropy() -> None:
    values = torch.multinomial(PRIOR, 400 * 64, replacement=True, generator=torch.Generator().manual_seed(0))
    x_start = (2 * values / (LEVELS - 1) - 1).float().reshape(400, 1, 8, 8)
    diffusion = chain(steps=200)
    entropy = -(torch.bincount(values) / len(values) * PRIOR.log2()).sum().item()
    with torch.no_grad():
        found = bound(
            diffusion, believing(posterior(diffusion), PRIOR), x_start, indices=range(400), terms=60
        )
    assert found.total.mean().item() == pytest.approx(entropy, abs=0.02)


def test_times_between_two_steps_have_the_noise_between() -> None:
    diffusion = chain(var=ModelVarType.FIXED_SMALL)
    network = believing(posterior(diffusion), PRIOR)
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    level = diffusion.level_of_batch(20.5)
    mean, _ = by_hand(x, *map(torch.as_tensor, level), PRIOR)
    assert_close(network(x, torch.tensor([20.5])), mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [75, 4000])  # 75: times that do not come back exactly
def test_rescaled_times_mean_the_same_steps(steps: int) -> None:
    plain = chain(steps)
    scaled = GaussianDiffusion(
        betas=plain.betas,
        model_mean_type=ModelMeanType.START_X,
        model_var_type=ModelVarType.LEARNED_RANGE,
        levels=LEVELS,
        rescale_timesteps=True,
    )
    t = torch.arange(0, steps, max(steps // 75, 1))
    x = torch.randn(len(t), 1, 2, 2)
    one = plain.p_mean_variance(posterior(plain), x, t)
    other = scaled.p_mean_variance(posterior(scaled, time_scale=1000 / steps), x, t)
    assert_close(other["pred_xstart"], one["pred_xstart"], atol=1e-4, rtol=0)
    assert_close(other["log_variance"], one["log_variance"], atol=1e-3, rtol=0)


def test_a_wrong_belief_at_the_first_step_costs_a_bounded_number_of_bits() -> None:
    sure = torch.tensor([1.0, 1e-200, 1e-200, 1e-200, 1e-200], dtype=torch.float64)
    diffusion = chain()
    network = believing(posterior(diffusion), sure / sure.sum())
    x_start = torch.full((1, 1, 2, 2), -0.5)  # the second level
    terms = diffusion.vb_terms_bpd(network, x_start, x_start, 0)
    assert 5 < terms["output"].item() < 20


def test_it_is_never_computed_in_half_precision() -> None:
    diffusion = chain(levels=256)
    network = posterior(diffusion)
    x, t = torch.rand(4, 1, 4, 4) * 2 - 1, torch.full((4,), 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x, t)
    assert out.dtype == torch.float32
    assert_close(out, network(x, t), atol=0, rtol=0)
    low = network(x.bfloat16(), t)
    assert low.dtype == torch.bfloat16


def test_half_precision_weights_leave_the_levels_exact() -> None:
    diffusion = chain(levels=256, var=ModelVarType.FIXED_SMALL)
    network = posterior(diffusion).bfloat16()
    x_start = torch.tensor([[[2 * 101 / 255 - 1]]])
    first = torch.zeros(1, dtype=torch.int64)
    assert_close(network(x_start, first), posterior(diffusion)(x_start, first), atol=0, rtol=0)


def test_it_has_a_derivative_where_the_level_is_certain() -> None:
    network = posterior(chain())
    x = torch.linspace(-1, 1, 4).reshape(1, 1, 2, 2).requires_grad_()
    (slope,) = torch.autograd.grad(network(x, torch.zeros(1, dtype=torch.int64)).sum(), x)
    assert slope.isfinite().all()


def test_the_input_reaches_the_mean_through_what_the_body_sees() -> None:
    class Echo(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            return x[:, 1:2].repeat(1, 3, 1)

    diffusion = chain(var=ModelVarType.FIXED_SMALL)
    network = posterior(diffusion, Echo())
    x = torch.full((1, 1, 1), 0.2, dtype=torch.float64)
    t = torch.tensor([30])
    (slope,) = torch.autograd.grad(network(x.requires_grad_(), t).sum(), x)
    h = 1e-6
    with torch.no_grad():
        assert_close(slope, (network(x + h, t) - network(x - h, t)) / (2 * h), atol=1e-7, rtol=1e-6)


def test_every_parameter_learns() -> None:
    body = nn.Conv1d(3, 4, 1)

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = body

        def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            out: Tensor = self.map(x)
            return out

    diffusion = chain()
    network = posterior(diffusion, Body(), basis=4)
    diffusion.training_losses(network, torch.zeros(2, 1, 5), torch.tensor([20, 30]))["loss"].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_functions_of_the_level_are_cosines_and_the_two_ends() -> None:
    functions = level_functions(9, 4)
    assert functions.shape == (4, 9)
    assert_close(functions[2:], torch.eye(9)[[0, 8]])
    assert_close(functions[:2] @ functions[:2].T, 4.5 * torch.eye(2), atol=1e-5, rtol=0)
    assert level_functions(9, 2).shape == (2, 9)
    assert (level_functions(9, 2)[:, 0] > 0.9).all()


@pytest.mark.parametrize(
    ("options", "levels", "message"),
    [
        ({"basis": 0}, 5, "basis must be at least 1, got 0"),
        ({}, 4096, "levels must be from 2 to 1024 for a posterior of levels, got 4096"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], levels: int, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        posterior(chain(levels=levels), **options)


@pytest.mark.parametrize(
    "betas",
    [
        get_named_beta_schedule("linear", 4000),
        log_snr_linear_betas(500, 13.3, -13.0),
        log_snr_linear_betas(2, 13.3, -7.0),
        log_snr_linear_betas(1, 13.3, -7.0),
        zero_terminal_snr(get_named_beta_schedule("linear", 1000)),
    ],
    ids=["linear 4000", "to -13", "2 steps", "1 step", "zero terminal"],
)
def test_every_timestep_of_every_chain_is_finite_in_float32(betas: Any) -> None:
    diffusion = GaussianDiffusion(
        betas=betas, model_mean_type=ModelMeanType.START_X, model_var_type=ModelVarType.LEARNED_RANGE
    )
    total = diffusion.num_timesteps
    network = posterior(diffusion, learn_sigma=True)
    x = torch.zeros(total, 1, 2, 2)
    t = torch.arange(total)
    x_t = diffusion.q_sample(x, t, torch.ones_like(x))
    assert bool(network(x_t, t).isfinite().all())
    assert bool(diffusion.vb_terms_bpd(network, x, x_t, t)["output"].isfinite().all())


def test_products_of_reduced_precision_are_refused_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        device = torch.device("cuda")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    with pytest.raises(ArgumentError, match=r"set_float32_matmul_precision\('highest'\) on CUDA, got 'high'"):
        _require_full_precision(OnCuda())
