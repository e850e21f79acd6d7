"""Heun's method (EDM, arXiv:2206.00364): two network calls a step, and noise added on the way if asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Self

from torch import Tensor

from perrin.denoiser import Denoiser, Time
from perrin.errors import ArgumentError
from perrin.noise import CLEAN
from perrin.samplers.base import Draw, Memory, Sampler, Stepped
from perrin.samplers.grids import Grid
from perrin.samplers.multistep import level_of, ode_shares, weighted
from perrin.tensors import mix


@dataclass(frozen=True)
class SamplerHeun(Sampler):
    """EDM's sampler, in its coordinates x / alpha and n = sigma / alpha; deterministic unless ``churn`` > 0.

    With ``churn`` (S_churn) each step whose n is from ``churn_min`` to ``churn_max`` first raises n by the share
    churn / K, at most sqrt(2) - 1 and only as far as the chain's last timestep, with noise of standard deviation
    ``churn_noise`` (S_noise). The step from where there is no signal, and the one to the data, are Euler's. Steps
    over which n falls to less than half do not go well: take 15 or more. Raises `ArgumentError` for options out of
    range.
    """

    grid: Grid = field(default="karras", kw_only=True)
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0

    @property
    def convergence_order(self) -> int:
        """The p of an error that falls as K^-p, without churn."""
        return 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.churn < math.inf:
            raise ArgumentError(f"churn must be at least 0 and finite, got {self.churn}")
        if not 0 <= self.churn_min <= self.churn_max:
            raise ArgumentError(
                f"churn_min and churn_max must be 0 <= churn_min <= churn_max, got {self.churn_min} and "
                f"{self.churn_max}"
            )
        if not 0 <= self.churn_noise < math.inf:
            raise ArgumentError(f"churn_noise must be at least 0 and finite, got {self.churn_noise}")

    def at_times(self, times: Sequence[float]) -> Self:
        """This rule on other ``times``, with the same share of noise added in each step."""
        later = super().at_times(times)
        return replace(later, churn=self.churn * (len(later.times) - 1) / (len(self.times) - 1))

    @property
    def network_calls(self) -> int:
        """Two a step, but one from where there is no signal and one to the data."""
        return sum(
            1 if s == CLEAN or self.diffusion.level_of_batch(t).alpha == 0 else 2
            for t, s in pairwise(self.times)
        )

    def step(
        self, denoise: Denoiser, x: Tensor, t: Time, s: Time, draw: Draw, memory: Memory = ()
    ) -> Stepped:
        """From ``x`` at time ``t`` to the earlier time ``s`` (EDM alg. 2; alg. 1 without churn)."""
        x, t = self._churned(denoise, x, t, draw)
        now, then = level_of(denoise, t), level_of(denoise, s)
        x_start = denoise(x, t).x_start
        kept, gained = ode_shares(now, then)
        sample = mix(kept, x, gained, x_start)  # line 8
        if then.sigma == 0 or now.alpha == 0:
            return Stepped(sample, x_start)
        # Line 11, with eps read from x_start before and after: half of the change of eps, over the step of n.
        half = then.alpha / 2 * (now.sigma / now.alpha * then.alpha / then.sigma - 1)
        corrected = weighted([sample, denoise(sample, s).x_start, x_start], [1.0, half, -half])
        return Stepped(corrected, x_start)

    def _churned(self, denoise: Denoiser, x: Tensor, t: Time, draw: Draw) -> tuple[Tensor, Time]:
        """``x`` with noise added, and the time up to which (EDM alg. 2, lines 4 to 6)."""
        now = level_of(denoise, t)
        gamma = min(self.churn / (len(self.times) - 1), math.sqrt(2) - 1)
        if gamma == 0 or now.alpha == 0 or not self.churn_min <= now.sigma / now.alpha <= self.churn_max:
            return x, t
        last = self.diffusion.log_snr(self.diffusion.num_timesteps - 1)
        raised = self.diffusion.time_of(max(now.log_snr - 2 * math.log1p(gamma), last))
        if not self.diffusion.knows_fractional_times:
            raised = round(raised)
        if raised <= t:
            return x, t
        then = level_of(denoise, raised)
        added = math.sqrt((then.sigma / then.alpha) ** 2 - (now.sigma / now.alpha) ** 2)
        return mix(then.alpha / now.alpha, x, then.alpha * added * self.churn_noise, draw()), raised
