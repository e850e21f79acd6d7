"""The probability-flow ODE of a denoiser, and the growth of log density along it.

With y = x / alpha and s = sigma / alpha the ODE is dy/ds = eps, and d log p(y)/ds = -div_y eps
(arXiv:2011.13456 eq. 13 and 39, in these coordinates). Here it runs over u = log s, where the chain's times are
linear between whole steps, and where the growth of the density, s div_y eps = sigma div_x eps, lies between 0 and
about D at every noise level.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from perrin.denoiser import Denoiser
from perrin.errors import ArgumentError
from perrin.randomness import seed_of
from perrin.tensors import widest_dtype

MAX_EXACT_DIMENSIONS = 1024

Vjp = Callable[[Tensor], Tensor]
"""z (B, ...) to z^T d eps / d x, of the same shape."""
Divergence = Callable[[Vjp], Tensor]
"""The divergence of eps, (B, P): one column for each probe."""


@dataclass(frozen=True)
class Timeline:
    """u = log(sigma / alpha) at the whole times of a chain, rising, for those that hold signal."""

    log_noise: tuple[float, ...]

    @classmethod
    def of(cls, denoise: Denoiser) -> Timeline:
        """The times of ``denoise``. Raises `ArgumentError` where fewer than two of them hold signal."""
        log_noise: list[float] = []
        with suppress(ArgumentError):  # a denoiser tells where its chain ends by refusing what lies beyond
            for t in count():
                alpha, sigma = (float(part) for part in denoise.schedule(t))
                if alpha == 0:
                    break
                log_noise.append(math.log(sigma / alpha))
        if len(log_noise) < 2:
            raise ArgumentError(f"the ODE needs at least 2 timesteps with signal, got {len(log_noise)}")
        return cls(tuple(log_noise))

    @property
    def first(self) -> float:
        """u at t = 0."""
        return self.log_noise[0]

    @property
    def last(self) -> float:
        """u at the noisiest time."""
        return self.log_noise[-1]

    def time(self, u: float) -> float:
        """The time of noise level ``u``, first <= u <= last: linear in log-SNR = -2 u between whole times."""
        before = min(bisect_right(self.log_noise, u), len(self.log_noise) - 1) - 1
        low, high = self.log_noise[before], self.log_noise[before + 1]
        return before + min((u - low) / (high - low), 1.0)


class Trace(Protocol):
    """How the divergence is computed."""

    @property
    def probes(self) -> int:
        """Random probes; 0 for none, which is exact."""
        ...

    def divergence(self, like: Tensor, key: tuple[int | str, ...], indices: Sequence[int]) -> Divergence:
        """The estimator for data shaped ``like`` (B, ...); its random numbers come from ``key`` and the index."""
        ...

    def vjps(self, dimensions: int) -> int:
        """Vector-Jacobian products for one divergence."""
        ...


@dataclass(frozen=True)
class Hutchinson:
    """An unbiased estimate z^T (d eps / d x) z from Rademacher probes z, fixed along the trajectory.

    Exact where the Jacobian is diagonal, whatever the probes.
    """

    probes: int = 1

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise ArgumentError(f"probes must be at least 1, got {self.probes}")

    def divergence(self, like: Tensor, key: tuple[int | str, ...], indices: Sequence[int]) -> Divergence:
        """The estimator with the probes of ``key``, one column each."""
        wide = widest_dtype(like.device)
        probes = [rademacher(like, (*key, probe), indices) for probe in range(self.probes)]
        return lambda vjp: torch.stack([(vjp(z) * z).flatten(1).sum(1, dtype=wide) for z in probes], 1)

    def vjps(self, dimensions: int) -> int:
        """One product for each probe."""
        return self.probes


@dataclass(frozen=True)
class Exact:
    """The trace itself, one vector-Jacobian product per dimension, one at a time to save memory."""

    @property
    def probes(self) -> int:
        """None."""
        return 0

    def divergence(self, like: Tensor, key: tuple[int | str, ...], indices: Sequence[int]) -> Divergence:
        """The trace, one column. Raises `ArgumentError` above `MAX_EXACT_DIMENSIONS` dimensions."""
        dimensions = like[0].numel()
        if dimensions > MAX_EXACT_DIMENSIONS:
            raise ArgumentError(
                f"the exact trace is for at most {MAX_EXACT_DIMENSIONS} dimensions, got {dimensions}: "
                "use Hutchinson probes"
            )

        def trace(vjp: Vjp) -> Tensor:
            total = torch.zeros(len(like), 1, dtype=widest_dtype(like.device), device=like.device)
            for i in range(dimensions):
                unit = torch.zeros(dimensions, dtype=like.dtype, device=like.device)
                unit[i] = 1
                total[:, 0] += vjp(unit.reshape(like.shape[1:]).expand_as(like)).flatten(1)[:, i]
            return total

        return trace

    def vjps(self, dimensions: int) -> int:
        """One product for each dimension."""
        return dimensions


class Flow:
    """The right-hand side of the ODE for a batch, counting the network's calls and the divergences.

    ``dtype`` is what the denoiser is asked in; the state y comes and goes in its own.
    """

    def __init__(
        self, denoise: Denoiser, timeline: Timeline, divergence: Divergence, dtype: torch.dtype
    ) -> None:
        self.timeline = timeline
        self.calls = 0
        self.divergences = 0
        self._denoise, self._divergence, self._dtype = denoise, divergence, dtype

    def alpha(self, u: float) -> float:
        """alpha at noise level ``u``."""
        return float(self._denoise.schedule(self.timeline.time(u))[0])

    def eps(self, y: Tensor, u: float) -> Tensor:
        """dy/ds at ``y`` (B, ...) and noise level ``u``."""
        t = self.timeline.time(u)
        self.calls += 1
        return self._denoise(self._x(y, t), t).eps.to(y.dtype)

    def eps_and_growth(self, y: Tensor, u: float) -> tuple[Tensor, Tensor]:
        """dy/ds, and -d log p/du (B, P), in nats."""
        t = self.timeline.time(u)
        self.calls += 1
        self.divergences += 1
        with torch.enable_grad():
            x = self._x(y, t).requires_grad_()
            eps = self._denoise(x, t).eps

        def vjp(z: Tensor) -> Tensor:
            found = (
                torch.autograd.grad(eps, x, z, retain_graph=True, allow_unused=True)[0]
                if eps.requires_grad
                else None
            )
            if found is None:
                raise ArgumentError(
                    "the denoiser's eps has no gradient with respect to x: "
                    "the network and cond_fn must be differentiable, without no_grad or detach"
                )
            return found

        growth = float(self._denoise.schedule(t)[1]) * self._divergence(vjp)
        return eps.detach().to(y.dtype), growth.to(y.dtype)

    def _x(self, y: Tensor, t: float) -> Tensor:
        return (y * self._denoise.schedule(t)[0]).to(self._dtype).detach()


def rademacher(like: Tensor, key: tuple[int | str, ...], indices: Sequence[int]) -> Tensor:
    """Random signs shaped like ``like`` (B, ...); a row depends on ``key`` and its index alone."""
    signs = keyed_rows(like, lambda row, generator: row.bernoulli_(0.5, generator=generator), key, indices)
    return signs.mul_(2).sub_(1)


def keyed_rows(
    like: Tensor,
    fill: Callable[[Tensor, torch.Generator], object],
    key: tuple[int | str, ...],
    indices: Sequence[int],
) -> Tensor:
    """A tensor shaped like ``like`` whose row of index i is what ``fill`` draws under (key, i)."""
    rows = torch.empty_like(like, memory_format=torch.contiguous_format)
    generator = torch.Generator(like.device)
    for row, index in zip(rows.unbind(), indices, strict=True):
        fill(row, generator.manual_seed(seed_of(*key, int(index))))
    return rows
