"""What classifier-free guidance and autoguidance share: away from one prediction, past another."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace

from torch import Tensor

from perrin.denoiser import Guidable, Time
from perrin.errors import ArgumentError
from perrin.guidance.base import Guided
from perrin.parameterization import Denoised
from perrin.tensors import Coefficient, mix

Interval = tuple[float, float]
"""Where to guide: low < sigma / alpha <= high."""


@dataclass(frozen=True)
class Contrasted(Guided):
    """``denoiser`` extrapolated from a weak prediction through a strong one, its own, by ``scale``.

    1 is ``denoiser`` itself, and so is every time outside ``interval``, at the cost of one plain call.

    Raises `ArgumentError` for a scale that is not finite, or an interval that is not 0 <= low < high.
    """

    scale: float
    interval: Interval | None

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ArgumentError(f"scale must be a finite number, got {self.scale}")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            raise ArgumentError(f"interval must be 0 <= low < high, of sigma / alpha, got {self.interval}")

    @abstractmethod
    def guided(self, x: Tensor, t: Time, weight: Coefficient) -> Denoised:
        """The raw prediction extrapolated by ``weight``."""

    def acting(self, t: Time) -> Guidable:
        """Itself where it extrapolates at time ``t``, else what acts beneath it."""
        weight = self._weight(t)
        return self.denoiser.acting(t) if isinstance(weight, float) and weight == 1 else self

    def raw(self, x: Tensor, t: Time) -> Denoised:
        """The prediction extrapolated where it is to be."""
        acting = self.acting(t)
        return self.guided(x, t, self._weight(t)) if acting is self else acting.raw(x, t)

    def _weight(self, t: Time) -> Coefficient:
        """``scale`` within the interval and 1 outside."""
        if self.interval is None:
            return float(self.scale)
        (low, high), (alpha, sigma) = self.interval, self.schedule(t)
        if isinstance(alpha, Tensor):
            ratio = sigma / alpha  # without signal infinite
            return 1 + (self.scale - 1) * ((low < ratio) & (ratio <= high)).to(ratio)
        return float(self.scale) if low < (sigma / alpha if alpha else math.inf) <= high else 1.0


def extrapolated(weak: Denoised, strong: Denoised, weight: Coefficient) -> Denoised:
    """``weak + weight (strong - weak)`` of all that is linear in the output; the variance is that of ``strong``."""
    previous = None
    if weak.previous is not None and strong.previous is not None:
        previous = mix(1 - weight, weak.previous, weight, strong.previous)
    return replace(
        strong,
        x_start=mix(1 - weight, weak.x_start, weight, strong.x_start),
        make_eps=lambda: mix(1 - weight, weak.eps, weight, strong.eps),
        previous=previous,
    )
