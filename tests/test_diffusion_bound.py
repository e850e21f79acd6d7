"""The bound of Gaussian data, whose terms are quadratic in (x_0, noise): two signs of each are exact."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from chains import chain, ideal_eps, images, normal, signs
from perrin import GaussianDiffusion, ModelMeanType, ModelVarType, space_timesteps
from perrin.schedules import linear_betas


def expected_bound(
    keep: list[int],
    log_variance: Callable[[GaussianDiffusion, Tensor], Tensor],
    mean: float,
    std: float,
    convert: bool = False,
) -> float:
    """The mean bound in bits, exact eps and a LEARNED variance that is a table of the respaced chain.

    With ``convert`` it is one of the whole chain, and becomes that of the longer steps.
    """
    full = GaussianDiffusion(betas=linear_betas(1000), model_var_type=ModelVarType.LEARNED, levels=None)
    diffusion = full.respaced(keep, convert_learned=convert)
    told = full if convert else diffusion
    left = std**2 * (1 - told.alphas_cumprod) / (told.alphas_cumprod * (std**2 - 1) + 1)
    table = torch.zeros(1000, dtype=torch.float64)
    table[slice(None) if convert else keep] = log_variance(told, left)
    eps = ideal_eps(full, mean, std)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([eps(x, t), table[t][:, None]], 1)

    x, noise = signs(mean, std)
    found = diffusion.calc_bpd_loop(network, x, clip_denoised=False, noise_fn=lambda x, t: noise)
    return found["total_bpd"].mean().item()


def optimal(diffusion: GaussianDiffusion, left: Tensor) -> Tensor:
    """Cov[x_s | x_t] = posterior variance + coef1^2 Cov[x_0 | x_t] (Analytic-DPM, arXiv:2201.06503, eq. 7)."""
    get = diffusion.get_buffer
    return (get("posterior_variance") + get("posterior_mean_coef1") ** 2 * left).log()


def entropy_bits(std: float) -> float:
    return 0.5 * math.log2(2 * math.pi * math.e * std**2)


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize(
    ("steps", "std"),
    [
        *((steps, 0.5) for steps in (1, 2, 5, 10, 25, 50, 100, 1000)),
        (5, 1.0),
        (100, 1.0),
        (5, 0.05),
        (100, 0.05),
    ],
)
def test_ideal_bound_is_the_entropy(steps: int, std: float, convert: bool) -> None:
    keep = sorted(space_timesteps(1000, steps))
    gap = expected_bound(keep, optimal, 0.0, std, convert) - entropy_bits(std)
    alpha_bar = GaussianDiffusion(betas=linear_betas(1000)).alphas_cumprod[-1].item()
    excess = alpha_bar * (std**2 - 1)  # of the variance of x_T over the prior's 1
    assert gap == pytest.approx(0.5 * (excess - math.log1p(excess)) / math.log(2), abs=1e-12)
    assert abs(gap) < 1e-9


def test_a_mean_of_the_data_costs_what_is_left_of_it_at_the_end() -> None:
    keep = sorted(space_timesteps(1000, 25))
    gap = expected_bound(keep, optimal, 0.3, 0.5) - expected_bound(keep, optimal, 0.0, 0.5)
    alpha_bar = GaussianDiffusion(betas=linear_betas(1000)).alphas_cumprod[-1].item()
    assert gap == pytest.approx(0.5 * alpha_bar * 0.3**2 / math.log(2), abs=1e-12)


@pytest.mark.parametrize(
    ("steps", "gap"),
    [(5, 0.277474), (10, 0.147486), (25, 0.062023), (50, 0.031335), (100, 0.015734), (1000, 0.001576)],
)
def test_variance_beta_costs_the_known_gap(steps: int, gap: float) -> None:
    # The figures are of the papers' 1-based times, rounded half to even.
    keep = [int(t) - 1 for t in np.round(np.linspace(1, 1000, steps))]
    found = expected_bound(keep, lambda diffusion, left: diffusion.betas.log(), 0.0, 0.5)
    assert found - entropy_bits(0.5) == pytest.approx(gap, abs=6e-7)


@pytest.mark.parametrize("steps", [5, 50])
def test_variance_beta_is_optimal_for_data_of_unit_variance(steps: int) -> None:
    keep = sorted(space_timesteps(1000, steps))
    found = expected_bound(keep, lambda diffusion, left: diffusion.betas.log(), 0.0, 1.0)
    assert found == pytest.approx(entropy_bits(1.0), abs=1e-12)


@pytest.mark.parametrize("var", [ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE])
def test_fixed_variances_are_bounds_too(var: ModelVarType) -> None:
    full = GaussianDiffusion(betas=linear_betas(1000), model_var_type=var, levels=None)
    x, noise = signs(0.0, 0.5)
    diffusion = full.respaced(space_timesteps(1000, 100))
    found = diffusion.calc_bpd_loop(
        ideal_eps(full, 0.0, 0.5), x, clip_denoised=False, noise_fn=lambda x, t: noise
    )
    gap = found["total_bpd"].mean().item() - entropy_bits(0.5)
    assert 0.01 < gap < (0.02 if var is ModelVarType.FIXED_LARGE else 20)
    if var is ModelVarType.FIXED_LARGE:  # beta, but for the first step's share of the gap
        first = diffusion.get_buffer("posterior_variance")[1].item()
        left = 0.25 * diffusion.betas[0].item() / (1 - 0.75 * diffusion.alphas_cumprod[0].item())

        def decoder(variance: float) -> float:
            return 0.5 * (math.log2(variance) + left / variance / math.log(2))

        assert gap - decoder(first) + decoder(diffusion.betas[0].item()) == pytest.approx(0.015734, abs=6e-7)


def test_the_curve_adds_up_and_column_0_is_the_noisiest_step() -> None:
    diffusion, x = chain(num_timesteps=10), images(2, 3)
    noises = normal(10, 2, 3)
    curve = diffusion.calc_bpd_loop(lambda x, t: 0.5 * x, x, noise_fn=lambda x, t: noises[t])
    torch.testing.assert_close(curve["total_bpd"], curve["vb"].sum(1) + curve["prior_bpd"])
    for t in range(10):
        term = diffusion.vb_terms_bpd(lambda x, t: 0.5 * x, x, diffusion.q_sample(x, t, noises[t]), t)
        torch.testing.assert_close(curve["vb"][:, 9 - t], term["output"])
        error = (term["pred_xstart"] - x).square().mean(1)
        torch.testing.assert_close(curve["xstart_mse"][:, 9 - t], error)
    assert not curve["total_bpd"].requires_grad


def test_clipping_lowers_the_bound_of_a_wild_network() -> None:
    diffusion, x = chain(num_timesteps=10), images(2, 3)
    noise = normal(2, 3)
    clipped, plain = (
        diffusion.calc_bpd_loop(lambda x, t: 3 * x, x, clip, noise_fn=lambda x, t: noise)["total_bpd"]
        for clip in (True, False)
    )
    assert (clipped < plain).all()


@pytest.mark.parametrize("levels", [2, 17, 65536])
def test_the_decoder_takes_any_number_of_levels(levels: int) -> None:
    """A network that knows x_0 pays at t = 0 at most for what the Gaussian leaves outside the bin."""
    diffusion = chain(ModelMeanType.START_X, levels=levels)
    x = (
        2 * torch.randint(levels, (4, 50), generator=torch.Generator().manual_seed(0)) / (levels - 1) - 1
    ).double()
    bits = diffusion.vb_terms_bpd(lambda _, t: x, x, diffusion.q_sample(x, 0), 0)["output"]
    sigma = diffusion.get_buffer("posterior_variance")[1].sqrt().item()
    middle = math.erf(1 / (levels - 1) / sigma / math.sqrt(2))
    assert (bits >= 0).all()
    assert (bits <= -math.log2(middle) + 1e-9).all()
