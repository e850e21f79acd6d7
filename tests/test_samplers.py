"""What both samplers share: the loop, the times, the noise and what the network is called with."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from perrin import (
    GaussianDiffusion,
    ModelMeanType,
    ModelVarType,
    SamplerDDIM,
    SamplerDDPM,
    get_named_beta_schedule,
)
from perrin.errors import ArgumentError, ShapeError
from perrin.oracles import GaussianData, Oracle, arbitrary, normal
from perrin.samplers import SampleNoise, Sampler
from perrin.schedules import zero_terminal_snr

T = 20


def diffusion(
    mean_type: ModelMeanType = ModelMeanType.EPSILON,
    var_type: ModelVarType = ModelVarType.FIXED_SMALL,
    rescale_timesteps: bool = False,
) -> GaussianDiffusion:
    return GaussianDiffusion(
        betas=get_named_beta_schedule("linear", T),
        model_mean_type=mean_type,
        model_var_type=var_type,
        rescale_timesteps=rescale_timesteps,
    )


def network_for(chain: GaussianDiffusion) -> Callable[..., Tensor]:
    return arbitrary(chain.output_channels(1))


SAMPLERS = {
    "ddpm": lambda chain, steps=None: SamplerDDPM(chain, steps),
    "ddim": lambda chain, steps=None: SamplerDDIM(chain, steps),
    "ddim-eta": lambda chain, steps=None: SamplerDDIM(chain, steps, eta=0.6),
}
each_sampler = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS.keys())


# Times


@pytest.mark.parametrize("total", [1, 2, 7, 100, 1000])
def test_times_have_the_asked_count_and_both_ends(total: int) -> None:
    chain = GaussianDiffusion(betas=np.full(total, 0.01))
    for steps in {1, 2, 3, 37, total - 1, total} & set(range(1, total + 1)):
        times = SamplerDDIM(chain, steps).times
        assert len(times) == steps + 1
        assert times[0] == total - 1
        assert times[-1] == -1
        assert steps == 1 or times[-2] == 0
        assert all(later > earlier for later, earlier in pairwise(times))


def test_steps_none_visits_every_timestep() -> None:
    assert SamplerDDPM(diffusion()).times == tuple(range(T - 1, -2, -1))


@each_sampler
@pytest.mark.parametrize("steps", [0, -1, T + 1])
def test_steps_out_of_range_are_refused(make: Callable[..., Sampler], steps: int) -> None:
    with pytest.raises(ArgumentError, match=f"steps must be from 1 to {T}, got {steps}"):
        make(diffusion(), steps)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_out_of_range_is_refused(eta: float) -> None:
    with pytest.raises(ArgumentError, match="eta"):
        SamplerDDIM(diffusion(), eta=eta)


@each_sampler
def test_the_network_sees_the_training_timesteps(make: Callable[..., Sampler]) -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x

    sampler = make(diffusion(), 6)
    sampler.sample(network, (3, 2))
    assert [t.tolist() for t in seen] == [[time] * 3 for time in sampler.times[:-1]]
    assert all(t.dtype == torch.int64 for t in seen)


@each_sampler
def test_a_respaced_diffusion_still_shows_the_training_timesteps(make: Callable[..., Sampler]) -> None:
    seen: list[int] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t[0]))
        return x

    make(diffusion().respaced([0, 3, 4, 11, 19]), 3).sample(network, (1, 2))
    assert seen == [19, 4, 0]


@each_sampler
def test_the_network_sees_rescaled_timesteps(make: Callable[..., Sampler]) -> None:
    seen: list[float] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.float32
        seen.append(float(t[0]))
        return x

    sampler = make(diffusion(rescale_timesteps=True), 6)
    sampler.sample(network, (3, 2))
    assert seen == [time * 1000 / T for time in sampler.times[:-1]]


# Noise


@each_sampler
def test_sample_i_is_the_same_for_any_batch_size(make: Callable[..., Sampler]) -> None:
    chain = diffusion()
    network = network_for(chain)
    batches = [make(chain, 5).sample(network, (size, 2, 4, 4), seed=3) for size in (1, 3, 8)]
    assert torch.equal(batches[2][:1], batches[0])
    assert torch.equal(batches[2][:3], batches[1])
    assert not torch.equal(batches[2][0], batches[2][1])


@each_sampler
@pytest.mark.parametrize("indices", [range(2, 5), np.arange(2, 5), torch.arange(2, 5)])
def test_a_chunk_of_samples_is_what_the_whole_batch_holds(
    make: Callable[..., Sampler], indices: object
) -> None:
    chain = diffusion()
    network = network_for(chain)
    whole = make(chain, 5).sample(network, (8, 7), seed=3)
    noise = SampleNoise(3, indices)
    start = noise.initial((3, 7), "cpu")
    chunk = make(chain, 5).sample(network, (3, 7), noise=start, noise_fn=noise)
    assert torch.equal(chunk, whole[2:5])


def test_sample_noise_starts_again_at_each_initial() -> None:
    noise = SampleNoise(0, range(2))
    first = noise.initial((2, 9), "cpu"), noise(torch.zeros(2, 9))
    second = noise.initial((2, 9), "cpu"), noise(torch.zeros(2, 9))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], first[1])


def test_sample_noise_is_standard_normal() -> None:
    noise = SampleNoise(0, range(64)).initial((64, 1000), "cpu")
    assert abs(float(noise.mean())) < 0.02  # 5 standard errors
    assert abs(float(noise.var()) - 1) < 0.03
    assert float(torch.corrcoef(noise).fill_diagonal_(0).abs().max()) < 0.17


def test_sample_noise_refuses_another_number_of_rows() -> None:
    with pytest.raises(ShapeError, match="shape must begin with 2"):
        SampleNoise(0, range(2)).initial((3, 4), "cpu")


@each_sampler
def test_seeds_give_other_samples(make: Callable[..., Sampler]) -> None:
    chain = diffusion()
    first, second = (make(chain, 4).sample(network_for(chain), (2, 5), seed=seed) for seed in (0, 1))
    assert not torch.allclose(first, second, atol=1e-3)


@each_sampler
def test_without_a_seed_torch_manual_seed_decides(make: Callable[..., Sampler]) -> None:
    chain = diffusion()
    sampler, samples = make(chain, 4), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        samples.append(sampler.sample(network_for(chain), (2, 5)))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    torch.manual_seed(5)
    sampler.sample(network_for(chain), (2, 5))
    assert not torch.equal(sampler.sample(network_for(chain), (2, 5)), samples[0])


@each_sampler
def test_a_seed_leaves_the_global_generator_alone(make: Callable[..., Sampler]) -> None:
    chain = diffusion()
    before = torch.get_rng_state()
    make(chain, 4).sample(network_for(chain), (2, 5), seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@each_sampler
def test_noise_fn_is_called_once_a_step_with_the_state_and_time(make: Callable[..., Sampler]) -> None:
    chain = diffusion()
    calls: list[tuple[Tensor, int]] = []

    def noise_fn(x: Tensor, t: int) -> Tensor:
        calls.append((x, t))
        return torch.zeros_like(x)

    sampler, start = make(chain, 6), normal(2, 5)
    states = list(sampler.sample_progressive(network_for(chain), (2, 5), noise=start, noise_fn=noise_fn))
    assert [t for _, t in calls] == list(sampler.times[:-1])
    for (x, _), expected in zip(calls, [start, *(state["sample"] for state in states[:-1])], strict=True):
        assert torch.equal(x, expected)


@each_sampler
def test_noise_fn_of_another_shape_is_refused(make: Callable[..., Sampler]) -> None:
    with pytest.raises(ShapeError, match="noise must have the shape of x"):
        make(diffusion(), 3).sample(network_for(diffusion()), (2, 5), noise_fn=lambda x, t: x[:1])


@each_sampler
def test_given_noise_is_the_start_and_is_not_modified(make: Callable[..., Sampler]) -> None:
    chain, start = diffusion(), normal(2, 5)
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.sin(x)

    kept = start.clone()
    sample = make(chain, 4).sample(network, (2, 5), noise=start)
    assert torch.equal(seen[0], kept)
    assert torch.equal(start, kept)
    assert sample.dtype == torch.float64


@each_sampler
def test_noise_of_another_shape_is_refused(make: Callable[..., Sampler]) -> None:
    with pytest.raises(ShapeError, match=r"\(2, 5\), got \(2, 4\)"):
        make(diffusion(), 3).sample(network_for(diffusion()), (2, 5), noise=normal(2, 4))


# The loop


@each_sampler
def test_progressive_gives_one_state_a_step_and_ends_in_the_sample(make: Callable[..., Sampler]) -> None:
    chain = diffusion()
    sampler = make(chain, 6)
    states = list(sampler.sample_progressive(network_for(chain), (2, 5), seed=2))
    assert len(states) == 6
    assert all(set(state) == {"sample", "pred_xstart"} for state in states)
    assert torch.equal(states[-1]["sample"], sampler.sample(network_for(chain), (2, 5), seed=2))
    assert torch.equal(states[-1]["sample"], states[-1]["pred_xstart"])


@each_sampler
def test_the_same_sampler_gives_the_same_samples_twice(make: Callable[..., Sampler]) -> None:
    chain = diffusion()
    sampler = make(chain, 6)
    first, second = (sampler.sample(network_for(chain), (2, 5), seed=2) for _ in range(2))
    assert torch.equal(first, second)


@each_sampler
def test_progress_shows_a_bar_and_changes_nothing(
    make: Callable[..., Sampler], capsys: pytest.CaptureFixture[str]
) -> None:
    chain = diffusion()
    plain = make(chain, 3).sample(network_for(chain), (2, 5), seed=2)
    assert capsys.readouterr().out == ""
    shown = make(chain, 3).sample(network_for(chain), (2, 5), seed=2, progress=True)
    assert "sampling" in capsys.readouterr().out
    assert torch.equal(plain, shown)


@each_sampler
@pytest.mark.parametrize("var_type", ModelVarType)
@pytest.mark.parametrize("mean_type", ModelMeanType)
def test_every_mean_and_variance_type_samples_respaced(
    make: Callable[..., Sampler], mean_type: ModelMeanType, var_type: ModelVarType
) -> None:
    chain = diffusion(mean_type, var_type)
    extra = (lambda x, t: torch.full_like(x, -2.0)) if chain.output_channels(1) == 2 else None
    sample = make(chain, 7).sample(Oracle(GaussianData(0.2, 0.1), chain, extra), (4, 1, 50, 2), seed=0)
    assert sample.shape == (4, 1, 50, 2)
    assert abs(float(sample.mean()) - 0.2) < 0.1  # the oracle's data, roughly: no mean type is misread
    assert 0.02 < float(sample.std()) < 0.5  # FIXED_LARGE is far too wide in so few steps


@each_sampler
@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 5), (3, 2, 4, 6), (3, 1, 2, 3, 4)])
def test_data_may_have_any_shape(make: Callable[..., Sampler], shape: tuple[int, ...]) -> None:
    chain = diffusion()
    flat = make(chain, 5).sample(network_for(chain), (3, int(np.prod(shape[1:]))), seed=4)
    torch.testing.assert_close(
        make(chain, 5).sample(network_for(chain), shape, seed=4).flatten(1), flat, rtol=1e-5, atol=1e-5
    )


@each_sampler
@pytest.mark.parametrize("steps", [1, 2, T])
def test_zero_terminal_snr_samples_the_data(make: Callable[..., Sampler], steps: int) -> None:
    betas = zero_terminal_snr(get_named_beta_schedule("linear", T))
    chain = GaussianDiffusion(betas=betas, model_mean_type=ModelMeanType.VELOCITY)
    sample = make(chain, steps).sample(Oracle(GaussianData(0.3, 0.05), chain), (2, 300), seed=0)
    assert bool(sample.isfinite().all())
    assert abs(float(sample.mean()) - 0.3) < 0.05


@each_sampler
def test_a_network_in_half_precision_gives_samples_in_full(make: Callable[..., Sampler]) -> None:
    chain = diffusion()
    network = network_for(chain)
    full = make(chain, 5).sample(network, (2, 9), seed=0)
    half = make(chain, 5).sample(lambda x, t: network(x, t).bfloat16(), (2, 9), seed=0)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0, atol=0.1)
    assert not torch.equal(half, half.bfloat16().float())


@each_sampler
def test_loops_keep_no_gradient(make: Callable[..., Sampler]) -> None:
    scale = torch.ones((), requires_grad=True)
    sample = make(diffusion(), 4).sample(lambda x, t: scale * x, (2, 5), noise=normal(2, 5), seed=0)
    assert not sample.requires_grad


@each_sampler
def test_model_kwargs_reach_the_network(make: Callable[..., Sampler]) -> None:
    labels = torch.tensor([0, 1])
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(y)
        return x

    make(diffusion(), 4).sample(network, (2, 5), model_kwargs={"y": labels})
    assert len(seen) == 4
    assert all(y is labels for y in seen)


@each_sampler
def test_clipping_and_denoised_fn_act_on_each_prediction_in_this_order(make: Callable[..., Sampler]) -> None:
    chain = diffusion(ModelMeanType.START_X)
    sampler = make(chain, 4)

    def last(**options: object) -> list[Tensor]:
        states = sampler.sample_progressive(lambda x, t: torch.full_like(x, 3.0), (1, 2), seed=0, **options)
        return [state["pred_xstart"] for state in states]

    assert all(bool((x == 3).all()) for x in last(clip_denoised=False))
    assert all(bool((x == 1).all()) for x in last())
    assert all(bool((x == 0.75).all()) for x in last(denoised_fn=lambda x: x / 4))
    assert all(bool((x == 1.5).all()) for x in last(denoised_fn=lambda x: x / 2, clip_denoised=False))


@each_sampler
def test_wrong_output_channels_are_refused(make: Callable[..., Sampler]) -> None:
    chain = diffusion(var_type=ModelVarType.LEARNED_RANGE)
    with pytest.raises(ShapeError, match="LEARNED_RANGE needs 6 output channels"):
        make(chain, 4).sample(lambda x, t: x, (2, 3, 4, 4))


def test_a_sampler_is_a_value() -> None:
    sampler = SamplerDDIM(diffusion(), 5)
    sampler.sample(arbitrary(1), (1, 2), seed=0)
    assert replace(sampler, steps=6).times != sampler.times


@each_sampler
def test_a_sample_is_a_tensor_of_its_own(make: Callable[..., Sampler]) -> None:
    held = normal(1, 2)
    kept = held.clone()
    sampler = make(diffusion(ModelMeanType.START_X), 3)
    *_, last = sampler.sample_progressive(lambda x, t: held, (1, 2), noise=normal(1, 2), clip_denoised=False)
    last["sample"].add_(1)
    assert torch.equal(held, kept)
    assert torch.equal(last["pred_xstart"], kept)


@each_sampler
def test_half_precision_noise_is_sampled_in_float32(make: Callable[..., Sampler]) -> None:
    sampler, noise = make(diffusion(), 3), normal(2, 2).half()

    def network(x: Tensor, t: Tensor) -> Tensor:
        return 0.1 * x

    found, expected = (
        sampler.sample(network, (2, 2), noise=start, seed=0) for start in (noise, noise.float())
    )
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
