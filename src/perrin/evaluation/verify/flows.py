"""Checks of the probability-flow ODE: its likelihood, the order of its solver, its traces."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from perrin.denoiser import DiffusionDenoiser
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
    worst,
)
from perrin.likelihood.dequantization import Dequantization, TruncatedNormal, Uniform
from perrin.likelihood.flow import Exact, Hutchinson, Trace
from perrin.likelihood.ode import OdeLikelihood, ode
from perrin.likelihood.solvers import Adaptive, Heun, Solver
from perrin.oracles import CorrelatedData, GaussianData, MixtureData, Oracle

_ORDERS = (25, 50, 100, 200)
_LEVELS = 17
_ADAPTIVE = Adaptive(1e-5, 1e-5)


def measured(
    bench: Bench,
    data: GaussianData | MixtureData | CorrelatedData,
    x: Tensor,
    *,
    solver: Solver,
    trace: Trace | None = None,
    levels: int | None = None,
    dequantization: Dequantization | None = None,
) -> OdeLikelihood:
    """The likelihood of ``x`` under the ideal network of ``data`` with linear betas, T = 1000."""
    diffusion = bench.chain()
    return ode(
        DiffusionDenoiser(diffusion, Oracle(data, diffusion), clip_denoised=False),
        x,
        levels=levels,
        indices=range(len(x)),
        dequantization=dequantization,
        seed=bench.seed,
        solver=solver,
        trace=trace or Hutchinson(),
    )


def flow_bpd(data: GaussianData | CorrelatedData, x: Tensor, stretch: float) -> Tensor:
    """-log2 p(y) per dimension, (B,), of y = ``x``: that of the noise where the exact flow ends, and its stretch.

    ``stretch`` is the mean over dimensions of the log of d x_T / d x_0, between the first and last levels.
    """
    first, last = ends()
    x_end = data.flow(first[0] * x, first, last).double()
    nats = -0.5 * (x_end**2).flatten(1).mean(1) - 0.5 * math.log(2 * math.pi) + stretch + math.log(first[0])
    return -nats.cpu() / math.log(2)


def ends() -> tuple[Level, Level]:
    """The first and the last noise level."""
    levels = levels_of()
    return levels[0], levels[TOTAL - 1]


def gaussian(bench: Bench, *, solver: Solver, allowed: float) -> Finding:
    """The largest error of log p of Gaussian data, in bits per dimension: its scale terms, flow and divergence."""
    first, last = ends()
    x = bench.draw(DATA, 16, 3)
    stretch = 0.5 * math.log(DATA.total_variance(*last) / DATA.total_variance(*first))
    found = measured(bench, DATA, x, solver=solver).bpd - flow_bpd(DATA, x, stretch)
    return Finding(worst(found), 0.0, allowed)


def mixture_error(bench: Bench, solver: Solver) -> Tensor:
    """log p of a mixture with the first level's noise, less the exact one, (B,) in bits."""
    data, (alpha, sigma) = MixtureData(), ends()[0]
    x = bench.draw(data, 64, 1)
    exact = -data.log_prob(alpha * x, alpha, sigma) / math.log(2) - math.log2(alpha)
    return measured(bench, data, x, solver=solver).bpd - exact.cpu().double()


def heun_order(bench: Bench) -> Finding:
    """The order of Heun's method on a mixture of three components."""
    errors = [rms(mixture_error(bench, Heun(steps))) for steps in _ORDERS]
    return Finding(order_of(errors, _ORDERS), 2.0, 0.15)


def adaptive_mixture(bench: Bench) -> Finding:
    """The largest error of an image of a mixture, in bits; the chain's end is 2e-4 from noise."""
    return Finding(worst(mixture_error(bench, _ADAPTIVE)), 0.0, 1e-3)


def correlated(bench: Bench, *, trace: Trace) -> Finding:
    """The mean of -log2 p of Gaussian data whose Jacobian is not diagonal, with the exact trace or with probes.

    Within the solver's error, and five standard errors of the probes.
    """
    data, (first, last) = CorrelatedData.decaying(6, correlation=0.8), ends()
    x = bench.draw(data, 256, 6)
    total = [
        level[0] ** 2 * torch.linalg.eigvalsh(data.covariance) + level[1] ** 2 for level in (first, last)
    ]
    exact = flow_bpd(data, x, 0.5 * float((total[1] / total[0]).log().mean()))
    found = measured(bench, data, x, solver=_ADAPTIVE, trace=trace)
    error = float(found.probe_error.square().sum().sqrt()) / len(x)
    return Finding(float(found.bpd.mean()), float(exact.mean()), 1e-4 + 5 * error)


def dequantized(
    bench: Bench, *, choice: Dequantization, points: Callable[[float, float], tuple[float, float]]
) -> Finding:
    """The mean bits per dimension of data of 17 levels: E[log q - log p] over the ``points`` in each bin.

    ``points`` gives their variance and -E[log q]. Within five standard errors of the draws, and 1e-4 for the solver.
    """
    half_bin = 1 / (_LEVELS - 1)
    x = bench.draw(DATA, 128, 8).add(1).div(2 * half_bin).round().clamp(0, _LEVELS - 1) * 2 * half_bin - 1
    found = measured(bench, DATA, x, solver=_ADAPTIVE, levels=_LEVELS, dequantization=choice)
    spread, entropy = points(half_bin, found.start)
    variance = DATA.std**2 + found.start**2
    exponent = (float((x - DATA.mean).square().mean()) + spread) / (2 * variance)
    exact = (0.5 * math.log(2 * math.pi * variance) + exponent - entropy) / math.log(2)
    error = float(found.error.square().sum().sqrt()) / len(x)
    return Finding(float(found.bpd.mean()), exact, 1e-4 + 5 * error)


def uniform_points(half_bin: float, noise: float) -> tuple[float, float]:
    """Variance and entropy (nats) of points uniform in a bin."""
    return half_bin**2 / 3, math.log(2 * half_bin)


def normal_points(half_bin: float, noise: float) -> tuple[float, float]:
    """Variance and entropy (nats) of N(0, noise^2) cut at the ends of a bin (arXiv:2305.03935 section 4.2)."""
    edge = half_bin / noise
    inside = math.erf(edge / math.sqrt(2))
    cut = 2 * edge * math.exp(-0.5 * edge**2) / (math.sqrt(2 * math.pi) * inside)
    return noise**2 * (1 - cut), math.log(noise * inside) + 0.5 * (math.log(2 * math.pi) + 1 - cut)


CHECKS: dict[str, Check] = {
    "ode: Gaussian, Heun": partial(gaussian, solver=Heun(200), allowed=4e-3),
    "ode: Gaussian, adaptive": partial(gaussian, solver=Adaptive(1e-6, 1e-6), allowed=1e-5),
    "ode: order of Heun": heun_order,
    "ode: mixture, adaptive": adaptive_mixture,
    "ode: correlated, exact trace": partial(correlated, trace=Exact()),
    "ode: correlated, 8 probes": partial(correlated, trace=Hutchinson(8)),
    "ode: uniform dequantization": partial(dequantized, choice=Uniform(4), points=uniform_points),
    "ode: truncated normal": partial(
        dequantized, choice=TruncatedNormal(4, start=0.05), points=normal_points
    ),
}
