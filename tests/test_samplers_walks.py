"""Walks of every sampler: their cost, their times, parts of them, the noise that they take, and guidance in order."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from perrin import GaussianDiffusion, ModelMeanType, SamplerDDIM, SamplerDDPM, get_named_beta_schedule
from perrin.denoiser import Time
from perrin.errors import ArgumentError
from perrin.guidance import Guided
from perrin.oracles import normal
from perrin.parameterization import Denoised
from perrin.samplers import SampleNoise, Sampler
from test_samplers import diffusion, each_sampler, network_for


@each_sampler
def test_network_calls_are_counted_honestly(make: Callable[..., Sampler]) -> None:
    calls = 0
    inner = network_for(diffusion())

    def network(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return inner(x, t)

    sampler = make(diffusion(), 7)
    sampler.sample(network, (2, 3))
    assert calls == sampler.network_calls


@each_sampler
def test_a_sampler_at_the_rest_of_its_times_goes_on_as_the_whole_one(make: Callable[..., Sampler]) -> None:
    chain = diffusion()
    network, sampler = network_for(chain), make(chain, 6)
    states = list(sampler.sample_progressive(network, (3, 4), noise_fn=lambda x, t: 0.1 * x))
    later = sampler.at_times(sampler.times[2:])
    assert later.times == sampler.times[2:]
    again = later.sample(network, (3, 4), noise=states[1]["sample"], noise_fn=lambda x, t: 0.1 * x)
    torch.testing.assert_close(again, states[-1]["sample"])


def test_a_list_of_times_is_kept_as_it_was_given() -> None:
    times = [9, 4, 0]
    sampler = SamplerDDIM(diffusion(), grid=times)
    times.append(-5)
    assert sampler == SamplerDDIM(sampler.diffusion, grid=(9, 4, 0))
    assert hash(sampler) == hash(replace(sampler))


@pytest.mark.parametrize("make", [SamplerDDIM, SamplerDDPM])
def test_noise_that_is_given_leaves_torchs_generator_alone(make: Callable[..., Sampler]) -> None:
    before = torch.get_rng_state()
    make(diffusion(), 4).sample(
        network_for(diffusion()), (2, 3), noise=normal(2, 3), noise_fn=lambda x, t: 0.1 * x
    )
    SamplerDDIM(diffusion(), 4).sample(network_for(diffusion()), (2, 3), noise=normal(2, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_noise_of_the_steps_is_none_that_the_same_seed_starts_from() -> None:
    chain = diffusion()
    start = SampleNoise(3, range(2)).initial((2, 5), "cpu")
    given = SamplerDDPM(chain, 4).sample(network_for(chain), (2, 5), noise=start, seed=3)
    torch.testing.assert_close(given, SamplerDDPM(chain, 4).sample(network_for(chain), (2, 5), seed=3))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_between_the_timesteps_of_a_shorter_chain_the_network_is_told_the_time_of_the_level(
    schedule: str,
) -> None:
    whole = GaussianDiffusion(betas=get_named_beta_schedule(schedule, 1000))
    shorter, x = whole.respaced(range(0, 1000, 111)), torch.zeros(1, 2)
    for t in (0.5, 3.25, 8.9):
        told = float(shorter.network_time(t, x))
        assert whole.level_of_batch(told).log_snr == pytest.approx(
            shorter.level_of_batch(t).log_snr, rel=1e-4, abs=1e-4
        )


def test_ancestral_sampling_rounds_a_grid_to_whole_times() -> None:
    assert any(t != int(t) for t in SamplerDDIM(diffusion(), 7, grid="karras").times)
    assert all(isinstance(t, int) for t in SamplerDDPM(diffusion(), 7, grid="karras").times)


def test_a_network_of_the_previous_x_has_whole_times_only() -> None:
    times = SamplerDDIM(diffusion(ModelMeanType.PREVIOUS_X), 7, grid="log-snr").times
    assert len(times) == 8
    assert all(isinstance(t, int) for t in times)


@each_sampler
def test_guidance_is_applied_in_order(make: Callable[..., Sampler]) -> None:
    @dataclass(frozen=True)
    class Affine(Guided):
        gain: float
        shift: float

        def raw(self, x: Tensor, t: Time) -> Denoised:
            raw = self.denoiser.raw(x, t)
            return replace(raw, x_start=self.gain * raw.x_start + self.shift)

    chain = diffusion(ModelMeanType.START_X)
    guidance = [lambda d: Affine(d, 2.0, 0.0), lambda d: Affine(d, 1.0, 0.1)]
    *_, last = make(chain, 3).sample_progressive(
        lambda x, t: torch.full_like(x, 0.2), (1, 2), guidance=guidance
    )
    torch.testing.assert_close(last["pred_xstart"], torch.full((1, 2), 0.5))


def test_single_steps_are_of_whole_times() -> None:
    sampler = SamplerDDIM(diffusion(), 7, grid="karras")
    with pytest.raises(ArgumentError, match="a single step needs a grid of whole times, got 'karras'"):
        sampler.ddim_sample(network_for(diffusion()), normal(1, 3), torch.tensor([1]))


@each_sampler
@pytest.mark.parametrize("t", [[-1, 0], [0, 3]])
def test_single_steps_refuse_a_t_out_of_range(make: Callable[..., Sampler], t: list[int]) -> None:
    sampler = make(diffusion(), 3)
    step = sampler.p_sample if hasattr(sampler, "p_sample") else sampler.ddim_sample
    with pytest.raises(ArgumentError, match="t must be from 0 to 2"):
        step(lambda x, t: x, normal(2, 2), torch.tensor(t))
