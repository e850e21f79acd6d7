"""UniPC: its predictor, its corrector, and what goes from one step to the next."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ideal import Ideal
from perrin import GaussianDiffusion, get_named_beta_schedule
from perrin.errors import ArgumentError
from perrin.oracles import MixtureData, arbitrary, normal
from perrin.samplers import Memory, Sampler, SamplerDDIM, SamplerDPM, SamplerUniPC

DIFFUSION = GaussianDiffusion(betas=get_named_beta_schedule("linear", 1000))
DATA = MixtureData(std=0.2)
LEVELS = Ideal(DATA, DIFFUSION)


def walk(sampler: Sampler, x: Tensor) -> list[Tensor]:
    memory: Memory = ()
    states = []
    for t, s in pairwise(sampler.times):
        x, _, memory = sampler.step(LEVELS, x, t, s, lambda: torch.zeros(1), memory)
        states.append(x)
    return states


def half_log_snr(t: float) -> float:
    alpha, sigma = LEVELS.schedule(t)
    return math.log(alpha / sigma)


def published(x: Tensor, t: float, s: float, known: list[tuple[float, Tensor]], order: int) -> Tensor:
    """UniP, or with a prediction at ``s`` among ``known`` UniC, as in the authors' notation with B(h) = expm1(-h).

    ``known`` are times and predictions, that at ``t`` first; ``order`` of them but the first are used.
    """
    (_, sigma), (alpha_s, sigma_s) = LEVELS.schedule(t), LEVELS.schedule(s)
    h, (_, first) = half_log_snr(s) - half_log_snr(t), known[0]
    phi = [math.expm1(-h) / -h - 1]
    for k in range(2, order + 1):
        phi.append(phi[-1] / -h - 1 / math.factorial(k))
    rows = [
        ((half_log_snr(time) - half_log_snr(t)) / h, (said - first)) for time, said in known[1 : order + 1]
    ]
    r = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    b = torch.tensor(
        [phi[k] * math.factorial(k + 1) / math.expm1(-h) for k in range(order)], dtype=torch.float64
    )
    rho = torch.linalg.solve(torch.stack([r**k for k in range(order)]), b) if order > 1 else [0.5]
    moved = sigma_s / sigma * x - alpha_s * math.expm1(-h) * first
    for weight, (place, change) in zip(rho, rows, strict=True):
        moved = moved - alpha_s * math.expm1(-h) * float(weight) * change / place
    return moved


def test_the_predictor_of_order_2_is_2m() -> None:
    for grid in ("log-snr", "karras", "uniform"):
        first, second = (
            walk(sampler, normal(3, 5))
            for sampler in (
                SamplerUniPC(DIFFUSION, 12, corrector=False, grid=grid),
                SamplerDPM(DIFFUSION, 12, grid=grid),
            )
        )
        for found, expected in zip(first, second, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_the_predictor_of_order_3_is_3m() -> None:
    first, second = (
        walk(sampler, normal(3, 5))[-1]
        for sampler in (
            SamplerUniPC(DIFFUSION, 12, order=3, corrector=False),
            SamplerDPM(DIFFUSION, 12, solver="3m"),
        )
    )
    torch.testing.assert_close(first, second, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("order", [2, 3])
def test_each_step_is_predicted_and_corrected_as_published(order: Any) -> None:
    sampler, x = SamplerUniPC(DIFFUSION, 12, order=order), normal(3, 5)
    states, known = walk(sampler, x), [(sampler.times[0], LEVELS(x, sampler.times[0]).x_start)]
    for (t, s), found in zip(list(pairwise(sampler.times))[:-1], states, strict=False):
        p = min(order, len(known))
        ahead = (
            published(x, t, s, known, p - 1)
            if p != 1
            else SamplerDDIM(DIFFUSION, 9).step(LEVELS, x, t, s, None).sample
        )
        said = LEVELS(ahead, s).x_start
        x = published(x, t, s, [known[0], *known[1:p], (s, said)], p)
        torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)
        known = [(s, said), *known]


def test_the_last_state_is_what_was_said_of_the_one_before() -> None:
    sampler, seen = SamplerUniPC(DIFFUSION, 6), []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return arbitrary(1)(x, t)

    *_, before, last = sampler.sample_progressive(network, (2, 3), noise=normal(2, 3))
    assert len(seen) == sampler.network_calls == 6
    said = sampler.denoiser(arbitrary(1))(seen[-1], sampler.times[-2]).x_start
    torch.testing.assert_close(last["sample"], said)
    assert not torch.allclose(seen[-1], before["sample"], atol=1e-6)  # it was corrected since


def test_a_visit_goes_on_to_the_next_step_and_is_not_repeated() -> None:
    sampler, denoise, x = SamplerUniPC(DIFFUSION, 6), Ideal(DATA, DIFFUSION), normal(2, 3)
    memory: Memory = ()
    calls = []
    for t, s in pairwise(sampler.times):
        before = denoise.calls
        x, _, memory = sampler.step(denoise, x, t, s, lambda: normal(2, 3), memory)
        calls.append(denoise.calls - before)
        assert s == -1 or memory[0].t == s
    assert calls == [2, 1, 1, 1, 1, 0]


def test_the_state_that_is_given_is_the_corrected_one() -> None:
    plain, corrected = (walk(SamplerUniPC(DIFFUSION, 6, corrector=c), normal(2, 3))[0] for c in (False, True))
    assert not torch.allclose(plain, corrected, atol=1e-7)


@pytest.mark.parametrize("order", [1, 4, "2"])
def test_another_order_is_refused(order: Any) -> None:
    with pytest.raises(ArgumentError, match=f"order must be 2 or 3, got {order}"):
        SamplerUniPC(DIFFUSION, 5, order=order)


@pytest.mark.slow  # for the import
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_samples_are_those_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler, sampler, x = diffusers.UniPCMultistepScheduler(), SamplerUniPC(DIFFUSION, 12), normal(3, 5)
    expected = walk(sampler, x)[-1]
    scheduler.set_timesteps(12)
    noise = [sigma / alpha for alpha, sigma in map(LEVELS.schedule, sampler.times[:-1])]
    scheduler.sigmas = torch.tensor([*noise, 0.0], dtype=torch.float64)
    for i, t in enumerate(sampler.times[:-1]):
        x = scheduler.step(LEVELS(x, t).eps, scheduler.timesteps[i], x).prev_sample.double()
    torch.testing.assert_close(expected, x, rtol=0, atol=1e-5)
