"""Gaussian data whose dimensions depend on each other, so that no Jacobian is diagonal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from perrin.errors import ArgumentError, ShapeError
from perrin.gaussian import LOG_2PI
from perrin.oracles.data import Data, normal, normal_log_prob


@dataclass(frozen=True, eq=False)
class CorrelatedData(Data):
    """x_0 ~ N(mean, ``covariance``), whose D dimensions are those of an example in their order.

    ``covariance`` (D, D) is symmetric and positive definite. Here the Jacobian of eps is not diagonal. Raises
    `ArgumentError` for another covariance, and `ShapeError` for examples of other than D dimensions.
    """

    covariance: Tensor
    mean: float = 0.0

    def __post_init__(self) -> None:
        covariance = self.covariance
        if (
            covariance.ndim != 2
            or not torch.equal(covariance, covariance.T)
            or bool((self._scales <= 0).any())
        ):
            raise ArgumentError("covariance must be a symmetric, positive definite matrix")

    @classmethod
    def decaying(cls, dimensions: int, *, correlation: float, std: float = 0.5) -> CorrelatedData:
        """Dimensions i and j of standard deviation ``std`` with correlation ``correlation`` to the power |i - j|."""
        place = torch.arange(dimensions, dtype=torch.float64)
        return cls(std**2 * correlation ** (place[:, None] - place).abs())

    @property
    def entropy_bpd(self) -> float:
        """The mean of `nll_bpd`, bits per dimension."""
        return 0.5 * (LOG_2PI + 1 + float(self._scales.log().mean())) / math.log(2)

    def x_start(self, x_t: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """E[x_0 | x_t], shaped like ``x_t``."""
        level, scales, total = self._along(x_t, alpha, sigma)
        return self.mean + self._filtered(x_t - alpha * self.mean, level * scales / total)

    def x_start_variance(self, x_t: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """Var[x_0 | x_t] of each dimension, shaped like ``x_t``: the diagonal of the remaining covariance."""
        level, scales, total = self._along(x_t, alpha, sigma)
        remaining: Tensor = scales * (1 - level**2 * scales / total) @ (self._axes.to(x_t) ** 2).T
        return remaining.expand(len(x_t), -1).reshape(x_t.shape)

    def score(self, x_t: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """The gradient of `log_prob`, shaped like ``x_t``."""
        return self._filtered(alpha * self.mean - x_t, 1 / self._along(x_t, alpha, sigma)[2])

    def log_prob(self, x_t: Tensor, alpha: Any = 1.0, sigma: Any = 0.0) -> Tensor:
        """log p(x_t) (B,), in nats."""
        along = self._checked(x_t - alpha * self.mean) @ self._axes.to(x_t)
        return normal_log_prob(along, self._along(x_t, alpha, sigma)[2])

    def flow(self, x: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
        """The probability-flow ODE's exact solution from level ``start`` (alpha, sigma) to ``end``."""
        before, after = (self._along(x, *level)[2] for level in (start, end))
        return end[0] * self.mean + self._filtered(x - start[0] * self.mean, (after / before).sqrt())

    def draw(self, *shape: int, seed: int = 0) -> Tensor:
        """x_0 of ``shape`` (B, ...), float64 on the CPU."""
        return self.mean + self._filtered(normal(*shape, seed=seed), self._scales.sqrt())

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        """The variances along the principal axes (D,), and the axes, one in each column."""
        scales, axes = torch.linalg.eigh(self.covariance.detach().cpu().double())
        return scales, axes

    @property
    def _scales(self) -> Tensor:
        return self._eigen[0]

    @property
    def _axes(self) -> Tensor:
        return self._eigen[1]

    def _along(self, x: Tensor, alpha: Any, sigma: Any) -> tuple[Any, Tensor, Tensor]:
        """alpha, and the variances of x_0 and of x_t along the principal axes, to broadcast against (B, D)."""
        alpha, sigma = (
            level.reshape(-1, 1) if isinstance(level, Tensor) and level.ndim else level
            for level in (alpha, sigma)
        )
        scales = self._scales.to(x)
        return alpha, scales, alpha**2 * scales + sigma**2

    def _checked(self, x: Tensor) -> Tensor:
        """``x`` as (B, D)."""
        rows = x.flatten(1)
        if rows.shape[1] != len(self._scales):
            raise ShapeError(f"examples must have {len(self._scales)} dimensions, got {tuple(x.shape[1:])}")
        return rows

    def _filtered(self, x: Tensor, factor: Tensor) -> Tensor:
        """``x`` (B, ...) with its components along the principal axes multiplied by ``factor``."""
        axes = self._axes.to(x)
        return ((self._checked(x) @ axes * factor) @ axes.T).reshape(x.shape)
