"""Checks of the fast solvers: each has the order it declares, the SDE's spreads as the data, inversions come back."""

from __future__ import annotations

import math
from functools import partial

from perrin.evaluation.verify.bench import DATA, Bench, Check, Finding, levels_of, order_of, rms, worst
from perrin.evaluation.verify.sampling import NOISE, moments
from perrin.oracles import MixtureData, Oracle
from perrin.samplers import SAMPLERS, FixedPoint, SamplerBDIA, SamplerDDIM, SamplerDPM
from perrin.samplers.grids import MAX_SIGMA

NARROW = MixtureData(std=0.3)
STEPS = (40, 80)
"""Enough that the leading term is most of the error, and few enough that rounding in float32 is not."""


def order(bench: Bench, *, name: str) -> Finding:
    """The order of the error against the exact flow, from much noise to the first timestep."""
    diffusion, x = bench.chain(), bench.draw(NOISE, 64, 8)
    start = (1 / math.hypot(1, MAX_SIGMA), MAX_SIGMA / math.hypot(1, MAX_SIGMA))
    exact = DATA.flow(x, start, levels_of()[0])
    errors = []
    for steps in STEPS:
        sampler = SAMPLERS[name](diffusion, steps, grid="karras")
        walk = sampler.sample_progressive(Oracle(DATA, diffusion), x.shape, noise=x, clip_denoised=False)
        *_, before_last, _ = walk
        errors.append(rms(before_last["sample"] - exact))
    return Finding(order_of(errors, STEPS), float(sampler.convergence_order or 0), 0.25)


def spread(bench: Bench) -> Finding:
    """The variance of what the SDE's rule draws in 100 steps, beside that of the data."""
    diffusion = bench.chain()
    sampler = SamplerDPM(diffusion, 100, solver="2m-sde")
    _, variance = moments(bench, sampler, Oracle(DATA, diffusion))
    return Finding(variance, DATA.std**2, 0.01 * DATA.std**2)


def exact_inversion(bench: Bench) -> Finding:
    """The largest error of data that BDIA has inverted and brought back in 20 steps."""
    diffusion, x = bench.chain(), bench.draw(NARROW, 64, 8)
    sampler, network = SamplerBDIA(diffusion, 20), Oracle(NARROW, diffusion)
    back = sampler.sample_from(network, sampler.invert(network, x))
    return Finding(worst(back - x), 0.0, bench.within(1e-11, 1e-4))


def solved_inversion(bench: Bench) -> Finding:
    """The largest error of data that DDIM brings back in 20 steps from noise found by fixed points."""
    diffusion, x = bench.chain(), bench.draw(NARROW, 64, 8)
    sampler, network = SamplerDDIM(diffusion, 20), Oracle(NARROW, diffusion)
    found = FixedPoint(sampler, tolerance=bench.within(1e-12, 1e-5)).invert(network, x)
    back = sampler.sample(network, x.shape, noise=found.noise, clip_denoised=False)
    return Finding(worst(back - x), 0.0, bench.within(1e-9, 1e-3))


SOLVERS = [name for name in SAMPLERS if name not in ("ddpm", "ddim", "dpm-2m-sde")]
"""Those of the ODE; `perrin.evaluation.verify.sampling` has the others."""

CHECKS: dict[str, Check] = {
    **{f"solver: order of {name}": partial(order, name=name) for name in SOLVERS},
    "solver: variance of dpm-2m-sde": spread,
    "inversion: bdia, round trip": exact_inversion,
    "inversion: fixed point, round trip": solved_inversion,
}
