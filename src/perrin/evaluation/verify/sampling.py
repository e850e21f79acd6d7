"""Checks of the samplers, with Gaussian data: there each step is affine in x and its noise, and so are the samples.

The response of a sampler to each single noise, by itself and of size 1, gives the mean and variance of what it
draws without drawing. The expected ones come from the step's formula, in Python floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from perrin.diffusion import GaussianDiffusion
from perrin.evaluation.verify.bench import (
    DATA,
    TOTAL,
    Bench,
    Check,
    Finding,
    Level,
    levels_of,
    order_of,
    rms,
    variance_between,
    worst,
)
from perrin.oracles import GaussianData, MixtureData, OptimalVariance, Oracle
from perrin.parameterization import ModelMeanType
from perrin.samplers import Sampler, SamplerDDIM, SamplerDDPM
from perrin.variance import ModelVarType

NOISE = GaussianData(0.0, 1.0)
STEPS = 20
SHARE = 0.4
"""Where LEARNED_RANGE is checked, between the posterior's variance (-1) and beta (1)."""
_ORDERS = (10, 20, 40, 80, 160)
_MEANS, _VARIANCES = 0, 1

MakeSampler = Callable[[GaussianDiffusion, int | None], Sampler]
StepVariance = Callable[[Level, Level], float]
"""The variance of a reverse step, from the levels at t and at the earlier time."""


def optimal(now: Level, before: Level) -> float:
    """Var[x_s | x_t] of ``DATA`` (arXiv:2201.06503 eq. 7)."""
    beta, small = variance_between(now, before)
    return small + (before[0] * beta / now[1] ** 2) ** 2 * float(DATA.remaining_variance(*now))


def ranged(now: Level, before: Level) -> float:
    """`SHARE` of the way in log-variance (IDDPM eq. 15)."""
    beta, small = variance_between(now, before)
    return math.exp(((1 + SHARE) * math.log(beta) + (1 - SHARE) * math.log(small)) / 2)


_VARIANCE_OF: dict[ModelVarType, StepVariance] = {
    ModelVarType.FIXED_SMALL: lambda now, before: variance_between(now, before)[1],
    ModelVarType.FIXED_LARGE: lambda now, before: variance_between(now, before)[0],
    ModelVarType.LEARNED: optimal,
    ModelVarType.LEARNED_RANGE: ranged,
}


def ancestral(
    bench: Bench, *, var_type: ModelVarType, part: int, mean_type: ModelMeanType = ModelMeanType.EPSILON
) -> Finding:
    """Mean or variance of what SamplerDDPM draws in 20 of 1000 steps."""
    diffusion = bench.chain(var_type, mean_type=mean_type)
    sampler = SamplerDDPM(diffusion, STEPS)
    extras: dict[ModelVarType, Callable[[Tensor, Tensor], Tensor]] = {
        ModelVarType.LEARNED: OptimalVariance(DATA, diffusion),
        ModelVarType.LEARNED_RANGE: lambda x, t: torch.full_like(x, SHARE),
    }
    found = moments(bench, sampler, Oracle(DATA, diffusion, extras.get(var_type)))
    return _finding(bench, found, sampler, _VARIANCE_OF[var_type], part)


def implicit(bench: Bench, *, eta: float, part: int) -> Finding:
    """Mean or variance of what SamplerDDIM draws in 20 of 1000 steps."""
    diffusion = bench.chain()
    sampler = SamplerDDIM(diffusion, STEPS, eta=eta)
    found = moments(bench, sampler, Oracle(DATA, diffusion))
    return _finding(
        bench, found, sampler, lambda now, before: eta**2 * variance_between(now, before)[1], part
    )


def moments(bench: Bench, sampler: Sampler, network: Oracle) -> tuple[float, float]:
    """Mean and variance of the samples, from the response to no noise and to each noise alone."""
    times = sampler.times[:-1]
    noises = torch.eye(len(times) + 2)[:, 1:]  # (K + 2, 1 + K): none, x_T, that of the first step, ...

    def noise_fn(x: Tensor, t: float) -> Tensor:
        return bench.tensor(noises[:, 1 + times.index(t), None])

    start = bench.tensor(noises[:, :1])
    sample = sampler.sample(network, start.shape, noise=start, clip_denoised=False, noise_fn=noise_fn)
    silent, *responses = sample.flatten().double().tolist()
    return silent, sum((response - silent) ** 2 for response in responses)


def expected_moments(
    times: tuple[float, ...], step_variance: StepVariance, *, ddim: bool
) -> tuple[float, float]:
    """Mean and variance after steps along ``times``, from x_T ~ N(0, 1)."""
    levels, mean, variance = levels_of(), 0.0, 1.0
    for t, s in pairwise(map(int, times)):
        (alpha, sigma), (alpha_s, sigma_s) = levels[t], levels[s]
        _, small = variance_between(levels[t], levels[s])
        added = 0.0 if s == -1 else step_variance(levels[t], levels[s])
        # The mean of x_s is gain x_0 + kept x_t: DDIM eq. 12, or DDPM eq. 7, which is the same for added = small.
        kept = math.sqrt(max(sigma_s**2 - (added if ddim else small), 0.0)) / sigma
        gain = alpha_s - kept * alpha
        pull = alpha * DATA.std**2 / float(DATA.total_variance(alpha, sigma))
        slope = kept + gain * pull
        mean = slope * mean + gain * (DATA.mean - pull * alpha * DATA.mean)
        variance = slope**2 * variance + added
    return mean, variance


def _finding(
    bench: Bench, found: tuple[float, float], sampler: Sampler, step_variance: StepVariance, part: int
) -> Finding:
    exact = expected_moments(sampler.times, step_variance, ddim=isinstance(sampler, SamplerDDIM))
    # In float32 each of K steps rounds x by 1e-7, and the eps of high noise is read with 157 times that.
    return Finding(found[part], exact[part], bench.within(1e-10, 2e-5))


def whole_chain(bench: Bench, *, part: int) -> Finding:
    """Mean or variance of what SamplerDDPM with the optimal variance draws in all steps: those of the data.

    They differ by what the last step leaves out, Var[x_0 | x_1], and by what x_T still knows of the data.
    """
    diffusion = bench.chain(ModelVarType.LEARNED_RANGE, total=250, schedule="cosine")
    network = Oracle(DATA, diffusion, OptimalVariance(DATA, diffusion))
    found = moments(bench, SamplerDDPM(diffusion), network)
    left_out = float(DATA.remaining_variance(*levels_of("cosine", 250)[0]))
    exact = DATA.mean, DATA.std**2 - left_out
    return Finding(found[part], exact[part], bench.within(1e-7, 4e-5))


def drawn(bench: Bench, *, sampler: MakeSampler, step_variance: StepVariance) -> Finding:
    """The variance of 64,000 seeded draws in 100 steps, within five of its standard errors."""
    diffusion, count = bench.chain(), 8 * 8000
    chosen = sampler(diffusion, 100)
    x = chosen.sample(
        Oracle(DATA, diffusion), (8, 8000), clip_denoised=False, device=bench.device, seed=bench.seed
    )
    _, exact = expected_moments(chosen.times, step_variance, ddim=isinstance(chosen, SamplerDDIM))
    return Finding(float(x.double().var()), exact, 5 * exact * math.sqrt(2 / count))


def batch_size(bench: Bench, *, sampler: MakeSampler) -> Finding:
    """The largest difference of a seed's samples when 5 are drawn, and when 3 are."""
    diffusion = bench.chain()
    five, three = (
        sampler(diffusion, 100).sample(
            Oracle(DATA, diffusion), (count, 64), device=bench.device, seed=bench.seed, clip_denoised=False
        )
        for count in (5, 3)
    )
    return Finding(worst(five[:3] - three), 0.0, 1e-5)  # seeded noise is float32 in any case


def ddim_order(bench: Bench) -> Finding:
    """The order of DDIM's error against the exact flow from noise to data."""
    diffusion, end = bench.chain(), levels_of()[TOTAL - 1]
    x = bench.draw(NOISE, 64, 8)
    errors = [
        rms(
            SamplerDDIM(diffusion, steps).sample(
                Oracle(DATA, diffusion), x.shape, noise=x, clip_denoised=False
            )
            - DATA.flow(x, end, (1.0, 0.0))
        )
        for steps in _ORDERS
    ]
    return Finding(order_of(errors, _ORDERS), 1.0, 0.05)


def inversion_order(bench: Bench) -> Finding:
    """The order of the inversion's error against the exact flow from data to noise."""
    diffusion, end = bench.chain(), levels_of()[TOTAL - 1]
    x = bench.draw(DATA, 64, 8)
    errors = [
        rms(SamplerDDIM(diffusion, steps).invert(Oracle(DATA, diffusion), x) - DATA.flow(x, (1.0, 0.0), end))
        for steps in _ORDERS
    ]
    return Finding(order_of(errors, _ORDERS), 1.0, 0.1)


def round_trip_order(bench: Bench) -> Finding:
    """The order of the error of data that are inverted and sampled again, on a mixture."""
    data, diffusion = MixtureData(std=0.3), bench.chain()
    x = bench.draw(data, 64, 8)
    errors = [
        rms(SamplerDDIM(diffusion, steps).round_trip(Oracle(data, diffusion), x).rmse) for steps in _ORDERS
    ]
    return Finding(order_of(errors, _ORDERS), 1.0, 0.15)


_MOMENTS = {"mean": _MEANS, "variance": _VARIANCES}
_SMALL = _VARIANCE_OF[ModelVarType.FIXED_SMALL]
_SAMPLERS: dict[str, tuple[MakeSampler, StepVariance]] = {
    "ddpm": (SamplerDDPM, _SMALL),
    "ddim": (SamplerDDIM, lambda now, before: 0.0),
    "ddim eta 0.5": (partial(SamplerDDIM, eta=0.5), lambda now, before: 0.25 * _SMALL(now, before)),
}

CHECKS: dict[str, Check] = {
    **{
        f"ddpm: {kind.value}, {name}": partial(ancestral, var_type=kind, part=part)
        for kind in ModelVarType
        for name, part in _MOMENTS.items()
    },
    **{
        f"ddpm: {kind.value} network, {name}": partial(
            ancestral, var_type=ModelVarType.FIXED_LARGE, mean_type=kind, part=part
        )
        for kind in ModelMeanType
        if kind is not ModelMeanType.EPSILON
        for name, part in _MOMENTS.items()
    },
    **{f"ddpm: whole chain, {name}": partial(whole_chain, part=part) for name, part in _MOMENTS.items()},
    **{
        f"ddim: eta {eta:g}, {name}": partial(implicit, eta=eta, part=part)
        for eta in (0.0, 0.5, 1.0)
        for name, part in _MOMENTS.items()
    },
    "ddim: order": ddim_order,
    "ddim: inversion, order": inversion_order,
    "ddim: round trip, order": round_trip_order,
    **{
        f"seeded: {name}, variance": partial(drawn, sampler=make, step_variance=step_variance)
        for name, (make, step_variance) in _SAMPLERS.items()
    },
    **{
        f"seeded: {name}, another batch size": partial(batch_size, sampler=make)
        for name, (make, _) in _SAMPLERS.items()
    },
}
