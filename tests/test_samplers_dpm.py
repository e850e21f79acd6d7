"""DPM-Solver++: its rules against the paper's formulas written out, and against an independent implementation."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ideal import Ideal
from perrin import GaussianDiffusion, ModelMeanType, SamplerDDIM, get_named_beta_schedule
from perrin.errors import ArgumentError
from perrin.oracles import MixtureData, arbitrary, normal
from perrin.samplers import Sampler, SamplerDPM, Visit

DIFFUSION = GaussianDiffusion(betas=get_named_beta_schedule("linear", 1000))
DATA, STEPS = MixtureData(std=0.2), 12


def levels(t: float) -> tuple[float, float, float]:
    """alpha, sigma and lambda."""
    alpha, sigma = DIFFUSION.level_of_batch(t)
    return alpha, sigma, math.log(alpha / sigma)


def x_start(x: Tensor, t: float) -> Tensor:
    alpha, sigma, _ = levels(t)
    return DATA.x_start(x, alpha, sigma)


def silent() -> Tensor:
    return torch.zeros(1)


def walk(sampler: Sampler, noises: Tensor | None = None) -> list[Tensor]:
    """The states from a fixed start on, one after each step, with the ideal denoiser."""
    x, memory, states = normal(3, 5), (), []
    for i, (t, s) in enumerate(pairwise(sampler.times)):
        x, _, memory = sampler.step(Ideal(DATA, DIFFUSION), x, t, s, lambda i=i: noises[i], memory)
        states.append(x)
    return states


def test_2m_is_algorithm_2() -> None:
    sampler = SamplerDPM(DIFFUSION, STEPS)
    x, before = normal(3, 5), None
    for (t, s), found in zip(list(pairwise(sampler.times))[:-1], walk(sampler), strict=False):
        (_, sigma, now), (alpha_s, sigma_s, then) = levels(t), levels(s)
        said, h = x_start(x, t), then - now
        d = said
        if before is not None:
            r = (now - before[1]) / h
            d = (1 + 1 / (2 * r)) * said - 1 / (2 * r) * before[0]
        x, before = sigma_s / sigma * x - alpha_s * math.expm1(-h) * d, (said, now)
        torch.testing.assert_close(found, x, rtol=1e-11, atol=1e-11)


def test_2s_is_algorithm_1() -> None:
    sampler, x = SamplerDPM(DIFFUSION, STEPS, solver="2s"), normal(3, 5)
    for (t, s), found in zip(list(pairwise(sampler.times))[:-1], walk(sampler), strict=False):
        (_, sigma, now), (alpha_s, sigma_s, then) = levels(t), levels(s)
        h, r = then - now, 0.5
        amid = DIFFUSION.time_of(2 * (now + r * h))
        alpha_m, sigma_m, _ = levels(amid)
        u = sigma_m / sigma * x - alpha_m * math.expm1(-r * h) * x_start(x, t)
        d = (1 - 1 / (2 * r)) * x_start(x, t) + 1 / (2 * r) * x_start(u, amid)
        x = sigma_s / sigma * x - alpha_s * math.expm1(-h) * d
        torch.testing.assert_close(found, x, rtol=1e-11, atol=1e-11)


def test_the_sde_is_solved_as_published() -> None:
    sampler, x, noises, before = (
        SamplerDPM(DIFFUSION, STEPS, solver="2m-sde"),
        normal(3, 5),
        normal(12, 3, 5),
        None,
    )
    for i, (t, s) in enumerate(list(pairwise(sampler.times))[:-1]):
        (_, sigma, now), (alpha_s, sigma_s, then) = levels(t), levels(s)
        said, h = x_start(x, t), then - now
        d = said if before is None else said + h / (now - before[1]) / 2 * (said - before[0])
        x = sigma_s / sigma * math.exp(-h) * x + alpha_s * (1 - math.exp(-2 * h)) * d
        x, before = x + sigma_s * math.sqrt(1 - math.exp(-2 * h)) * noises[i], (said, now)
    torch.testing.assert_close(walk(sampler, noises)[-2], x, rtol=1e-10, atol=1e-10)


def test_3m_integrates_the_parabola_through_three_predictions() -> None:
    sampler = SamplerDPM(DIFFUSION, STEPS, solver="3m")
    states, (t, s) = walk(sampler), sampler.times[4:6]
    (_, sigma, now), (_, sigma_s, then) = levels(t), levels(s)
    places = torch.tensor([levels(time)[2] for time in sampler.times[2:5]], dtype=torch.float64)
    said = torch.stack([x_start(x, time) for x, time in zip(states[1:4], sampler.times[2:5], strict=True)])
    curve = torch.linalg.solve(torch.stack([places**k for k in range(3)], 1), said.reshape(3, -1))
    grid = torch.linspace(now, then, 20001, dtype=torch.float64)
    values = (torch.stack([grid**k for k in range(3)], 1) @ curve).reshape(-1, 3, 5)
    integral = torch.trapezoid(grid.exp()[:, None, None] * values, grid, dim=0)
    x = sigma_s / sigma * states[3] + sigma_s * integral  # arXiv:2211.01095 eq. 8
    torch.testing.assert_close(states[4], x, rtol=1e-7, atol=1e-7)


def test_the_first_steps_know_fewer_predictions() -> None:
    ddim, second, third = (
        walk(sampler)
        for sampler in (
            SamplerDDIM(DIFFUSION, STEPS, grid="log-snr"),
            SamplerDPM(DIFFUSION, STEPS),
            SamplerDPM(DIFFUSION, STEPS, solver="3m"),
        )
    )
    torch.testing.assert_close(second[0], ddim[0])
    torch.testing.assert_close(third[1], second[1])
    assert not torch.allclose(second[1], ddim[1], atol=1e-4)
    assert not torch.allclose(third[2], second[2], atol=1e-5)


# How far predictions reach


@pytest.mark.parametrize(("longer", "used"), [(0.5, 3), (1.15, 3), (1.25, 2), (1.95, 2), (2.05, 1), (9.0, 1)])
def test_a_long_step_extrapolates_less(longer: float, used: int) -> None:
    marks = [-1.0, -0.8, -0.6, -0.6 + 0.2 * longer]
    t, s = times = [DIFFUSION.time_of(2 * mark) for mark in marks][2:]
    earlier = [DIFFUSION.time_of(2 * mark) for mark in marks[:2]]
    sampler, denoise = SamplerDPM(DIFFUSION, grid=[*earlier, *times], solver="3m"), Ideal(DATA, DIFFUSION)
    memory = tuple(Visit(time, normal(3, 5), denoise(normal(3, 5), time)) for time in reversed(earlier))
    found, *fewer = (
        sampler.step(denoise, normal(3, 5, seed=1), t, s, silent, memory[:known]).sample
        for known in (2, 0, 1, 2)
    )
    assert [torch.equal(found, each) for each in fewer] == [known >= used for known in (1, 2, 3)]


@pytest.mark.parametrize("solver", ["2m", "3m"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_uniform_times_are_no_worse_than_ddims(solver: Any, schedule: str) -> None:
    diffusion, x = GaussianDiffusion(betas=get_named_beta_schedule(schedule, 1000)), normal(8, 16)

    def final(sampler: Sampler) -> Tensor:
        state, memory = x, ()
        for t, s in pairwise(sampler.times):
            state, _, memory = sampler.step(Ideal(MixtureData(), diffusion), state, t, s, silent, memory)
        return state

    exact = final(SamplerDPM(diffusion, 500, solver="3m"))
    for steps in (6, 10, 20):
        error, ddims = (
            float((final(sampler) - exact).square().mean().sqrt())
            for sampler in (
                SamplerDPM(diffusion, steps, solver=solver, grid="uniform"),
                SamplerDDIM(diffusion, steps),
            )
        )
        assert error < ddims


# 2S in whole times, and mistakes


def test_2s_calls_the_network_at_whole_times_where_it_knows_no_others() -> None:
    diffusion = GaussianDiffusion(
        betas=get_named_beta_schedule("linear", 20), model_mean_type=ModelMeanType.PREVIOUS_X
    )
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return 0.9 * x

    sampler = SamplerDPM(diffusion, grid=[19, 11, 4, 3, 1], solver="2s")
    sampler.sample(network, (1, 2), seed=0)
    times = [int(t[0]) for t in seen]
    assert all(t.dtype is torch.int64 for t in seen)
    assert [t for t in times if t in sampler.times] == [19, 11, 4, 3, 1]
    assert len(times) == sampler.network_calls == 8  # none between 4 and 3, nor on the way to the data
    assert all(t > s for t, s in pairwise(times))


@pytest.mark.parametrize("solver", ["4m", "", "2M"])
def test_another_solver_is_refused(solver: Any) -> None:
    with pytest.raises(ArgumentError, match=f"solver must be one of 2m, 2s, 3m, 2m-sde, got '{solver}'"):
        SamplerDPM(DIFFUSION, 5, solver=solver)


def test_the_noise_of_the_sde_is_drawn_once_a_step_but_the_last() -> None:
    sampler, draws = SamplerDPM(DIFFUSION, 6, solver="2m-sde"), 0

    def draw() -> Tensor:
        nonlocal draws
        draws += 1
        return torch.zeros(2, 3)

    x, memory = normal(2, 3), ()
    for t, s in pairwise(sampler.times):
        x, _, memory = sampler.step(sampler.denoiser(arbitrary(1)), x, t, s, draw, memory)
    assert draws == 5


# An independent implementation


def theirs(scheduler: Any, sampler: Sampler, options: Callable[[int], dict[str, Any]]) -> Tensor:
    """What a scheduler of diffusers makes of the same start, at the sampler's levels."""
    denoise, x = Ideal(DATA, DIFFUSION), normal(3, 5)
    scheduler.set_timesteps(len(sampler.times) - 1)
    noise = [sigma / alpha for alpha, sigma in map(DIFFUSION.level_of_batch, sampler.times[:-1])]
    scheduler.sigmas = torch.tensor([*noise, 0.0], dtype=torch.float64)
    for i, t in enumerate(sampler.times[:-1]):
        eps = denoise(x, t).eps
        x = scheduler.step(eps, scheduler.timesteps[i], x, **options(i)).prev_sample.double()
    return x


@pytest.mark.slow  # for the import
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("solver", ["2m", "2m-sde"])
def test_the_samples_are_those_of_diffusers(solver: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++" if solver == "2m-sde" else "dpmsolver++", final_sigmas_type="zero"
    )
    sampler, noises = SamplerDPM(DIFFUSION, STEPS, solver=solver), normal(STEPS, 3, 5, seed=1)
    found = theirs(scheduler, sampler, lambda i: {"variance_noise": noises[i]} if solver == "2m-sde" else {})
    torch.testing.assert_close(walk(sampler, noises)[-1], found, rtol=0, atol=1e-5)
