"""The one contract that samplers, guidance and likelihoods see: a denoiser and its noise levels.

A time is an index of the diffusion's timesteps, as a Python number for the whole batch: whole times are exact,
fractional ones lie between them linearly in log-SNR, and CLEAN = -1 is the data. The single steps of the public
API give each example its own: then a time is an int64 tensor of shape (B, 1, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from perrin.diffusion import GaussianDiffusion
from perrin.errors import ArgumentError
from perrin.forward import Step
from perrin.noise import CLEAN, Level
from perrin.parameterization import Denoised
from perrin.reverse import Model, ModelKwargs
from perrin.tensors import Coefficient, mix, scale_

Time = float | Tensor


class Denoiser(Protocol):
    """What is known of the data behind x_t."""

    def __call__(self, x: Tensor, t: Time) -> Denoised:
        """x_start and eps for ``x`` (B, ...) at time ``t``."""
        ...

    def schedule(self, t: Time) -> tuple[Coefficient, Coefficient]:
        """(alpha, sigma) at time ``t``, in float64."""
        ...


class Guidable(Denoiser, Protocol):
    """A denoiser whose prediction can still be changed, before it is thresholded and clipped."""

    @property
    def base(self) -> DiffusionDenoiser:
        """The diffusion and the network beneath all guidance."""
        ...

    def raw(self, x: Tensor, t: Time) -> Denoised:
        """x_start and eps for ``x`` (B, ...) at time ``t``, before ``denoised_fn`` and clipping."""
        ...


@dataclass(frozen=True)
class DiffusionDenoiser:
    """A diffusion and a network as a denoiser.

    x_start goes through ``denoised_fn`` and is clipped to [-1, 1] if asked, and eps is made to match.
    """

    diffusion: GaussianDiffusion
    model: Model
    clip_denoised: bool = True
    denoised_fn: Callable[[Tensor], Tensor] | None = None
    model_kwargs: ModelKwargs = None

    @property
    def base(self) -> DiffusionDenoiser:
        """Itself."""
        return self

    def __call__(self, x: Tensor, t: Time) -> Denoised:
        """x_start and eps for ``x`` (B, ...) at time ``t``."""
        step = self.step(t)
        output = self.diffusion.output(self.model, x, step, self.model_kwargs)
        return self.diffusion.read(
            output, x, step, clip_denoised=self.clip_denoised, denoised_fn=self.denoised_fn
        )

    def combined(
        self, x: Tensor, t: float, kept: float, gained: float
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """The function of this name without ``denoised_fn``: the sum takes the place of x_start, which is ours."""
        step, clip, read = self._number(t), self.clip_denoised, self.diffusion.x_start
        output = self.diffusion.output(self.model, x, step, self.model_kwargs)
        x_start = read(output, x, step, clip_denoised=clip)
        sample = scale_(gained, x_start).add_(x, alpha=kept)
        return sample, lambda: read(output, x, step, clip_denoised=clip)

    def raw(self, x: Tensor, t: Time) -> Denoised:
        """What the network says, before ``denoised_fn`` and clipping."""
        step = self.step(t)
        return self.diffusion.read(self.diffusion.output(self.model, x, step, self.model_kwargs), x, step)

    def processed(self, denoised: Denoised, x: Tensor, t: Time) -> Denoised:
        """``denoised`` after ``denoised_fn`` and clipping."""
        return self.diffusion.processed(denoised, x, self.step(t), self.clip_denoised, self.denoised_fn)

    def schedule(self, t: Time) -> tuple[Coefficient, Coefficient]:
        """(alpha, sigma) at time ``t``, in float64."""
        if isinstance(t, Tensor):
            alpha, sigma = self.diffusion.level(t.clamp(min=0), t)
            return torch.where(t == CLEAN, 1.0, alpha), torch.where(t == CLEAN, 0.0, sigma)
        level = self._levels.get(t)
        if level is None:
            level = Level(1.0, 0.0) if t == CLEAN else self.diffusion.level_of_batch(self._number(t))
            self._levels[t] = level
        return level

    @cached_property
    def _levels(self) -> dict[float, Level]:
        """Those that were asked for: a step's two times are also those of the steps beside it."""
        return {}

    def step(self, t: Time) -> Step | float:
        """``t`` as the diffusion takes it. Raises `ArgumentError` for a number outside 0..T - 1."""
        return t.flatten() if isinstance(t, Tensor) else self._number(t)

    def _number(self, t: float) -> float:
        if not 0 <= t <= self.diffusion.num_timesteps - 1:
            raise ArgumentError(f"time must be from 0 to {self.diffusion.num_timesteps - 1}, got {t}")
        return int(t) if t == int(t) else t


def combined(
    denoise: Denoiser, x: Tensor, t: Time, kept: Coefficient, gained: Coefficient
) -> tuple[Tensor, Tensor | Callable[[], Tensor]]:
    """``kept x + gained x_start`` for ``x`` (B, ...) at time ``t``; and x_start, or what makes it.

    The sum is a new tensor in the dtype of ``x``, at least float32, and the same bits in either way.
    """
    x_start: Tensor | Callable[[], Tensor]
    if (
        isinstance(denoise, DiffusionDenoiser)
        and denoise.denoised_fn is None
        and not isinstance(t, Tensor)
        and isinstance(kept, float)
        and isinstance(gained, float)
    ):
        sample, x_start = denoise.combined(x, t, kept, gained)
    else:
        x_start = denoise(x, t).x_start
        sample = mix(gained, x_start, kept, x)
    if sample.dtype != x.dtype:
        sample = sample.to(torch.promote_types(x.dtype, torch.float32))
    return sample, x_start
