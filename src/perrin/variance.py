"""The variance of the reverse step: fixed tables, or read from a second half of the network's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import cast

import torch
from torch import Tensor

from perrin.tensors import Coefficient, affine


class ModelVarType(Enum):
    """Which variance the reverse step p(x_{t-1} | x_t) has."""

    LEARNED = "learned"
    FIXED_SMALL = "fixed-small"
    FIXED_LARGE = "fixed-large"
    LEARNED_RANGE = "learned-range"


Lookup = Callable[[str], Coefficient]
"""The entry of a named table at the timestep in question."""


@dataclass(frozen=True)
class FixedVariance:
    """A variance that depends on the timestep alone; the network has no extra output."""

    table: str
    log_table: str
    extra_channels: int = 0

    def log_variance(self, extra: Tensor | None, lookup: Lookup) -> Coefficient:
        """The log-variance, one number for all dimensions."""
        return lookup(self.log_table)

    def variance(self, log_variance: Coefficient, lookup: Lookup) -> Coefficient:
        """The variance: the posterior's is 0 at the first timestep, where its log is clipped."""
        return lookup(self.table)

    def ends(self, lookup: Lookup) -> None:
        """None, for there is no extra output."""

    @property
    def of_jumps(self) -> FixedVariance:
        """Itself: the tables are those of any chain."""
        return self


@dataclass(frozen=True)
class VarianceOfEach:
    """A variance of each dimension, by the network's extra output."""

    extra_channels: int = 1

    def variance(self, log_variance: Coefficient, lookup: Lookup) -> Coefficient:
        """The variance of each dimension."""
        return torch.exp(torch.as_tensor(log_variance))


@dataclass(frozen=True)
class LearnedVariance(VarianceOfEach):
    """The network's extra output is the log-variance itself."""

    def log_variance(self, extra: Tensor | None, lookup: Lookup) -> Coefficient:
        """The log-variance of each dimension."""
        return cast(Tensor, extra)  # the output was split by extra_channels

    def ends(self, lookup: Lookup) -> tuple[Coefficient, Coefficient]:
        """The extra output whose log-variance is the posterior's, clipped, and the one whose is log beta."""
        return lookup("posterior_log_variance_clipped"), lookup("log_betas")

    @property
    def of_jumps(self) -> LearnedVariance:
        """The same network's variance of steps that are longer than those it was trained on."""
        return JumpVariance()


@dataclass(frozen=True)
class JumpVariance(LearnedVariance):
    """The variance of a longer step, from the log-variance that the network's extra output is of its own step.

    Either is ``posterior_variance + posterior_mean_coef1^2 Var[x_0 | x_t]`` (Analytic-DPM, arXiv:2201.06503, eq. 8),
    by the tables of its own chain: so Var[x_0 | x_t] of what the network says. It is at most 1, as data in [-1, 1]
    have it; a network that says less than its posterior variance has told nothing of it, and it is taken to be as
    little as that. Of the noisiest steps it takes many digits to tell: there a network's may be anything up to 1,
    which matters in jumps from there to nearly clean data, in less than about ten steps.
    """

    def log_variance(self, extra: Tensor | None, lookup: Lookup) -> Coefficient:
        """The log-variance of each dimension."""
        said = cast(Tensor, extra).exp()
        gain, least = lookup("trained_posterior_mean_coef1"), lookup("trained_posterior_variance")
        unknown = affine(1 / gain**2, said, -least / gain**2)
        unknown = torch.where(unknown > 0, unknown, said).clamp_(max=1)
        return affine(lookup("posterior_mean_coef1") ** 2, unknown, lookup("posterior_variance")).log_()


@dataclass(frozen=True)
class RangedVariance(LearnedVariance):
    """The network's extra output v places the log-variance between two tables (IDDPM eq. 15).

    v = -1 is the clipped posterior log-variance and v = 1 is log beta. v is not clamped: a network may leave the
    range, and training logs how much of it does.
    """

    def log_variance(self, extra: Tensor | None, lookup: Lookup) -> Coefficient:
        """The log-variance of each dimension."""
        small, large = lookup("posterior_log_variance_clipped"), lookup("log_betas")
        return affine((large - small) / 2, cast(Tensor, extra), (large + small) / 2)

    def ends(self, lookup: Lookup) -> tuple[Coefficient, Coefficient]:
        """-1 and 1."""
        return -1.0, 1.0

    @property
    def of_jumps(self) -> RangedVariance:
        """Itself: the range is that of any chain."""
        return self


VARIANCES: dict[ModelVarType, FixedVariance | LearnedVariance] = {
    ModelVarType.LEARNED: LearnedVariance(),
    ModelVarType.LEARNED_RANGE: RangedVariance(),
    ModelVarType.FIXED_SMALL: FixedVariance("posterior_variance", "posterior_log_variance_clipped"),
    ModelVarType.FIXED_LARGE: FixedVariance("fixed_large_variance", "fixed_large_log_variance"),
}

STATE_FLOOR = 1 / 32
"""Below this a place counts as this: a network's may be negative, and is least certain where it says that it is sure.

Decoders of digits with a floor of 1 / 1024 were too narrow by 0.12 bits/dim."""


@dataclass(frozen=True)
class StateVariance(VarianceOfEach):
    """The network's extra output, read as Var[x_0 | x_t], which it makes the variance of a jump of any length.

    Its place u between ``state_low`` and ``state_low + state_span``, at least `STATE_FLOOR`, gives
    ``log Var[x_0 | x_t] = state_power log u + state_log_scale``; the variance of the step is then
    ``state_least + posterior_mean_coef1^2 Var[x_0 | x_t]``, where ``state_least`` is the posterior variance
    (arXiv:2206.07309, theorem 3) or the least of a decoder.
    """

    def log_variance(self, extra: Tensor | None, lookup: Lookup) -> Coefficient:
        """The log-variance of each dimension."""
        span = lookup("state_span")
        place = affine(1 / span, cast(Tensor, extra), -lookup("state_low") / span)
        log_cov = affine(
            lookup("state_power"), place.clamp_(min=STATE_FLOOR).log_(), lookup("state_log_scale")
        )
        return affine(lookup("posterior_mean_coef1") ** 2, log_cov.exp_(), lookup("state_least")).log_()


Variance = FixedVariance | LearnedVariance | StateVariance
