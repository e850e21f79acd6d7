"""DDIM: its order, its inversion, its precision, and its single steps."""

import math
from collections.abc import Callable

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
from perrin.errors import ArgumentError
from perrin.oracles import GaussianData, MixtureData, Oracle, arbitrary, normal
from perrin.samplers import RoundTrip

STEPS = (10, 20, 40, 80, 160)


def chain(
    schedule: str = "linear",
    total: int = 1000,
    mean_type: ModelMeanType = ModelMeanType.EPSILON,
    var_type: ModelVarType = ModelVarType.FIXED_SMALL,
) -> GaussianDiffusion:
    return GaussianDiffusion(
        betas=get_named_beta_schedule(schedule, total), model_mean_type=mean_type, model_var_type=var_type
    )


def order(errors: list[float]) -> float:
    """The p of a fit of error = c K^-p."""
    return -float(np.polyfit(np.log(STEPS), np.log(errors), 1)[0])


def rms(error: Tensor) -> float:
    return float((error**2).mean().sqrt())


# The mathematics


@pytest.mark.parametrize("mean_type", ModelMeanType)
def test_the_measured_order_is_one(mean_type: ModelMeanType) -> None:
    data, diffusion = GaussianData(0.3, 0.5), chain(mean_type=mean_type)
    x = normal(64, 8)
    end = math.sqrt(diffusion.alphas_cumprod[-1]), math.sqrt(1 - diffusion.alphas_cumprod[-1])
    exact = data.flow(x, end, (1.0, 0.0))
    network = Oracle(data, diffusion)
    errors = [
        rms(SamplerDDIM(diffusion, steps).sample(network, (64, 8), noise=x, clip_denoised=False) - exact)
        for steps in STEPS
    ]
    assert 0.93 < order(errors) < 1.07
    assert errors[-1] < 0.01


@pytest.mark.parametrize("data", [GaussianData(0.3, 0.5), MixtureData(std=0.3)])
def test_the_round_trip_error_falls_as_one_over_steps(data: GaussianData | MixtureData) -> None:
    diffusion = chain()
    x = GaussianData(0.0, 0.5).draw(64, 8)
    trips = [SamplerDDIM(diffusion, steps).round_trip(Oracle(data, diffusion), x) for steps in STEPS]
    assert 0.85 < order([rms(trip.sample - x) for trip in trips]) < 1.15
    assert rms(trips[-1].sample - x) < 0.03


def test_the_inversion_of_data_is_the_flow_upwards() -> None:
    data, diffusion = GaussianData(0.3, 0.5), chain()
    x = data.draw(64, 8)
    end = math.sqrt(diffusion.alphas_cumprod[-1]), math.sqrt(1 - diffusion.alphas_cumprod[-1])
    noise = SamplerDDIM(diffusion, 200).invert(Oracle(data, diffusion), x)
    assert rms(noise - data.flow(x, (1.0, 0.0), end)) < 0.03


def test_round_trip_reports_the_error_of_each_example() -> None:
    diffusion = chain()
    sampler, network = SamplerDDIM(diffusion, 20), Oracle(GaussianData(), diffusion)
    x = GaussianData(std=1.5).draw(3, 2, 4)  # leaves [-1, 1]: nothing may be clipped
    trip = sampler.round_trip(network, x)
    assert isinstance(trip, RoundTrip)
    assert torch.equal(trip.noise, sampler.invert(network, x))
    again = sampler.sample(network, x.shape, noise=trip.noise, clip_denoised=False)
    assert torch.equal(trip.sample, again)
    torch.testing.assert_close(trip.rmse, ((again - x) ** 2).mean((1, 2)).sqrt())


def test_inversion_needs_no_clipping_and_can_clip() -> None:
    diffusion = chain()
    network, x = Oracle(GaussianData(), diffusion), GaussianData(std=1.5).draw(3, 8)
    clipped = SamplerDDIM(diffusion, 20).invert(network, x, clip_denoised=True)
    assert not torch.allclose(clipped, SamplerDDIM(diffusion, 20).invert(network, x), atol=1e-3)


@pytest.mark.parametrize("call", ["invert", "ddim_reverse_sample", "round_trip"])
def test_only_eta_zero_can_be_inverted(call: str) -> None:
    sampler = SamplerDDIM(chain(), 10, eta=0.5)
    arguments = (normal(1, 2), torch.tensor([0])) if call == "ddim_reverse_sample" else (normal(1, 2),)
    with pytest.raises(ArgumentError, match=r"eta must be 0, got 0\.5"):
        getattr(sampler, call)(arbitrary(1), *arguments)


# eta


@pytest.mark.parametrize("mean_type", ModelMeanType)
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_eta_one_is_ancestral_sampling_with_the_small_variance(mean_type: ModelMeanType, steps: int) -> None:
    diffusion = chain(total=30, mean_type=mean_type)
    network, noises = Oracle(GaussianData(0.1, 0.4), diffusion), normal(30, 2, 3, 4)

    def noise_fn(x: Tensor, t: int) -> Tensor:
        return noises[t]

    ancestral, ddim = (
        sampler.sample(
            network, (2, 3, 4), noise=normal(2, 3, 4, seed=1), clip_denoised=False, noise_fn=noise_fn
        )
        for sampler in (SamplerDDPM(diffusion, steps), SamplerDDIM(diffusion, steps, eta=1.0))
    )
    torch.testing.assert_close(ddim, ancestral, rtol=1e-10, atol=1e-10)


def test_eta_one_is_ancestral_also_where_x_start_is_clipped() -> None:
    diffusion = chain(total=30)
    noises, start = normal(30, 2, 3), normal(2, 3, seed=1)
    ancestral, ddim = (
        sampler.sample(arbitrary(1), (2, 3), noise=start, noise_fn=lambda x, t: noises[t])
        for sampler in (SamplerDDPM(diffusion, 9), SamplerDDIM(diffusion, 9, eta=1.0))
    )
    torch.testing.assert_close(ddim, ancestral, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps", [1, 6, 25])
def test_sampling_equals_a_loop_written_by_hand(eta: float, steps: int) -> None:
    diffusion = chain("cosine", 25)
    sampler, noises, start = SamplerDDIM(diffusion, steps, eta), normal(25, 4, 3), normal(4, 3, seed=1)
    signal = np.cumprod(1 - get_named_beta_schedule("cosine", 25))
    x, kept = start.numpy(), sampler.times[:-1]
    for i, t in enumerate(kept):
        now, then = signal[t], signal[kept[i + 1]] if i + 1 < steps else 1.0
        eps = arbitrary(1)(torch.from_numpy(x), torch.full((4,), t)).numpy()
        x_start = np.clip((x - np.sqrt(1 - now) * eps) / np.sqrt(now), -1, 1)
        eps = (x - np.sqrt(now) * x_start) / np.sqrt(1 - now)
        std = eta * np.sqrt((1 - then) / (1 - now) * (1 - now / then))
        x = np.sqrt(then) * x_start + np.sqrt(1 - then - std**2) * eps + std * noises[t].numpy()
    sample = sampler.sample(arbitrary(1), (4, 3), noise=start, noise_fn=lambda x, t: noises[t])
    torch.testing.assert_close(sample, torch.from_numpy(x), rtol=1e-9, atol=1e-9)


# Precision and channels


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_float32_steps_near_the_data_move_as_float64_ones(schedule: str) -> None:
    sampler = SamplerDDIM(chain(schedule, 4000))
    for t in range(6):
        moves = []
        for dtype in (torch.float32, torch.float64):
            step = sampler.step(
                sampler.denoiser(lambda x, t: torch.ones_like(x)),
                torch.zeros(1, 1, dtype=dtype),
                t,
                t - 1,
                lambda: torch.zeros(1, 1),
            )
            moves.append(float(step.sample))
        assert moves[0] == pytest.approx(moves[1], rel=1e-5)  # coefficients from float32 tables: 1e-3


def test_a_float32_trajectory_stays_with_the_float64_one() -> None:
    data, diffusion = GaussianData(0.2, 0.3), chain("cosine")
    network, start = Oracle(data, diffusion), normal(8, 16, dtype=torch.float32)
    full, double = (
        SamplerDDIM(diffusion).sample(network, (8, 16), noise=start.to(dtype))
        for dtype in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(full.double(), double, rtol=0, atol=2e-5)


@pytest.mark.parametrize("var_type", [ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_variance_half_of_a_network_does_not_matter(var_type: ModelVarType, eta: float) -> None:
    fixed, learned = chain(total=50), chain(total=50, var_type=var_type)
    plain, doubled = (
        SamplerDDIM(diffusion, 10, eta).sample(arbitrary(channels), (2, 3, 4, 4), seed=0)
        for diffusion, channels in ((fixed, 1), (learned, 2))
    )
    assert torch.equal(plain, doubled)


# Single steps


@pytest.mark.parametrize("mean_type", ModelMeanType)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_single_steps_with_mixed_times_equal_the_loop(mean_type: ModelMeanType, eta: float) -> None:
    diffusion = chain(total=40, mean_type=mean_type)
    sampler, x, noise = SamplerDDIM(diffusion, 8, eta), normal(8, 2, 3), normal(8, 2, 3, seed=1)
    mixed = sampler.ddim_sample(arbitrary(1), x, torch.arange(8), noise=noise)
    denoise = sampler.denoiser(arbitrary(1))
    for i, (t, s) in enumerate(zip(sampler.times[-2::-1], sampler.times[:0:-1], strict=True)):
        whole = sampler.step(denoise, x[i : i + 1], t, s, lambda i=i: noise[i : i + 1])
        for key, value in whole.state.items():
            torch.testing.assert_close(mixed[key][i : i + 1], value, rtol=1e-10, atol=1e-10)


def test_a_reverse_step_undoes_a_step_where_eps_is_constant() -> None:
    sampler, x, t = SamplerDDIM(chain(), 10), normal(9, 4), torch.arange(1, 10)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, 0.3)

    down = sampler.ddim_sample(network, x, t, clip_denoised=False)
    up = sampler.ddim_reverse_sample(network, down["sample"], t - 1, clip_denoised=False)
    torch.testing.assert_close(up["sample"], x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(up["pred_xstart"], down["pred_xstart"], rtol=1e-9, atol=1e-9)


def test_reverse_steps_are_the_inversion_from_the_first_level_on() -> None:
    diffusion = chain()
    sampler, network, x = SamplerDDIM(diffusion, 10), Oracle(GaussianData(), diffusion), normal(2, 4)
    (alpha, sigma), eps = sampler.denoiser(network).schedule(0), network(x, torch.zeros(2).long())
    climbing = alpha * x + sigma * eps
    for i in range(9):
        t = torch.full((2,), i)
        climbing = sampler.ddim_reverse_sample(network, climbing, t, clip_denoised=False)["sample"]
    torch.testing.assert_close(sampler.invert(network, x), climbing, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["ddim_sample", "ddim_reverse_sample"])
def test_single_steps_take_the_options_of_the_loop(method: str) -> None:
    sampler, x, t = SamplerDDIM(chain(mean_type=ModelMeanType.START_X), 10), normal(1, 2), torch.tensor([3])
    step: Callable[..., dict[str, Tensor]] = getattr(sampler, method)

    def network(x: Tensor, t: Tensor, level: float) -> Tensor:
        return torch.full_like(x, level)

    kwargs = {"level": 3.0}
    assert bool((step(network, x, t, model_kwargs=kwargs)["pred_xstart"] == 1).all())
    free = step(network, x, t, model_kwargs=kwargs, clip_denoised=False, denoised_fn=lambda x: x / 2)
    assert bool((free["pred_xstart"] == 1.5).all())


def test_a_single_step_without_noise_draws_it_from_torch() -> None:
    sampler, x, t = SamplerDDIM(chain(), 10, eta=1.0), normal(2, 4), torch.tensor([3, 0])
    torch.manual_seed(0)
    drawn = sampler.ddim_sample(arbitrary(1), x, t)["sample"]
    torch.manual_seed(0)
    given = sampler.ddim_sample(arbitrary(1), x, t, noise=torch.randn_like(x))["sample"]
    silent = sampler.ddim_sample(arbitrary(1), x, t, noise=torch.zeros_like(x))["sample"]
    assert torch.equal(drawn, given)
    assert torch.equal(drawn[1], silent[1])  # the last step adds none
    assert not torch.allclose(drawn[0], silent[0], atol=1e-3)


def test_the_step_above_the_last_is_the_predicted_noise() -> None:
    sampler = SamplerDDIM(chain(), 4)
    x, eps = normal(2, 2), normal(2, 2)
    up = sampler.ddim_reverse_sample(lambda x, t: eps, x, torch.tensor([3, 3]), clip_denoised=False)
    torch.testing.assert_close(up["sample"], eps)
