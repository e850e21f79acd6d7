"""Checks of calibration, with Gaussian data narrow enough that no prediction is clipped."""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from perrin.diffusion import GaussianDiffusion
from perrin.evaluation.verify.bench import Bench, Check, Finding, levels_of, worst
from perrin.likelihood import bound
from perrin.likelihood.calibration import plan, with_covariance
from perrin.likelihood.costs import Levels, Rule, fitted_covariances, fixed_large, path_nats
from perrin.likelihood.covariance import Covariance
from perrin.likelihood.statistics import Statistics, collect
from perrin.likelihood.timesteps import SPACINGS
from perrin.oracles import GaussianData, Oracle
from perrin.variance import ModelVarType

_NARROW = GaussianData(0.1, 0.15)
_TOTAL, _SCHEDULE = 100, "cosine"
_IMAGES, _DIMENSIONS = 64, 256
_BETA = Rule(fixed_large)


def fitted(bench: Bench, total: int = _TOTAL) -> tuple[GaussianDiffusion, Oracle, Tensor, Statistics]:
    """A chain of ``total`` steps, its ideal network, 64 images, and what the calibration takes from them."""
    diffusion = bench.chain(schedule=_SCHEDULE, total=total)
    network, x = Oracle(_NARROW, diffusion), bench.draw(_NARROW, _IMAGES, _DIMENSIONS)
    statistics = collect(diffusion, network, x, indices=range(_IMAGES), seed=bench.seed)
    return diffusion, network, x, statistics


def remaining(bench: Bench) -> Finding:
    """The largest relative error of E(x_0 - x^_0)^2 at any timestep, against Var[x_0 | x_t]."""
    _, _, _, statistics = fitted(bench)
    exact = [float(_NARROW.remaining_variance(*level)) for level in levels_of(_SCHEDULE, _TOTAL)[:-1]]
    ratio = statistics.squared_error.mean(0) / torch.tensor(exact, dtype=torch.float64)
    return Finding(worst(ratio - 1), 0.0, _sampling_error())


def variance(bench: Bench) -> Finding:
    """The largest relative error of the calibrated variance in a chain of 10 steps, against Var[x_s | x_t]."""
    diffusion, network, x, statistics = fitted(bench)
    kept, levels, errors = SPACINGS["even"](_TOTAL, 10), levels_of(_SCHEDULE, _TOTAL), []
    covariance = Covariance(
        *(table[kept] for table in fitted_covariances(statistics, Levels.of(diffusion))["calibrated"])
    )
    chain = with_covariance(diffusion.respaced(kept), covariance, None, kept)
    for place, (t, s) in enumerate(zip(kept, [-1, *kept[:-1]], strict=True)):
        found = chain.p_mean_variance(network, x[:1], place)["variance"]
        exact = _NARROW.previous(x[:1].double(), levels[t], levels[s])[1]
        errors.append(worst(found.double() / exact - 1))
    return Finding(worst(torch.tensor(errors)), 0.0, _sampling_error())


def whole_bound(bench: Bench) -> Finding:
    """The sum of the KL terms at all timesteps with variance beta, against that of `bound` for the same noise."""
    diffusion, network, x, statistics = fitted(bench)
    found = path_nats(statistics, Levels.of(diffusion), _BETA, range(_TOTAL))[1:].sum() / math.log(2)
    large = bench.chain(ModelVarType.FIXED_LARGE, schedule=_SCHEDULE, total=_TOTAL)
    exact = float(bound(large, network, x, indices=range(_IMAGES), seed=bench.seed).vb.mean())
    return Finding(float(found), exact, bench.within(1e-9, 1e-4))


def best_timesteps(bench: Bench) -> Finding:
    """The bound of the planned 4 of 12 timesteps, against the least of all choices of 4 that end in the last."""
    diffusion, _, _, statistics = fitted(bench, 12)
    levels = Levels.of(diffusion)
    planned = plan(statistics, levels, _BETA, 4).paths[3]
    found, *others = (
        float(path_nats(statistics, levels, _BETA, path).sum()) / math.log(2)
        for path in (planned, *((*inner, 11) for inner in combinations(range(11), 3)))
    )
    return Finding(found, min(others), 1e-12)


def spacings(bench: Bench) -> Finding:
    """By how much the best of the other spacings of 10 timesteps beats the planned one, in bits per dimension."""
    diffusion, _, _, statistics = fitted(bench)
    levels = Levels.of(diffusion)
    paths = [plan(statistics, levels, _BETA, 10).paths[9], *(make(_TOTAL, 10) for make in SPACINGS.values())]
    planned, *others = (float(path_nats(statistics, levels, _BETA, path).sum()) for path in paths)
    return Finding(max(planned - min(others), 0.0) / math.log(2), 0.0, 1e-12)


def _sampling_error() -> float:
    """Six standard errors of a mean of squares, relative: the worst of some hundred is within them."""
    return 6 * math.sqrt(2 / (_IMAGES * _DIMENSIONS))


CHECKS: dict[str, Check] = {
    "calibration: Var[x_0 | x_t]": remaining,
    "calibration: variance": variance,
    "calibration: bound of all steps": whole_bound,
    "calibration: best timesteps": best_timesteps,
    "calibration: other spacings": spacings,
}
