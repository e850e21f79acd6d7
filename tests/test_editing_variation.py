"""Variations: how much noise a strength is, and that it means the same for every sampler."""

import math

import pytest
import torch

from perrin import GaussianDiffusion, ModelMeanType, SamplerDDIM, SamplerDDPM
from perrin.editing import SamplingOptions, begun_at, time_of_strength, vary
from perrin.errors import ArgumentError, ShapeError
from perrin.oracles import GaussianData, Oracle, arbitrary
from perrin.samplers import SAMPLERS, SampleNoise, Sampler
from perrin.schedules import get_named_beta_schedule, zero_terminal_snr

DATA = GaussianData(mean=0.3, std=0.3)


def chain(
    schedule: str = "linear", total: int = 100, mean_type: ModelMeanType = ModelMeanType.START_X
) -> GaussianDiffusion:
    return GaussianDiffusion(betas=get_named_beta_schedule(schedule, total), model_mean_type=mean_type)


each_sampler = pytest.mark.parametrize("name", SAMPLERS)


# Where it begins


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("strength", [0.02, 0.5, 0.9])
def test_a_strength_is_the_share_of_noise_in_the_variance(schedule: str, strength: float) -> None:
    diffusion = chain(schedule)
    level = diffusion.level_of_batch(time_of_strength(diffusion, strength))
    assert level.sigma**2 == pytest.approx(strength, rel=1e-9)


def test_the_chain_s_ends_stand_for_what_lies_beyond() -> None:
    diffusion = chain()
    assert time_of_strength(diffusion, 1e-9) == 0
    assert time_of_strength(diffusion, 1.0) == 99


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@each_sampler
def test_every_sampler_begins_at_the_asked_noise(name: str, steps: int) -> None:
    sampler = SAMPLERS[name](chain(), steps)
    t = time_of_strength(sampler.diffusion, 0.4)
    later = begun_at(sampler, t)
    assert type(later) is type(sampler)
    assert later.times[0] == (round(t) if sampler.discrete else t)
    assert set(later.times[1:]) <= set(sampler.times)
    assert len(later.times) == max(2, sum(time <= t for time in sampler.times))


def test_a_network_of_whole_times_begins_at_one() -> None:
    sampler = SamplerDDIM(chain(mean_type=ModelMeanType.PREVIOUS_X), 10)
    assert begun_at(sampler, 40.4).times[0] == 40


def test_no_sampler_begins_before_its_own_first_time() -> None:
    sampler = SamplerDDIM(chain(), grid=(60, 30, 0))
    assert begun_at(sampler, 99).times == sampler.times
    assert begun_at(sampler, 99).times[0] == 60


# What comes out


@each_sampler
def test_a_small_strength_gives_the_example_back(name: str) -> None:
    sampler, x = SAMPLERS[name](chain(), 20), DATA.draw(3, 2, 4, seed=1)
    found = vary(sampler, Oracle(DATA, sampler.diffusion), x, strength=1e-6)[:, 0]
    first = sampler.diffusion.level_of_batch(0).sigma
    assert (found - x).abs().max() < 5 * first


def test_more_strength_takes_it_further_away() -> None:
    sampler, x = SamplerDDIM(chain(), 50), DATA.draw(500, 1, 4, seed=2)
    network = Oracle(DATA, sampler.diffusion)
    distances = [
        float((vary(sampler, network, x, strength=s)[:, 0] - x).square().mean())
        for s in (0.01, 0.1, 0.4, 0.8)
    ]
    assert distances == sorted(distances)
    assert distances[0] < 0.1 * distances[-1]


@pytest.mark.parametrize(
    ("name", "steps"), [("ddpm", 400), ("ddim", 400), ("dpm-2m", 40), ("dpm-2m-sde", 80)]
)
@pytest.mark.parametrize("strength", [0.2, 0.7])
def test_variations_of_data_are_data_as_much_like_them_as_the_noise_allows(
    name: str, steps: int, strength: float
) -> None:
    """For Gaussian data the exact correlation of x_0 and its variation is known, whatever the sampler."""
    sampler, x = SAMPLERS[name](chain(total=400), steps), DATA.draw(10_000, 1, 1, seed=3)
    options = SamplingOptions(noise_fn=lambda x, t: torch.randn(x.shape, dtype=x.dtype), clip_denoised=False)
    torch.manual_seed(0)
    found = vary(sampler, Oracle(DATA, sampler.diffusion), x, strength=strength, options=options)[:, 0]
    assert float(found.mean()) == pytest.approx(DATA.mean, abs=0.015)
    assert float(found.std()) == pytest.approx(DATA.std, rel=0.04)
    kept = (1 - strength) * DATA.std**2 / ((1 - strength) * DATA.std**2 + strength)
    expected = kept if name in ("ddpm", "dpm-2m-sde") else math.sqrt(kept)
    correlation = torch.corrcoef(torch.stack([x.flatten(), found.flatten()]))[0, 1]
    assert float(correlation) == pytest.approx(expected, abs=0.03)


def test_full_strength_without_terminal_signal_is_plain_sampling() -> None:
    betas = zero_terminal_snr(get_named_beta_schedule("linear", 20))
    sampler = SamplerDDIM(GaussianDiffusion(betas=betas, model_mean_type=ModelMeanType.START_X), 5)
    network = arbitrary(1)
    found = vary(sampler, network, torch.ones(3, 1, 4), strength=1.0, options=SamplingOptions(seed=4))[:, 0]
    noise = SampleNoise(4, range(3)).initial((3, 1, 4), "cpu")
    torch.testing.assert_close(found, sampler.sample(network, noise.shape, noise=noise))


def test_a_rough_drawing_becomes_like_the_data() -> None:
    """SDEdit: data far from the distribution end up nearer to it, the more so the more noise."""
    sampler = SamplerDDPM(chain())
    drawing = torch.full((200, 1, 1), -0.9, dtype=torch.float64)
    means = [
        float(vary(sampler, Oracle(DATA, sampler.diffusion), drawing, strength=s).mean())
        for s in (0.05, 0.5, 0.95)
    ]
    assert means == sorted(means)
    assert means[-1] == pytest.approx(DATA.mean, abs=0.08)


# Whose noise


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_a_variation_does_not_depend_on_the_others(name: str) -> None:
    sampler: Sampler = SAMPLERS[name](chain(), 5)
    network, x = arbitrary(1), DATA.draw(4, 1, 3, seed=5)
    whole = vary(sampler, network, x, strength=0.6, variations=3, options=SamplingOptions(seed=2))
    assert whole.shape == (4, 3, 1, 3)
    alone = vary(sampler, network, x[2:3], strength=0.6, options=SamplingOptions(seed=3, indices=[2]))
    torch.testing.assert_close(whole[2:3, 1:2], alone, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(whole[:, 0], whole[:, 1])


def test_what_goes_with_sampling_reaches_the_steps() -> None:
    sampler, x = SamplerDDIM(chain(), 5), DATA.draw(2, 1, 3)
    seen = []

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(y)
        return 3 * x

    def varied(**options: object) -> torch.Tensor:
        how = SamplingOptions(model_kwargs={"y": torch.tensor([1, 2])}, **options)  # type: ignore[arg-type]  # of a table of both kinds
        return vary(sampler, network, x, strength=0.5, options=how)

    clipped = varied()
    assert all(y.tolist() == [1, 2] for y in seen)
    assert clipped.abs().max() <= 1
    assert varied(clip_denoised=False).abs().max() > 1
    assert torch.equal(varied(denoised_fn=torch.zeros_like), torch.zeros(2, 1, 1, 3, dtype=x.dtype))
    pushed = varied(cond_fn=lambda x, t, y: torch.full_like(x, -30.0))
    assert (pushed <= clipped).all()
    assert not torch.equal(pushed, clipped)
    flipped = varied(guidance=(_Negated,))
    torch.testing.assert_close(flipped, torch.full_like(flipped, 0.25))


class _Negated:
    """A guidance that knows x_start to be 0.25."""

    def __init__(self, denoiser: object) -> None:
        self.base = denoiser.base  # type: ignore[attr-defined]  # a Guidable has it

    def schedule(self, t: float) -> tuple[float, float]:
        return self.base.schedule(t)

    def __call__(self, x: torch.Tensor, t: float) -> object:
        return self.base.diffusion.processed(self.base.raw(x, t), x, t, True, lambda x: 0 * x + 0.25)


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, math.nan])
def test_a_strength_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(ArgumentError, match="strength must be above 0 and at most 1, got"):
        vary(SamplerDDIM(chain()), arbitrary(1), torch.zeros(1, 1, 2), strength=strength)


def test_no_variations_and_other_indices_are_refused() -> None:
    sampler, x = SamplerDDIM(chain()), torch.zeros(2, 1, 2)
    with pytest.raises(ArgumentError, match="variations must be at least 1, got 0"):
        vary(sampler, arbitrary(1), x, strength=0.5, variations=0)
    with pytest.raises(ShapeError, match="shape must begin with 3"):
        vary(sampler, arbitrary(1), x, strength=0.5, options=SamplingOptions(indices=[0, 1, 2]))
