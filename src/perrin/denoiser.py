"""The one contract that samplers, guidance and likelihoods see: a denoiser and its noise levels.

A time is an index of the diffusion's timesteps, as a Python number for the whole batch: whole times are exact,
fractional ones lie between them linearly in log-SNR, and CLEAN = -1 is the data. The single steps of the public
API give each example its own: then a time is an int64 tensor of shape (B, 1, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from perrin.diffusion import GaussianDiffusion
from perrin.forward import Step
from perrin.noise import CLEAN
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

    def acting(self, t: Time) -> Guidable:
        """Itself, or the denoiser beneath it whose prediction it leaves as it is at time ``t``."""
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

    def acting(self, t: Time) -> DiffusionDenoiser:
        """Itself."""
        return self

    def __call__(self, x: Tensor, t: Time) -> Denoised:
        """x_start and eps for ``x`` (B, ...) at time ``t``."""
        if self.denoised_fn is not None:
            return self.processed(self.raw(x, t), x, t)
        step = self.step(t)
        output = self.diffusion.output(self.model, x, step, self.model_kwargs)
        return self.diffusion.read(output, x, step, clip_denoised=self.clip_denoised)

    def combined(
        self, x: Tensor, t: float, kept: float, gained: float
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """The function of this name without ``denoised_fn``: no x_start is made, and the sum takes its place."""
        diffusion, clip = self.diffusion, self.clip_denoised
        output = diffusion.output(self.model, x, t, self.model_kwargs)
        scaled, share = diffusion.x_start_by_x(output, x, t, clip_denoised=clip)
        sample = scale_(gained * share, scaled).add_(x, alpha=kept)
        return sample, lambda: diffusion.x_start(output, x, t, clip_denoised=clip)

    def raw(self, x: Tensor, t: Time) -> Denoised:
        """What the network says, before ``denoised_fn`` and clipping."""
        step = self.step(t)
        return self.diffusion.read(self.diffusion.output(self.model, x, step, self.model_kwargs), x, step)

    def processed(self, denoised: Denoised, x: Tensor, t: Time) -> Denoised:
        """``denoised`` after ``denoised_fn`` and clipping.

        Where there is a ``denoised_fn``, an ancestral step follows the x_start that it gives, also where the network
        predicts x_{t-1} itself.
        """
        found = self.diffusion.processed(denoised, x, self.step(t), self.clip_denoised, self.denoised_fn)
        return found if self.denoised_fn is None else replace(found, previous=None)

    def schedule(self, t: Time) -> tuple[Coefficient, Coefficient]:
        """(alpha, sigma) at time ``t``, in float64."""
        if isinstance(t, Tensor):
            alpha, sigma = self.diffusion.level(t.clamp(min=0), t)
            return torch.where(t == CLEAN, 1.0, alpha), torch.where(t == CLEAN, 0.0, sigma)
        return self.diffusion.level_of_batch(t)

    def step(self, t: Time) -> Step | float:
        """``t`` as the diffusion takes it."""
        return t.flatten() if isinstance(t, Tensor) else t


def combined(
    denoise: Denoiser, x: Tensor, t: Time, kept: Coefficient, gained: Coefficient
) -> tuple[Tensor, Tensor | Callable[[], Tensor]]:
    """``kept x + gained x_start`` for ``x`` (B, ...) at time ``t``; and x_start, or what makes it.

    The sum is a new tensor in the dtype of ``x``, at least float32. Where a network's prediction is not guided at
    this time, no x_start is made on the way to it: that is one pass over memory less, and otherwise rounded.
    """
    x_start: Tensor | Callable[[], Tensor]
    if not isinstance(denoise, DiffusionDenoiser) and hasattr(denoise, "acting"):
        denoise = denoise.acting(t)
    if (
        isinstance(denoise, DiffusionDenoiser)
        and denoise.denoised_fn is None
        and not isinstance(t, Tensor)
        and isinstance(kept, float)
        and isinstance(gained, float)
        and kept != 0  # else the sum is x_start, as the last step's, to the bit
    ):
        sample, x_start = denoise.combined(x, t, kept, gained)
    else:
        x_start = denoise(x, t).x_start
        sample = mix(gained, x_start, kept, x)
    if sample.dtype != x.dtype:
        sample = sample.to(torch.promote_types(x.dtype, torch.float32))
    return sample, x_start
