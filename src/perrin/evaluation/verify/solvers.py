"""Checks of the solvers of the ODE: the measured order of the error is the one that each declares."""

from __future__ import annotations

import math
from functools import partial

from perrin.evaluation.verify.bench import DATA, Bench, Check, Finding, levels_of, order_of, rms
from perrin.oracles import GaussianData, Oracle
from perrin.samplers import SAMPLERS
from perrin.samplers.grids import MAX_SIGMA

NOISE = GaussianData(0.0, 1.0)
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


SOLVERS = [name for name in SAMPLERS if name not in ("ddpm", "ddim", "dpm-2m-sde")]
"""Those of the ODE; `perrin.evaluation.verify.sampling` has the others."""

CHECKS: dict[str, Check] = {f"solver: order of {name}": partial(order, name=name) for name in SOLVERS}
