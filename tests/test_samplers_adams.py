"""The weights of multistep rules, and DEIS, which extrapolates eps."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ideal import Ideal
from perrin import GaussianDiffusion, get_named_beta_schedule
from perrin.errors import ArgumentError
from perrin.noise import level_at
from perrin.oracles import MixtureData, normal
from perrin.samplers import Memory, Sampler, SamplerDDIM, SamplerDEIS
from perrin.samplers.multistep import exponential_moments, interpolation_weights, mean_weights
from perrin.schedules import log_snr_linear_betas

DATA = MixtureData(std=0.2)
DIFFUSION = GaussianDiffusion(betas=get_named_beta_schedule("linear", 1000))


def walk(sampler: Sampler) -> list[Tensor]:
    x, memory, states = normal(3, 5), (), []
    for t, s in pairwise(sampler.times):
        x, _, memory = sampler.step(Ideal(DATA, sampler.diffusion), x, t, s, lambda: torch.zeros(1), memory)
        states.append(x)
    return states


def uniform_moments(count: int) -> list[float]:
    return [1 / (k + 1) for k in range(count)]


# Weights


@pytest.mark.parametrize("places", [(0.0,), (0.0, -1.0), (1.0, 0.0, -0.7), (0.0, -0.4, -1.0, -3.0)])
def test_the_mean_of_a_polynomial_through_as_many_places_is_exact(places: tuple[float, ...]) -> None:
    coefficients = [0.7, -1.3, 0.4, 2.0][: len(places)]
    values = [sum(c * place**k for k, c in enumerate(coefficients)) for place in places]
    moments = uniform_moments(len(places))
    found = sum(w * value for w, value in zip(interpolation_weights(places, moments), values, strict=True))
    assert found == pytest.approx(sum(c * m for c, m in zip(coefficients, moments, strict=True)), rel=1e-12)


@pytest.mark.parametrize(
    "weights", [(1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]
)
def test_even_steps_have_the_weights_of_adams_and_bashforth(weights: tuple[float, ...]) -> None:
    even = [-float(i) for i in range(len(weights))]
    assert weights == pytest.approx(interpolation_weights(even, uniform_moments(len(weights))), rel=1e-12)


@pytest.mark.parametrize("h", [1e-9, 1e-3, 0.3, 0.999, 1.001, 4.0, 30.0])
def test_exponential_moments_are_those_of_the_density(h: float) -> None:
    u = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    density = (h * (u - 1)).exp()
    whole = torch.trapezoid(density, u)
    expected = [float(torch.trapezoid(density * u**k, u) / whole) for k in range(4)]
    assert exponential_moments(h, 4) == pytest.approx(expected, rel=1e-7)


def test_exponential_moments_meet_where_their_formula_changes() -> None:
    below, above = exponential_moments(1 - 1e-12, 4), exponential_moments(1 + 1e-12, 4)
    assert below == pytest.approx(above, rel=1e-11)


def test_two_predictions_count_as_their_line_amid_the_step() -> None:
    before, now, then = level_at(-2.0), level_at(-1.0), level_at(1.0)
    assert mean_weights([now, before], now, then) == pytest.approx([2.0, -1.0])
    assert mean_weights([now], now, then) == [1.0]


# DEIS


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("grid", ["uniform", "log-snr"])
def test_deis_integrates_the_polynomial_in_time(order: Any, grid: Any) -> None:
    """Against a fine sum of the polynomial, over sigma / alpha at times that are even in time."""
    sampler, denoise = SamplerDEIS(DIFFUSION, 9, order=order, grid=grid), Ideal(DATA, DIFFUSION)
    states, step = [normal(3, 5), *walk(sampler)], 5
    times, s = sampler.times[step - order + 1 : step + 1], sampler.times[step + 1]
    eps = [
        denoise(x, t).eps.flatten() for x, t in zip(states[step - order + 1 : step + 1], times, strict=True)
    ]
    units = [(t - times[-1]) / (s - times[-1]) for t in times]
    powers = torch.tensor([[u**k for k in range(order)] for u in units], dtype=torch.float64)
    curve = torch.linalg.solve(powers, torch.stack(eps))
    u = torch.linspace(0, 1, 8001, dtype=torch.float64)
    levels = [DIFFUSION.level_of_batch(times[-1] + float(each) * (s - times[-1])) for each in u]
    noise = torch.tensor([level.sigma / level.alpha for level in levels], dtype=torch.float64)
    values = torch.stack([u**k for k in range(order)], 1) @ curve
    moved = torch.trapezoid(values, noise, dim=0).reshape(3, 5)
    expected = levels[-1].alpha * (states[step] / levels[0].alpha + moved)
    torch.testing.assert_close(states[step + 1], expected, rtol=0, atol=2e-5)


def test_deis_of_order_2_on_even_log_snr_has_a_closed_form() -> None:
    """Where time is even in log-SNR, the mean of u over d exp(-h u) is (1 - (1 + h) exp(-h)) / h / (1 - exp(-h))."""
    diffusion = GaussianDiffusion(betas=log_snr_linear_betas(101, 9.0, -9.0))
    sampler, denoise = SamplerDEIS(diffusion, grid=[90, 75, 65, 0], order=2), Ideal(DATA, diffusion)
    first, second, *_ = walk(sampler)
    h = 10 * 0.09  # in half log-SNR
    mean = (1 - (1 + h) * math.exp(-h)) / h / -math.expm1(-h)
    (alpha, sigma), (alpha_s, sigma_s) = denoise.schedule(75), denoise.schedule(65)
    now, before = denoise(first, 75).eps, denoise(normal(3, 5), 90).eps
    slope = now + mean / 1.5 * (now - before)
    expected = alpha_s * (first / alpha + (sigma_s / alpha_s - sigma / alpha) * slope)
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-6)


def test_deis_does_not_extrapolate_steps_that_grow_fast_in_time() -> None:
    """On cosine's even log-SNR the first steps are each three times longer than the one before."""
    diffusion = GaussianDiffusion(betas=get_named_beta_schedule("cosine", 1000))
    sampler = SamplerDEIS(diffusion, 8)
    first, second, third, _ = sampler.times[:4]
    assert (second - third) / (first - second) > 2
    found, ddim = walk(sampler), walk(SamplerDDIM(diffusion, 8, grid="log-snr"))
    torch.testing.assert_close(found[1], ddim[1], rtol=1e-11, atol=1e-11)
    assert not torch.allclose(found[-2], ddim[-2], atol=1e-3)


@pytest.mark.parametrize("order", [1, 5, 2.5])
def test_another_order_is_refused(order: Any) -> None:
    with pytest.raises(ArgumentError, match=f"order must be 2, 3 or 4, got {order}"):
        SamplerDEIS(DIFFUSION, 5, order=order)


def test_what_was_said_at_much_noise_does_not_cancel() -> None:
    """In float32, from sigma / alpha = 20,291 on."""
    diffusion = GaussianDiffusion(betas=get_named_beta_schedule("cosine", 1000))
    sampler, denoise = SamplerDEIS(diffusion, 30, grid="uniform"), Ideal(DATA, diffusion)
    states = []
    for dtype in (torch.float32, torch.float64):
        x = normal(3, 5).to(dtype)
        memory: Memory = ()
        for t, s in pairwise(sampler.times):
            x, _, memory = sampler.step(denoise, x, t, s, lambda: torch.zeros(1), memory)
        states.append(x.double())
    torch.testing.assert_close(*states, rtol=0, atol=1e-3)


def test_eps_is_asked_for_once_a_visit() -> None:
    sampler, denoise = SamplerDEIS(DIFFUSION, 8), Ideal(DATA, DIFFUSION)
    step = sampler.step(denoise, normal(3, 5), *sampler.times[:2], lambda: torch.zeros(1))
    visit = step.memory[0]
    assert visit.denoised.eps is visit.denoised.eps
    torch.testing.assert_close(visit.denoised.eps, denoise(visit.x, visit.t).eps)
