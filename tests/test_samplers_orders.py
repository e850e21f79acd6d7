"""The fast samplers against closed forms: each one's measured order is its declared order, and its noise is right."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from ideal import Ideal
from perrin import GaussianDiffusion, ModelMeanType, SamplerDDPM, get_named_beta_schedule
from perrin.errors import ArgumentError
from perrin.oracles import GaussianData, MixtureData, Oracle, arbitrary, normal
from perrin.samplers import (
    Sampler,
    SamplerDDIM,
    SamplerDEIS,
    SamplerDPM,
    SamplerHeun,
    SamplerUniPC,
)
from perrin.schedules import zero_terminal_snr

Make = Callable[..., Sampler]

ODE: dict[str, Make] = {
    "heun": SamplerHeun,
    "2m": SamplerDPM,
    "2s": partial(SamplerDPM, solver="2s"),
    "3m": partial(SamplerDPM, solver="3m"),
    "unip-2": partial(SamplerUniPC, corrector=False),
    "unip-3": partial(SamplerUniPC, order=3, corrector=False),
    "unipc-2": SamplerUniPC,
    "unipc-3": partial(SamplerUniPC, order=3),
    "deis-2": partial(SamplerDEIS, order=2),
    "deis-3": SamplerDEIS,
    "deis-4": partial(SamplerDEIS, order=4),
}
SDE: dict[str, Make] = {
    "heun-churned": partial(SamplerHeun, churn=30.0),
    "2m-sde": partial(SamplerDPM, solver="2m-sde"),
}
ORDERS = {"heun": 2, "2m": 2, "2s": 2, "3m": 3, "unip-2": 2, "unip-3": 3, "unipc-2": 3, "unipc-3": 4} | {
    "deis-2": 2,
    "deis-3": 3,
    "deis-4": 4,
    "2m-sde": 2,
}
EVERY = ODE | SDE
each = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())
GAUSSIAN, STEPS = GaussianData(0.3, 0.5), (40, 80, 160)


def chain(name: str = "linear", total: int = 1000) -> GaussianDiffusion:
    return GaussianDiffusion(betas=get_named_beta_schedule(name, total))


def without_signal(total: int = 50) -> GaussianDiffusion:
    betas = zero_terminal_snr(get_named_beta_schedule("linear", total))
    return GaussianDiffusion(betas=betas, model_mean_type=ModelMeanType.VELOCITY)


LINEAR = chain()


def before_clean(sampler: Sampler, denoise: Ideal, x: Tensor) -> Tensor:
    """The state at the last time before CLEAN."""
    memory = ()
    for t, s in list(pairwise(sampler.times))[:-1]:
        x, _, memory = sampler.step(denoise, x, t, s, lambda: torch.zeros(1), memory)
    return x


def order(errors: list[float]) -> float:
    """The p of a fit of error = c K^-p."""
    return -float(np.polyfit(np.log(STEPS), np.log(errors), 1)[0])


def rms(error: Tensor) -> float:
    return float((error**2).mean().sqrt())


def gaussian_error(sampler: Sampler) -> float:
    denoise, x = Ideal(GAUSSIAN, LINEAR), normal(16, 8)
    start, end = (denoise.schedule(t) for t in (sampler.times[0], sampler.times[-2]))
    return rms(before_clean(sampler, denoise, x) - GAUSSIAN.flow(x, start, end))


def moments(sampler: Sampler, denoise: Ideal) -> tuple[float, float]:
    """Mean and variance of the state before CLEAN, from the response to no noise and to each noise alone.

    Each draw counts as one more noise, so that a rule may draw when it likes, as long as it does so once a step.
    """
    noises = torch.eye(len(sampler.times) + 1, dtype=torch.float64)[:, 1:]
    x, memory = noises[:, :1].clone(), ()
    for i, (t, s) in enumerate(list(pairwise(sampler.times))[:-1]):
        x, _, memory = sampler.step(denoise, x, t, s, lambda i=i: noises[:, i + 1, None], memory)
    silent, *responses = x.flatten().tolist()
    return silent, sum((response - silent) ** 2 for response in responses)


# Orders


@pytest.mark.parametrize("name", ODE)
def test_the_measured_order_is_the_declared_one(name: str) -> None:
    samplers = [ODE[name](LINEAR, steps, grid="karras") for steps in STEPS]
    assert all(sampler.convergence_order == ORDERS[name] for sampler in samplers)
    errors = [gaussian_error(sampler) for sampler in samplers]
    assert order(errors) == pytest.approx(ORDERS[name], abs=0.15)
    assert errors[-1] < 5e-4


def test_ddim_is_of_first_order_by_the_same_measure() -> None:
    errors = [gaussian_error(SamplerDDIM(LINEAR, steps, grid="karras")) for steps in STEPS]
    assert order(errors) == pytest.approx(1, abs=0.1)


@pytest.fixture(scope="module")
def mixture() -> tuple[Ideal, Tensor, Tensor]:
    """A mixture, noise, and where the ODE takes it by the first time of the chain."""
    denoise, x = Ideal(MixtureData(std=0.3), LINEAR), normal(4, 8)
    return denoise, x, before_clean(SamplerUniPC(LINEAR, 700, order=3), denoise, x)


@pytest.mark.parametrize("name", ODE)
def test_the_order_holds_where_the_denoiser_is_not_linear(
    name: str, mixture: tuple[Ideal, Tensor, Tensor]
) -> None:
    denoise, x, exact = mixture
    errors = [rms(before_clean(ODE[name](LINEAR, k, grid="log-snr"), denoise, x) - exact) for k in STEPS]
    assert order(errors) == pytest.approx(ORDERS[name], abs=0.25)


@pytest.mark.parametrize("p", [2, 3])
def test_the_corrector_adds_one_order(p: int) -> None:
    plain, corrected = (
        order([gaussian_error(SamplerUniPC(LINEAR, k, order=p, corrector=c, grid="karras")) for k in STEPS])
        for c in (False, True)
    )
    assert corrected - plain == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("grid", ["log-snr", "karras"])
def test_the_variance_of_the_sde_converges_with_the_declared_order(grid: str) -> None:
    denoise, errors = Ideal(GAUSSIAN, LINEAR), []
    for steps in STEPS:
        sampler = SamplerDPM(LINEAR, steps, solver="2m-sde", grid=grid)
        alpha, sigma = denoise.schedule(sampler.times[-2])
        mean, variance = moments(sampler, denoise)
        assert mean == pytest.approx(alpha * GAUSSIAN.mean, abs=1e-4)
        errors.append(abs(variance - GAUSSIAN.total_variance(alpha, sigma)))
    assert order(errors) == pytest.approx(sampler.convergence_order, abs=0.2)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", SDE)
def test_noise_on_the_way_leaves_the_marginals(name: str, schedule: str) -> None:
    diffusion = chain(schedule)
    denoise, sampler = Ideal(GAUSSIAN, diffusion), SDE[name](diffusion, 200, grid="log-snr")
    alpha, sigma = denoise.schedule(sampler.times[-2])
    mean, variance = moments(sampler, denoise)
    assert mean == pytest.approx(alpha * GAUSSIAN.mean, abs=1e-3)
    assert variance == pytest.approx(GAUSSIAN.total_variance(alpha, sigma), rel=0.01)


def test_ancestral_sampling_leaves_the_marginals() -> None:
    diffusion = chain(total=2000)
    denoise = Ideal(GAUSSIAN, diffusion)
    alpha, sigma = denoise.schedule(0)
    mean, variance = moments(SamplerDDPM(diffusion), denoise)
    assert mean == pytest.approx(alpha * GAUSSIAN.mean, abs=1e-3)
    assert variance == pytest.approx(GAUSSIAN.total_variance(alpha, sigma), rel=0.01)


# Steps


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("mean_type", [ModelMeanType.VELOCITY, ModelMeanType.PREVIOUS_X])
@pytest.mark.parametrize("terminal", [False, True])
@each
def test_network_calls_are_counted(make: Make, steps: int, mean_type: ModelMeanType, terminal: bool) -> None:
    betas = get_named_beta_schedule("linear", 12)
    betas = zero_terminal_snr(betas) if terminal else betas
    diffusion, calls = GaussianDiffusion(betas=betas, model_mean_type=mean_type), 0

    def network(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 0.5 * x

    sampler = make(diffusion, steps)
    sampler.sample(network, (2, 3), seed=0)
    assert calls == sampler.network_calls


@each
def test_one_step_is_one_call_and_gives_x_start(make: Make) -> None:
    denoise, sampler = Ideal(GAUSSIAN, LINEAR), make(LINEAR, 1)
    step = sampler.step(denoise, normal(3, 4), sampler.times[0], -1, lambda: normal(3, 4))
    assert denoise.calls == sampler.network_calls == 1
    torch.testing.assert_close(step.sample, torch.full_like(step.sample, 0.3), rtol=0, atol=0.02)


@each
def test_the_step_to_the_data_gives_x_start(make: Make) -> None:
    *_, last = make(LINEAR, 6).sample_progressive(Oracle(GAUSSIAN, LINEAR), (3, 4), noise=normal(3, 4))
    assert torch.equal(last["sample"], last["pred_xstart"])


@each
def test_a_step_asks_for_one_time_for_the_whole_batch(make: Make) -> None:
    sampler = make(LINEAR, 3)
    t, s = torch.tensor([[5], [5]]), torch.tensor([[3], [3]])
    with pytest.raises(
        ArgumentError, match=r"t must be one number for the whole batch, got a tensor \(2, 1\)"
    ):
        sampler.step(sampler.denoiser(arbitrary(1)), normal(2, 3), t, s, lambda: normal(2, 3))


@each
def test_a_step_changes_nothing_that_it_is_given(make: Make) -> None:
    sampler, denoise, x = make(LINEAR, 6), Ideal(GAUSSIAN, LINEAR), normal(3, 4)
    first = sampler.step(denoise, x, *sampler.times[:2], lambda: normal(3, 4, seed=1))
    kept = [first.sample.clone(), *(visit.denoised.x_start.clone() for visit in first.memory)]
    arguments = denoise, first.sample, *sampler.times[1:3], lambda: normal(3, 4, seed=2), first.memory
    second, again = sampler.step(*arguments), sampler.step(*arguments)
    assert torch.equal(second.sample, again.sample)
    held = [first.sample, *(visit.denoised.x_start for visit in first.memory)]
    assert all(torch.equal(now, before) for now, before in zip(held, kept, strict=True))
    assert torch.equal(x, normal(3, 4))


@each
def test_samples_depend_neither_on_the_batch_nor_on_earlier_calls(make: Make) -> None:
    sampler, network = make(chain("cosine", 50), 7), arbitrary(1)
    eight, three, again = (sampler.sample(network, (size, 2, 4), seed=3) for size in (8, 3, 8))
    assert torch.equal(eight[:3], three)
    assert torch.equal(eight, again)


@each
def test_the_memory_is_no_longer_than_a_rule_needs(make: Make) -> None:
    sampler, denoise, x, memory = make(LINEAR, 12), Ideal(GAUSSIAN, LINEAR), normal(1, 2), ()
    for t, s in pairwise(sampler.times):
        x, _, memory = sampler.step(denoise, x, t, s, lambda: normal(1, 2), memory)
        assert len(memory) <= 3


# Chains


@pytest.mark.parametrize("grid", ["uniform", "quadratic", "trailing", "log-snr", "karras"])
@pytest.mark.parametrize("total", [1000, 4000])
@each
def test_cosine_chains_are_sampled_on_every_grid(make: Make, total: int, grid: str) -> None:
    data, diffusion = GaussianData(0.2, 0.1), chain("cosine", total)
    sample = make(diffusion, 12, grid=grid).sample(Oracle(data, diffusion), (2, 200), seed=0)
    assert bool(sample.isfinite().all())
    assert abs(float(sample.mean()) - 0.2) < 0.1


@pytest.mark.parametrize("grid", ["uniform", "log-snr"])
@pytest.mark.parametrize("name", ODE)
def test_as_many_steps_as_the_chain_has_follow_the_flow(name: str, grid: str) -> None:
    diffusion, x = chain("linear", 300), normal(2, 8)
    sampler, denoise = ODE[name](diffusion, 300, grid=grid), Ideal(GAUSSIAN, diffusion)
    start, end = (denoise.schedule(t) for t in (sampler.times[0], sampler.times[-2]))
    torch.testing.assert_close(
        before_clean(sampler, denoise, x), GAUSSIAN.flow(x, start, end), rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("grid", ["uniform", "trailing", "log-snr", "karras"])
@each
def test_the_first_step_from_pure_noise_is_ddims(make: Make, grid: str) -> None:
    diffusion, x = without_signal(), normal(3, 4)
    network = Oracle(GAUSSIAN, diffusion)
    sampler = make(diffusion, 6, grid=grid)
    states = list(sampler.sample_progressive(network, x.shape, noise=x, noise_fn=lambda x, t: 0 * x))
    if "sde" not in getattr(sampler, "solver", ""):
        ddim = SamplerDDIM(diffusion, grid=sampler.times)
        first = next(iter(ddim.sample_progressive(network, x.shape, noise=x)))
        torch.testing.assert_close(states[0]["sample"], first["sample"])
    later = sampler.at_times(sampler.times[1:])  # the visit without signal is not used for what follows
    if not getattr(sampler, "churn", 0):
        rest = later.sample(network, x.shape, noise=states[0]["sample"], noise_fn=lambda x, t: 0 * x)
        torch.testing.assert_close(states[-1]["sample"], rest)
    assert bool(states[-1]["sample"].isfinite().all())


@each
def test_a_chain_without_signal_at_its_end_gives_the_data(make: Make) -> None:
    data, diffusion = GaussianData(0.3, 0.05), without_signal()
    for steps in (1, 2, 20):
        sample = make(diffusion, steps).sample(Oracle(data, diffusion), (2, 400), seed=0)
        assert abs(float(sample.mean()) - 0.3) < 0.02


@each
def test_respaced_chains_are_sampled(make: Make) -> None:
    short = LINEAR.respaced(range(0, 1000, 27))
    sample = make(short, 20).sample(Oracle(GaussianData(0.3, 0.2), LINEAR), (2, 2000), seed=0)
    assert abs(float(sample.mean()) - 0.3) < 0.03
    assert 0.15 < float(sample.std()) < 0.3


@each
def test_a_float32_path_stays_with_the_float64_one(make: Make) -> None:
    diffusion, x = chain("cosine"), normal(4, 8)
    network = Oracle(GaussianData(0.2, 0.3), diffusion)
    single, double = (
        make(diffusion, 30).sample(network, (4, 8), noise=x.to(dtype), noise_fn=lambda x, t: 0.1 * x)
        for dtype in (torch.float32, torch.float64)
    )
    assert double.dtype is torch.float64
    torch.testing.assert_close(single.double(), double, rtol=0, atol=2e-5)
