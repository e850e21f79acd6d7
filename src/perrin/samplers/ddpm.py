"""Ancestral sampling (DDPM algorithm 2), with any fixed or learned variance, in any number of steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from perrin.denoiser import Denoiser, Guidable, Time
from perrin.diffusion import GaussianDiffusion
from perrin.errors import ArgumentError
from perrin.forward import Step, noise_like
from perrin.guidance import MeanGuided
from perrin.reverse import CondFn, Model, ModelKwargs
from perrin.samplers.base import Draw, Memory, Sample, Sampler, Stepped
from perrin.tensors import Coefficient, append_dims, mix


@dataclass(frozen=True)
class SamplerDDPM(Sampler):
    """Draws x_{t-1} from p(x_{t-1} | x_t) at each step; the variance is the diffusion's, also respaced."""

    discrete: ClassVar[bool] = True

    @cached_property
    def chain(self) -> GaussianDiffusion:
        """The diffusion respaced to this sampler's times."""
        return self.diffusion.respaced(map(int, self.times[:-1]), convert_learned=True)

    @cached_property
    def _index(self) -> dict[tuple[Time, Time], int]:
        return {pair: i for i, pair in enumerate(reversed(list(pairwise(self.times))))}

    def guide(self, denoiser: Guidable, cond_fn: CondFn) -> Guidable:
        """``denoiser`` whose step moves its mean along the classifier's gradient."""
        return MeanGuided(denoiser, cond_fn)

    def step(
        self, denoise: Denoiser, x: Tensor, t: Time, s: Time, draw: Draw, memory: Memory = ()
    ) -> Stepped:
        """From ``x`` at time ``t`` to the earlier time ``s``, the next of `times`; else `ArgumentError`."""
        if (t, s) not in self._index:
            raise ArgumentError(f"t and s must be neighbours in the sampler's times, got {t} and {s}")
        return self._ancestral(denoise, x, t, self._index[t, s], draw)

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        *,
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
    ) -> Sample:
        """One step from ``x`` at the chain's steps ``t`` (B,), 0 <= t < steps; the arguments of `sample`."""
        denoise = self.denoiser(model, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        return self._ancestral(denoise, x, self.times_at(t, x.ndim), t, lambda: noise_like(x, noise)).state

    def _ancestral(self, denoise: Denoiser, x: Tensor, time: Time, t: Step, draw: Draw) -> Stepped:
        denoised = denoise(x, time)
        mean, log_variance = self.chain.reverse(denoised, x, t)
        last = isinstance(t, int) and t == 0
        sample = mean if last else mix(1.0, mean, _std(log_variance, t, x), draw())
        return Stepped(sample, denoised.x_start)


def _std(log_variance: Coefficient, t: Step, x: Tensor) -> Coefficient:
    """The standard deviation of the step; 0 in the rows of the last one, whose sample is the mean."""
    half = 0.5 * log_variance
    std = half.exp_() if isinstance(half, Tensor) else math.exp(half)
    return std * append_dims(t != 0, x.ndim) if isinstance(t, Tensor) else std
