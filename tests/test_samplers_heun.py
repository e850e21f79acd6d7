"""Heun's method: what EDM's algorithms say in their own coordinates, and the noise on the way."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ideal import Ideal
from perrin import GaussianDiffusion, ModelMeanType, SamplerDDIM, get_named_beta_schedule
from perrin.errors import ArgumentError
from perrin.oracles import GaussianData, MixtureData, Oracle, arbitrary, normal
from perrin.samplers import SamplerHeun
from perrin.schedules import zero_terminal_snr

DIFFUSION = GaussianDiffusion(betas=get_named_beta_schedule("linear", 1000))
DATA = MixtureData(std=0.2)
MOST = math.sqrt(2) - 1


def edm(sampler: SamplerHeun, x: Tensor, noises: Tensor) -> Tensor:
    """EDM's algorithm 2 line by line, with y = x / alpha and n = sigma / alpha, on ``DATA``."""
    times, levels = sampler.times, Ideal(DATA, sampler.diffusion)
    steps = len(times) - 1

    def noise(t: float) -> float:
        alpha, sigma = levels.schedule(t)
        return sigma / alpha

    def denoised(y: Tensor, n: float) -> Tensor:
        alpha = 1 / math.sqrt(1 + n**2)
        return DATA.x_start(alpha * y, alpha, alpha * n)

    y = x / levels.schedule(times[0])[0]
    for i, (t, s) in enumerate(pairwise(times)):
        n, after = noise(t), noise(s)
        gamma = min(sampler.churn / steps, MOST) if sampler.churn_min <= n <= sampler.churn_max else 0.0
        raised = min(n * (1 + gamma), noise(sampler.diffusion.num_timesteps - 1))
        y = y + math.sqrt(raised**2 - n**2) * sampler.churn_noise * noises[i]
        slope = (y - denoised(y, raised)) / raised
        moved = y + (after - raised) * slope
        if after > 0:
            moved = y + (after - raised) * (slope + (moved - denoised(moved, after)) / after) / 2
        y = moved
    return y


@pytest.mark.parametrize("grid", ["karras", "uniform"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"churn": 6.0},
        {"churn": 99.0, "churn_noise": 1.007},
        {"churn": 9.0, "churn_min": 0.05, "churn_max": 50.0},
    ],
)
def test_the_samples_are_those_of_edms_algorithm(options: dict[str, float], grid: str) -> None:
    sampler, x, noises = (
        SamplerHeun(DIFFUSION, 18, grid=grid, **options),
        normal(3, 5),
        normal(18, 3, 5, seed=1),
    )
    denoise, sample, memory = Ideal(DATA, DIFFUSION), x, ()
    for i, (t, s) in enumerate(pairwise(sampler.times)):
        sample, _, memory = sampler.step(denoise, sample, t, s, lambda i=i: noises[i], memory)
    torch.testing.assert_close(sample, edm(sampler, x, noises), rtol=1e-7, atol=1e-7)
    assert denoise.calls == sampler.network_calls == 35


def test_the_grid_is_edms_unless_asked() -> None:
    assert SamplerHeun(DIFFUSION, 9).times == SamplerHeun(DIFFUSION, 9, grid="karras").times


def test_without_churn_nothing_is_drawn() -> None:
    plain, noisy = (
        SamplerHeun(DIFFUSION, 9).sample(arbitrary(1), (2, 3), noise=normal(2, 3), noise_fn=noise_fn)
        for noise_fn in (lambda x, t: torch.zeros_like(x), lambda x, t: torch.full_like(x, 9.0))
    )
    assert torch.equal(plain, noisy)


def test_noise_outside_the_churned_levels_is_not_drawn() -> None:
    sampler = SamplerHeun(DIFFUSION, 9, churn=5.0, churn_min=1.0, churn_max=2.0)
    draws = 0

    def draw() -> Tensor:
        nonlocal draws
        draws += 1
        return torch.zeros(1, 2)

    denoise = Ideal(GaussianData(), DIFFUSION)
    for t, s in pairwise(sampler.times):
        alpha, sigma = denoise.schedule(t)
        before = draws
        sampler.step(denoise, normal(1, 2), t, s, draw)
        assert draws - before == (1.0 <= sigma / alpha <= 2.0)
    assert draws > 0


def test_noise_is_raised_only_as_far_as_the_chain_goes() -> None:
    seen: list[float] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return x

    sampler = SamplerHeun(DIFFUSION, 10, grid="uniform", churn=10.0)
    sampler.sample(network, (1, 2), seed=0)
    raised = seen[::2]
    assert max(seen) == raised[0] == 999
    assert all(time > t for time, t in zip(raised[1:], sampler.times[1:-1], strict=True))


@pytest.mark.parametrize("mean_type", [ModelMeanType.PREVIOUS_X, ModelMeanType.VELOCITY])
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_churn_where_the_network_knows_whole_times_only_or_no_signal(
    mean_type: ModelMeanType, steps: int
) -> None:
    betas = zero_terminal_snr(get_named_beta_schedule("linear", 50))
    diffusion = GaussianDiffusion(betas=betas, model_mean_type=mean_type)
    sampler = SamplerHeun(diffusion, steps, churn=0.3 * steps)
    sample = sampler.sample(Oracle(GaussianData(0.3, 0.05), diffusion), (2, 500), seed=0)
    assert abs(float(sample.mean()) - 0.3) < 0.02
    plain = SamplerHeun(diffusion, steps).sample(Oracle(GaussianData(0.3, 0.05), diffusion), (2, 500), seed=0)
    assert torch.equal(sample, plain) == (steps == 1)  # from T - 1 there is nowhere to go


def test_a_step_to_half_the_noise_trusts_only_the_second_prediction() -> None:
    """With n_s = n_t / 2 the weight of the first x_start is (1 - 1/2) - (2 - 1) / 2 = 0."""
    t = DIFFUSION.time_of(0.0)
    s = DIFFUSION.time_of(2 * math.log(2))
    denoise, x = Ideal(DATA, DIFFUSION), normal(2, 3)
    (_, sigma), (alpha_s, sigma_s) = denoise.schedule(t), denoise.schedule(s)
    euler = SamplerDDIM(DIFFUSION, 5).step(denoise, x, t, s, lambda: x).sample
    found = SamplerHeun(DIFFUSION, 5).step(denoise, x, t, s, lambda: x).sample
    expected = sigma_s / sigma * x + alpha_s / 2 * DATA.x_start(euler, alpha_s, sigma_s)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"churn": -1.0}, "churn must be at least 0 and finite, got -1"),
        ({"churn": math.nan}, "churn must be at least 0 and finite, got nan"),
        ({"churn_noise": -0.1}, "churn_noise must be at least 0 and finite, got -0.1"),
        (
            {"churn_min": -1.0},
            "churn_min and churn_max must be 0 <= churn_min <= churn_max, got -1.0 and inf",
        ),
        ({"churn_min": 2.0, "churn_max": 1.0}, "got 2.0 and 1.0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        SamplerHeun(DIFFUSION, 5, **options)


def test_the_rest_of_a_churned_walk_adds_the_same_noise() -> None:
    diffusion = GaussianDiffusion(betas=get_named_beta_schedule("linear", 1000))
    sampler = SamplerHeun(diffusion, 20, churn=4.0)
    network, noise = Oracle(GaussianData(), diffusion), lambda x, t: 0.3 + 0 * x
    states = list(sampler.sample_progressive(network, (2, 3), noise=normal(2, 3), noise_fn=noise))
    rest = sampler.at_times(sampler.times[12:])
    again = rest.sample(network, (2, 3), noise=states[11]["sample"], noise_fn=noise)
    torch.testing.assert_close(again, states[-1]["sample"])
