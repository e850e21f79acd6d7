"""BDIA: its order, its exact inverse, and what it does at the ends."""

import numpy as np
import pytest
import torch
from torch import Tensor

from perrin import GaussianDiffusion, ModelMeanType, SamplerDDIM, get_named_beta_schedule
from perrin.errors import ArgumentError
from perrin.networks import UNet
from perrin.oracles import GaussianData, MixtureData, Oracle, arbitrary, normal
from perrin.samplers.base import Visit
from perrin.samplers.bdia import DATA_STD, BDIAState, SamplerBDIA

STEPS = (10, 20, 40, 80)


def chain(
    schedule: str = "linear", total: int = 1000, mean_type: ModelMeanType = ModelMeanType.EPSILON
) -> GaussianDiffusion:
    return GaussianDiffusion(
        betas=get_named_beta_schedule(schedule, total), model_mean_type=mean_type, levels=None
    )


def rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def largest(error: Tensor) -> float:
    return float(error.abs().max())


class Counted:
    """A network that counts its calls."""

    def __init__(self, network) -> None:
        self.network, self.calls = network, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.network(x, t)


# Sampling


def order(errors: list[float]) -> float:
    """The p of a fit of error = c K^-p."""
    return -float(np.polyfit(np.log(STEPS), np.log(errors), 1)[0])


def test_the_measured_order_is_two() -> None:
    data, diffusion, x = GaussianData(0.3, 0.5), chain("cosine"), normal(64, 8)
    network, errors = Oracle(data, diffusion), []
    for steps in STEPS:
        sampler = SamplerBDIA(diffusion, steps, grid="log-snr")
        exact = data.flow(x, diffusion.level_of_batch(sampler.times[0]), (1.0, 0.0))
        errors.append(rms(sampler.sample(network, x.shape, noise=x, clip_denoised=False) - exact))
    assert 1.85 < order(errors) < 2.15
    assert errors[-1] < 1e-3


def test_the_error_is_far_below_that_of_ddim() -> None:
    data, diffusion, x = GaussianData(0.3, 0.5), chain(), normal(64, 8)
    network, exact = Oracle(data, diffusion), data.flow(x, diffusion.level_of_batch(999), (1.0, 0.0))
    ours, theirs = (
        rms(make(diffusion, 50).sample(network, x.shape, noise=x, clip_denoised=False) - exact)
        for make in (SamplerBDIA, SamplerDDIM)
    )
    assert 20 * ours < theirs


def test_gamma_zero_is_ddim() -> None:
    diffusion, x = chain(), normal(3, 2, 4)
    network = Oracle(MixtureData(), diffusion)
    plain = SamplerDDIM(diffusion, 15, grid="log-snr").sample(network, x.shape, noise=x)
    still = SamplerBDIA(diffusion, 15, gamma=0.0).sample(network, x.shape, noise=x)
    torch.testing.assert_close(still, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_a_step_is_the_papers_in_x_over_its_standard_deviation(gamma: float) -> None:
    diffusion, (x_u, x_t) = chain(), normal(2, 3, 2)
    u, t, s = 700, 500, 320
    network = Oracle(MixtureData(), diffusion)
    sampler = SamplerBDIA(diffusion, 10, gamma=gamma)
    denoise = sampler.denoiser(network, clip_denoised=False)
    found = sampler.step(denoise, x_t, t, s, lambda: x_t, (Visit(u, x_u, denoise(x_u, u)),))
    level = {time: diffusion.level_of_batch(time) for time in (u, t, s)}
    std = {time: ((a * DATA_STD) ** 2 + b**2) ** 0.5 for time, (a, b) in level.items()}
    eps = network(x_t, torch.full((3,), t))
    x_start = (x_t - level[t].sigma * eps) / level[t].alpha
    z_u, z_t = x_u / std[u], x_t / std[t]

    def delta(end: int) -> Tensor:
        return (level[end].alpha * x_start + level[end].sigma * eps) / std[end] - z_t

    z_s = gamma * z_u + (1 - gamma) * z_t - gamma * delta(u) + delta(s)
    torch.testing.assert_close(found.sample, std[s] * z_s, rtol=1e-9, atol=1e-9)
    assert [visit.t for visit in found.memory] == [t]


def test_one_network_call_a_step() -> None:
    diffusion, x = chain(total=100), normal(2, 3)
    sampler, network = SamplerBDIA(diffusion, 12), Counted(Oracle(MixtureData(), diffusion))
    sampler.sample(network, x.shape, noise=x)
    assert network.calls == sampler.network_calls == 12
    state = sampler.invert(network, x)
    assert network.calls == 24
    sampler.sample_from(network, state)
    assert network.calls == 35


# Inversion


@pytest.mark.parametrize(
    ("steps", "mean_type"),
    [(1000, ModelMeanType.EPSILON), *((steps, kind) for steps in (2, 20) for kind in ModelMeanType)],
)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_data_come_back_up_to_rounding(mean_type: ModelMeanType, schedule: str, steps: int) -> None:
    diffusion, x = chain(schedule, mean_type=mean_type), MixtureData().draw(16, 4)
    sampler, network = SamplerBDIA(diffusion, steps), Oracle(MixtureData(), diffusion)
    state = sampler.invert(network, x)
    assert largest(sampler.sample_from(network, state) - x) < 1e-12
    assert steps == 2 or 0.7 < rms(state.latest) < 1.3


def small_unet() -> UNet:
    torch.manual_seed(0)
    network = UNet(
        8, in_channels=1, channels=8, channel_mult=(1,), num_res_blocks=1, attention_levels=(), num_heads=1
    )
    for parameter in network.parameters():  # the last layers begin at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
@pytest.mark.parametrize("clip", [False, True])
def test_data_come_back_from_a_network_that_is_ideal_for_nothing(dtype, bound: float, clip: bool) -> None:
    sampler, network = SamplerBDIA(chain(), 50, grid="log-snr"), small_unet().to(dtype)
    x = normal(4, 1, 8, 8).to(dtype)
    state = sampler.invert(network, x, clip_denoised=clip)
    assert state.latest.dtype == dtype
    back = sampler.sample_from(network, state, clip_denoised=clip)
    assert largest(back - x) < bound
    other = sampler.sample_from(network, state, clip_denoised=not clip)
    assert largest(other - x) > 0.01


def test_inversion_follows_the_flow_to_second_order() -> None:
    data, diffusion, errors = GaussianData(0.3, 0.5), chain("cosine"), []
    x, network = data.draw(64, 8), Oracle(data, diffusion)
    for steps in STEPS:
        sampler = SamplerBDIA(diffusion, steps, grid="log-snr")
        exact = data.flow(x, (1.0, 0.0), diffusion.level_of_batch(sampler.times[0]))
        errors.append(rms(sampler.invert(network, x).latest - exact))
    assert 1.85 < order(errors) < 2.15


def test_guided_data_come_back() -> None:
    diffusion, x = chain(), MixtureData().draw(8, 4)
    sampler, network = SamplerBDIA(diffusion, 20), Oracle(MixtureData(), diffusion)

    def pull(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 - x

    state = sampler.invert(network, x, cond_fn=pull)
    assert largest(sampler.sample_from(network, state, cond_fn=pull) - x) < 1e-12
    assert largest(sampler.sample_from(network, state) - x) > 0.01


def test_a_single_state_and_ddims_step_from_it_are_what_sample_walks() -> None:
    diffusion, x = chain(), normal(4, 3)
    sampler, network = SamplerBDIA(diffusion, 20), Oracle(MixtureData(), diffusion)
    denoise = sampler.denoiser(network, clip_denoised=False)
    before = SamplerDDIM(diffusion, 20).step(denoise, x, *sampler.times[:2], lambda: x).sample
    walked = sampler.sample_from(network, BDIAState(x, before))
    torch.testing.assert_close(sampler.sample(network, x.shape, noise=x, clip_denoised=False), walked)


def test_an_inversion_does_not_depend_on_the_batch() -> None:
    diffusion, x = chain(), MixtureData().draw(5, 4)
    sampler, network = SamplerBDIA(diffusion, 20), Oracle(MixtureData(), diffusion)
    whole, alone = sampler.invert(network, x), sampler.invert(network, x[2:3])
    for one, other in zip(whole, alone, strict=True):
        torch.testing.assert_close(one[2:3], other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_a_gamma_out_of_range_is_refused(gamma: float) -> None:
    with pytest.raises(ArgumentError, match="gamma must be from 0 to 1, got"):
        SamplerBDIA(chain(), 10, gamma=gamma)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": 10, "gamma": 0.5}, r"gamma must be 1 .* got 0\.5"), ({"steps": 1}, "at least 2 .* got 1")],
)
def test_what_is_not_exactly_invertible_is_refused(options: dict, message: str) -> None:
    sampler, x = SamplerBDIA(chain(), **options), normal(1, 2)
    with pytest.raises(ArgumentError, match=message):
        sampler.invert(arbitrary(1), x)
    with pytest.raises(ArgumentError, match=message):
        sampler.sample_from(arbitrary(1), BDIAState(x, x))
