"""Distributions of x_0, and what is known of x_0 from a noisy x_t, in closed form.

A level is the pair (alpha, sigma) of x_t = alpha x_0 + sigma eps, of numbers or of tensors that broadcast against
x_t (B, ...), which may be on any device and in any dtype. Densities are in nats, summed over the dimensions of an
example, unless the name says bpd.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from perrin.gaussian import LOG_2PI


class Data(ABC):
    """A distribution of x_0, and what is known of it from a noisy x_t."""

    @abstractmethod
    def x_start(self, x_t: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """E[x_0 | x_t], shaped like ``x_t``."""

    @abstractmethod
    def x_start_variance(self, x_t: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """Var[x_0 | x_t] of each dimension, shaped like ``x_t``."""

    @abstractmethod
    def score(self, x_t: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """The gradient of `log_prob` with respect to x_t, shaped like ``x_t``."""

    @abstractmethod
    def log_prob(self, x_t: Tensor, alpha: Any = 1.0, sigma: Any = 0.0) -> Tensor:
        """log p(x_t) (B,), in nats; by default of x_0."""

    @abstractmethod
    def draw(self, *shape: int, seed: int = 0) -> Tensor:
        """x_0 of ``shape`` (B, ...), float64 on the CPU; the same for the same seed."""

    def eps(self, x_t: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """E[eps | x_t] = -sigma score, shaped like ``x_t`` (Tweedie's formula)."""
        eps: Tensor = -sigma * self.score(x_t, alpha, sigma)
        return eps

    def nll_bpd(self, x_start: Tensor) -> Tensor:
        """-log2 p(x_0) per dimension, (B,)."""
        return -self.log_prob(x_start) / (max(x_start[0].numel(), 1) * math.log(2))

    def previous(self, x_t: Tensor, now: tuple[Any, Any], before: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        """Mean and variance of x_s given x_t, each shaped like ``x_t``; levels ``now`` of t, ``before`` of s < t.

        These are the moments of the best Gaussian reverse step: q(x_s | x_t, x_0) (DDPM eq. 7) over what x_0 may
        be (arXiv:2201.06503 eq. 7). x_s given x_t is itself Gaussian for Gaussian data only.
        """
        (alpha, sigma), (alpha_s, sigma_s) = now, before
        beta = sigma**2 - (alpha / alpha_s) ** 2 * sigma_s**2
        gain = alpha_s * beta / sigma**2
        mean = gain * self.x_start(x_t, alpha, sigma) + alpha / alpha_s * (sigma_s / sigma) ** 2 * x_t
        return mean, sigma_s**2 * beta / sigma**2 + gain**2 * self.x_start_variance(x_t, alpha, sigma)


@dataclass(frozen=True)
class GaussianData(Data):
    """x_0 ~ N(mean, std^2) in each dimension."""

    mean: float = 0.0
    std: float = 0.5

    @property
    def entropy_bpd(self) -> float:
        """The mean of `nll_bpd`: the code length of x_0 at unit precision, bits per dimension."""
        return 0.5 * math.log2(2 * math.pi * math.e * self.std**2)

    def x_start(self, x_t: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """E[x_0 | x_t], shaped like ``x_t``."""
        gain = alpha * self.std**2 / self.total_variance(alpha, sigma)
        x_start: Tensor = self.mean + gain * (x_t - alpha * self.mean)
        return x_start

    def x_start_variance(self, x_t: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """`remaining_variance`, shaped like ``x_t``."""
        variance: Tensor = torch.zeros_like(x_t) + self.remaining_variance(alpha, sigma)
        return variance

    def score(self, x_t: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """The gradient of `log_prob`, shaped like ``x_t``."""
        score: Tensor = (alpha * self.mean - x_t) / self.total_variance(alpha, sigma)
        return score

    def log_prob(self, x_t: Tensor, alpha: Any = 1.0, sigma: Any = 0.0) -> Tensor:
        """log p(x_t) (B,), in nats."""
        return normal_log_prob(x_t - alpha * self.mean, self.total_variance(alpha, sigma))

    def total_variance(self, alpha: Any, sigma: Any) -> Any:
        """Var[x_t]."""
        return alpha**2 * self.std**2 + sigma**2

    def remaining_variance(self, alpha: Any, sigma: Any) -> Any:
        """Var[x_0 | x_t], which is the same for any x_t."""
        return self.std**2 * sigma**2 / self.total_variance(alpha, sigma)

    def flow(self, x: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
        """The probability-flow ODE's exact solution from level ``start`` (alpha, sigma) to ``end``."""
        stretch = math.sqrt(self.total_variance(*end) / self.total_variance(*start))
        return end[0] * self.mean + stretch * (x - start[0] * self.mean)

    def draw(self, *shape: int, seed: int = 0) -> Tensor:
        """x_0 of ``shape`` (B, ...), float64 on the CPU."""
        return self.mean + self.std * normal(*shape, seed=seed)


@dataclass(frozen=True)
class MixtureData(Data):
    """x_0 ~ an even mixture of N(mean, std^2) in each dimension."""

    means: tuple[float, ...] = (-0.7, 0.1, 0.6)
    std: float = 0.1

    @property
    def mean(self) -> float:
        """E[x_0]."""
        return sum(self.means) / len(self.means)

    def x_start(self, x_t: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """E[x_0 | x_t], shaped like ``x_t``."""
        return self._over_parts([part.x_start(x_t, alpha, sigma) for part in self._parts], x_t, alpha, sigma)

    def x_start_variance(self, x_t: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """Var[x_0 | x_t], shaped like ``x_t``: within the components, and between their means."""
        means = [part.x_start(x_t, alpha, sigma) for part in self._parts]
        mean = self._over_parts(means, x_t, alpha, sigma)
        between = self._over_parts([(each - mean) ** 2 for each in means], x_t, alpha, sigma)
        return self._parts[0].x_start_variance(x_t, alpha, sigma) + between

    def score(self, x_t: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """The gradient of `log_prob`, shaped like ``x_t``."""
        return self._over_parts([part.score(x_t, alpha, sigma) for part in self._parts], x_t, alpha, sigma)

    def log_prob(self, x_t: Tensor, alpha: Any = 1.0, sigma: Any = 0.0) -> Tensor:
        """log p(x_t) (B,), in nats."""
        variance = torch.as_tensor(self._parts[0].total_variance(alpha, sigma)).to(x_t)
        heights = self._exponents(x_t, alpha, sigma).logsumexp(0) - math.log(len(self.means))
        return _sum_flat(heights - 0.5 * (LOG_2PI + variance.log()))

    def total_variance(self, alpha: Any, sigma: Any) -> Any:
        """Var[x_t]."""
        between = sum((mean - self.mean) ** 2 for mean in self.means) / len(self.means)
        return alpha**2 * (self.std**2 + between) + sigma**2

    def draw(self, *shape: int, seed: int = 0) -> Tensor:
        """x_0 of ``shape`` (B, ...), float64 on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        component = torch.randint(len(self.means), shape, generator=generator)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return torch.tensor(self.means, dtype=torch.float64)[component] + self.std * noise

    @cached_property
    def _parts(self) -> list[GaussianData]:
        return [GaussianData(mean, self.std) for mean in self.means]

    def _exponents(self, x_t: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """The exponent of each component's density at x_t, (components, B, ...); their variances are equal."""
        variance = self._parts[0].total_variance(alpha, sigma)
        return torch.stack([-0.5 * (x_t - alpha * mean) ** 2 / variance for mean in self.means])

    def _over_parts(self, values: Sequence[Tensor], x_t: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """The mean of ``values``, one for each component, weighted by how probable it is given x_t."""
        return (torch.softmax(self._exponents(x_t, alpha, sigma), 0) * torch.stack(list(values))).sum(0)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A reproducible standard normal draw, on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def normal_log_prob(x: Tensor, variance: Any) -> Tensor:
    """log N(x; 0, variance) (B,), in nats."""
    variance = torch.as_tensor(variance, dtype=x.dtype, device=x.device)
    return _sum_flat(-0.5 * (x**2 / variance + variance.log() + LOG_2PI))


def _sum_flat(nats: Tensor) -> Tensor:
    return nats.flatten(1).sum(1) if nats.ndim > 1 else nats
