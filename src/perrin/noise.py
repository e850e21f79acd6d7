"""Noise levels in Python floats: x_t = alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

CLEAN = -1
"""The time of the data itself: alpha = 1, sigma = 0."""


class Level(NamedTuple):
    """How much signal and how much noise x_t holds."""

    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """log(alpha^2 / sigma^2), in nats."""
        if self.sigma == 0:
            return math.inf
        return 2 * math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf


def level_at(log_snr: float) -> Level:
    """The variance-preserving level with this log signal-to-noise ratio (VDM eq. 3)."""
    shrink = math.exp(-abs(log_snr))  # sigmoid without overflow on either side
    larger, smaller = math.sqrt(1 / (1 + shrink)), math.sqrt(shrink / (1 + shrink))
    return Level(larger, smaller) if log_snr >= 0 else Level(smaller, larger)


def level_between(first: Level, second: Level, share: float) -> Level:
    """The level a ``share`` of the way from ``first`` to ``second``, linear in log-SNR."""
    return level_at((1 - share) * first.log_snr + share * second.log_snr)


def time_between(log_snr_of: Callable[[int], float], count: int, log_snr: float) -> float:
    """The time, whole or fractional, with ``log_snr`` among ``count`` timesteps of falling ``log_snr_of``."""
    before = bisect_right(range(count), -log_snr, key=lambda t: -log_snr_of(t)) - 1
    value = log_snr_of(before)
    return before if value == log_snr else before + (value - log_snr) / (value - log_snr_of(before + 1))
