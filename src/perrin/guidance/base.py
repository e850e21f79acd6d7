"""What every guidance is: a denoiser with another raw prediction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from perrin.denoiser import DiffusionDenoiser, Guidable, Time
from perrin.parameterization import Denoised
from perrin.tensors import Coefficient

Guidance = Callable[[Guidable], Guidable]


@dataclass(frozen=True)
class Guided(ABC):
    """``denoiser`` with another raw prediction; thresholds and clipping come after, and eps is made to match."""

    denoiser: Guidable

    @property
    def base(self) -> DiffusionDenoiser:
        """The diffusion and the network beneath all guidance."""
        return self.denoiser.base

    def acting(self, t: Time) -> Guidable:
        """Itself."""
        return self

    @abstractmethod
    def raw(self, x: Tensor, t: Time) -> Denoised:
        """x_start and eps for ``x`` (B, ...) at time ``t``, before ``denoised_fn`` and clipping."""

    def __call__(self, x: Tensor, t: Time) -> Denoised:
        """x_start and eps for ``x`` (B, ...) at time ``t``."""
        return self.base.processed(self.raw(x, t), x, t)

    def schedule(self, t: Time) -> tuple[Coefficient, Coefficient]:
        """(alpha, sigma) at time ``t``, in float64."""
        return self.denoiser.schedule(t)
