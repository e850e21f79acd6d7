"""DEIS (arXiv:2204.13902): eps extrapolated as a polynomial in time, and integrated over sigma / alpha."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

from perrin.denoiser import Denoiser, Time
from perrin.noise import Level
from perrin.samplers.base import Draw, Memory, Sampler, Stepped
from perrin.samplers.grids import Grid
from perrin.samplers.multistep import (
    along_eps,
    check_order,
    interpolation_weights,
    level_of,
    number,
    reachable,
    visit_with_eps,
)

Order = Literal[2, 3, 4]
PANELS = 16
"""Of Simpson's rule over a step: its error is below that of the step for any number of steps."""


@dataclass(frozen=True)
class SamplerDEIS(Sampler):
    """tAB-DEIS through the last ``order`` predictions of eps; one network call a step.

    The first steps know fewer predictions and are of lower order, and so are steps that are much longer in time than
    the one before (`perrin.samplers.multistep.REACH`); the one to the data gives x_start. Raises `ArgumentError` for
    another order.
    """

    grid: Grid = field(default="log-snr", kw_only=True)
    order: Order = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(self.order, get_args(Order))

    @property
    def convergence_order(self) -> int:
        """The p of an error that falls as K^-p."""
        return self.order

    def step(
        self, denoise: Denoiser, x: Tensor, t: Time, s: Time, draw: Draw, memory: Memory = ()
    ) -> Stepped:
        """From ``x`` at time ``t`` to the earlier time ``s``."""
        now, then = level_of(denoise, t), level_of(denoise, s)
        visits = (visit_with_eps(denoise, x, t), *memory)
        known = visits[: self.order - 1] if now.alpha > 0 else ()
        places = [number(visit.t) for visit in visits]
        visits = visits[: 1 if then.sigma == 0 else reachable(places, number(s))]
        weights = self._weights(visits, number(s), now, then)
        return Stepped(along_eps(x, visits, weights, now, then), visits[0].denoised.x_start, known)

    def _weights(self, visits: Memory, s: float, now: Level, then: Level) -> list[float]:
        """By what the eps of ``visits`` enters the mean of their polynomial in time over the step's sigma / alpha."""
        if len(visits) == 1:
            return [1.0]
        t, *_ = times = [number(visit.t) for visit in visits]
        moments = self._moments(t, s, now, then)
        return interpolation_weights([(time - t) / (s - t) for time in times], moments[: len(times)])

    def _moments(self, t: float, s: float, now: Level, then: Level) -> list[float]:
        """The means of u^k, k < ``order``, where time is t + u (s - t), over sigma / alpha from ``now`` to ``then``.

        By Simpson's rule in log-SNR, where a long step is no harder than a short one.
        """
        first, length = now.log_snr, then.log_snr - now.log_snr
        inner = [self.diffusion.time_of(first + length * i / PANELS) for i in range(1, PANELS)]
        places = [0.0, *((time - t) / (s - t) for time in inner), 1.0]
        masses = [math.exp(-length * i / PANELS / 2) * _simpson(i) for i in range(PANELS + 1)]
        return [
            sum(mass * u**k for mass, u in zip(masses, places, strict=True)) / sum(masses)
            for k in range(self.order)
        ]


def _simpson(i: int) -> int:
    return 1 if i in (0, PANELS) else 2 + 2 * (i % 2)
