"""BDIA (arXiv:2307.10829): a two-state DDIM that is exactly invertible, and of second order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from perrin.denoiser import Denoiser, Time
from perrin.errors import ArgumentError
from perrin.guidance import Guidance
from perrin.parameterization import Denoised
from perrin.reverse import CondFn, Model, ModelKwargs
from perrin.samplers.base import Draw, Memory, Sampler, Stepped, Visit
from perrin.samplers.grids import Grid
from perrin.tensors import Coefficient, mix, root

DATA_STD = 0.25
"""The standard deviation of the data in `_std`, in units of [-1, 1]: how far an image's values lie from what their
neighbours tell. Of 1, 0.5, 0.25 and 0.1 it gave the best samples and inversions together, on mixtures and digits."""


class BDIAState(NamedTuple):
    """Two successive states, which together are what `SamplerBDIA` makes data of; each shaped like the data."""

    latest: Tensor
    """x at the first of the sampler's times, the noisiest."""
    before: Tensor
    """x at its second time."""


@dataclass(frozen=True)
class SamplerBDIA(Sampler):
    """DDIM whose step from t to s undoes DDIM's step back from t to u, where it came from.

    The paper's rule, for x over its standard deviation c instead of for x:
    ``x_s = DDIM(x_t, t to s) + gamma c_s / c_u (x_u - DDIM(x_t, t to u))``. Two steps back and forth on the same
    eps are what leapfrog is to Euler: the error falls as 1 / steps^2. Leapfrog's alternating error grows where the
    path contracts; over c, which contracts as the path does, it stays small. The first step is DDIM's.

    ``gamma`` in [0, 1]: 0 is DDIM; with 1, the default, u and s change places in the formula and nothing else does,
    which is why `invert` is exact. Its last step leaps too, so samples may leave [-1, 1] a little even where
    predictions are clipped. One network call a step. Raises `ArgumentError` for a ``gamma`` out of range.
    """

    grid: Grid = field(default="log-snr", kw_only=True)
    gamma: float = 1.0

    @property
    def convergence_order(self) -> int:
        """The p of an error that falls as K^-p."""
        return 2 if self.gamma == 1 else 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma <= 1:
            raise ArgumentError(f"gamma must be from 0 to 1, got {self.gamma}")

    def step(
        self, denoise: Denoiser, x: Tensor, t: Time, s: Time, draw: Draw, memory: Memory = ()
    ) -> Stepped:
        """From ``x`` at time ``t`` to the earlier time ``s``; ``memory`` is the visit before."""
        visit = Visit(t, x, denoise(x, t))
        if memory:
            sample = self._leap(denoise, visit.denoised, memory[0].x, memory[0].t, s)
        else:
            sample = _ddim(visit.denoised, denoise.schedule(s))
        return Stepped(sample, visit.denoised.x_start, (visit,))

    @torch.no_grad()
    def invert(
        self,
        model: Model,
        x_start: Tensor,
        *,
        clip_denoised: bool = False,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
        guidance: Sequence[Guidance] = (),
    ) -> BDIAState:
        """The two states that `sample_from` makes ``x_start`` (B, ...) of again, exactly up to rounding.

        The network has not seen the data's own level: the first step up takes its eps for data told the first
        timestep. Nothing depends on how good that step is, since its outcome is one of the two states that are
        carried up and come back. Predictions may be clipped or guided, if `sample_from` is told the same.
        As many network calls as steps. Raises `ArgumentError` unless gamma is 1 and there are 2 steps or more.
        """
        self._check_invertible()
        denoise = self.denoiser(model, clip_denoised, denoised_fn, cond_fn, model_kwargs, guidance)
        first = self.times[-2]
        alpha, sigma = denoise.schedule(first)
        before = mix(alpha, x_start, sigma, denoise(x_start, first).eps)
        return BDIAState(*reversed(self._walk(denoise, self.times[::-1], x_start, before)))

    @torch.no_grad()
    def sample_from(
        self,
        model: Model,
        state: BDIAState,
        *,
        clip_denoised: bool = False,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
        guidance: Sequence[Guidance] = (),
    ) -> Tensor:
        """The data of ``state``, which `invert` gave with the same arguments: one network call less than steps.

        `sample` from ``state.latest`` alone ends elsewhere, by the error of one DDIM step at the noisy end. Raises
        `ArgumentError` like `invert`.
        """
        self._check_invertible()
        denoise = self.denoiser(model, clip_denoised, denoised_fn, cond_fn, model_kwargs, guidance)
        return self._walk(denoise, self.times, *state)[1]

    def _walk(
        self, denoise: Denoiser, times: Sequence[float], behind: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The last two states along ``times``, up or down, whose first two are ``behind`` and ``x``."""
        for (u, t), s in zip(pairwise(times), times[2:], strict=False):
            behind, x = x, self._leap(denoise, denoise(x, t), behind, u, s)
        return behind, x

    def _leap(self, denoise: Denoiser, denoised: Denoised, x_u: Tensor, u: Time, s: Time) -> Tensor:
        """From ``x_u`` at ``u`` over what is ``denoised`` between them to ``s``, up or down."""
        there, here = denoise.schedule(s), denoise.schedule(u)
        kept = self.gamma * _std(there) / _std(here)
        missed = mix(1.0, x_u, -1.0, _ddim(denoised, here))
        return mix(1.0, _ddim(denoised, there), kept, missed)

    def _check_invertible(self) -> None:
        if self.gamma != 1:
            raise ArgumentError(
                f"gamma must be 1 to invert (else each step multiplies rounding by 1 / gamma), got {self.gamma}"
            )
        if len(self.times) < 3:
            raise ArgumentError(f"steps must be at least 2 to invert, got {len(self.times) - 1}")


def _ddim(denoised: Denoised, level: tuple[Coefficient, Coefficient]) -> Tensor:
    """Where DDIM (arXiv:2010.02502 eq. 12) goes at ``level`` (alpha, sigma)."""
    return mix(level[0], denoised.x_start, level[1], denoised.eps)


def _std(level: tuple[Coefficient, Coefficient]) -> Coefficient:
    """c of ``level`` (alpha, sigma): the standard deviation of x for data of `DATA_STD`."""
    return root((level[0] * DATA_STD) ** 2 + level[1] ** 2)
