"""What a check works with and returns, and closed forms in Python floats that share no code with the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perrin.diffusion import GaussianDiffusion
from perrin.oracles import Data, GaussianData
from perrin.parameterization import ModelMeanType
from perrin.randomness import seed_of
from perrin.schedules import get_named_beta_schedule
from perrin.variance import ModelVarType

DATA = GaussianData(0.3, 0.5)
CENTRED = GaussianData(0.0, 0.5)
TOTAL = 1000

Level = tuple[float, float]


class Finding(NamedTuple):
    """What a check measured, what it should be, and how far apart the two may lie."""

    measured: float
    expected: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether they are close enough; nothing is close to NaN."""
        return abs(self.measured - self.expected) <= self.tolerance


@dataclass(frozen=True)
class Bench:
    """Where and how to compute: the device, the dtype of data and network, the seed of what is random."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def within(self, float64: float, float32: float) -> float:
        """The tolerance for the dtype.

        A quantity near 1 is known to 6e-8 in float32 and 1e-16 in float64. The tolerances allow a few tens of such
        roundings, times what a formula magnifies them by; float64 ones never ask for more than the table of closed
        forms, in Python floats, is good for: about 1e-12.
        """
        return float64 if self.dtype == torch.float64 else float32

    def tensor(self, values: Tensor | Sequence[Any]) -> Tensor:
        """``values`` on the device in the dtype."""
        exact = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)
        return exact.to(self.device, self.dtype)

    def draw(self, data: Data, *shape: int, part: int = 0) -> Tensor:
        """Of ``data``, (B, ...); others for each seed and ``part``."""
        return self.tensor(data.draw(*shape, seed=seed_of("verify", self.seed, part)))

    def chain(
        self,
        var_type: ModelVarType = ModelVarType.FIXED_SMALL,
        *,
        mean_type: ModelMeanType = ModelMeanType.EPSILON,
        schedule: str = "linear",
        total: int = TOTAL,
        levels: int | None = None,
    ) -> GaussianDiffusion:
        """A diffusion on the device, for continuous data unless ``levels`` are given."""
        chain = GaussianDiffusion(
            betas=get_named_beta_schedule(schedule, total),
            model_mean_type=mean_type,
            model_var_type=var_type,
            levels=levels,
        )
        return chain.to(self.device)


Check = Callable[[Bench], Finding]


def levels_of(schedule: str = "linear", total: int = TOTAL) -> list[Level]:
    """(alpha, sigma) of each timestep, from the betas' logarithms alone, and that of the data, (1, 0), last.

    So -1, the time of the data, indexes it.
    """
    logs = accumulate(math.log1p(-beta) for beta in get_named_beta_schedule(schedule, total).tolist())
    return [(math.exp(log / 2), math.sqrt(-math.expm1(log))) for log in logs] + [(1.0, 0.0)]


def variance_between(now: Level, before: Level) -> tuple[float, float]:
    """beta of the step from ``before`` to ``now``, and the variance of its posterior (DDPM eq. 7)."""
    beta = -math.expm1(2 * math.log(now[0] / before[0]))
    return beta, beta * (before[1] / now[1]) ** 2


def order_of(errors: Sequence[float], steps: Sequence[int]) -> float:
    """The p of the least-squares fit of error = c steps^-p."""
    xs, ys = [math.log(step) for step in steps], [math.log(error) for error in errors]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return -covariance / sum((x - x_mean) ** 2 for x in xs)


def rms(values: Tensor) -> float:
    """The root mean square of all entries."""
    return float(values.double().square().mean().sqrt())


def worst(values: Tensor) -> float:
    """The largest absolute entry; NaN if there is one."""
    return float(values.double().abs().max())
