"""What every edit passes on to its sampler, and where its noise comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from perrin.denoiser import Denoiser
from perrin.forward import noise_like
from perrin.guidance import Guidance
from perrin.reverse import CondFn, Model, ModelKwargs
from perrin.samplers.base import NoiseFn, SampleNoise, Sampler


@dataclass(frozen=True)
class SamplingOptions:
    """Arguments of `Sampler.sample` that an edit takes too.

    All noise of row i, that of the steps and that which noises data, is one stream: that of sample ``indices[i]``, by
    default i, under ``seed``. So an edit of an example is the same whatever the other rows are. ``noise_fn(x, t)``
    replaces it: called whenever noise shaped like ``x`` is needed.
    """

    clip_denoised: bool = True
    denoised_fn: Callable[[Tensor], Tensor] | None = None
    cond_fn: CondFn | None = None
    model_kwargs: ModelKwargs = None
    guidance: Sequence[Guidance] = ()
    seed: int = 0
    indices: Sequence[int] | None = None
    noise_fn: NoiseFn | None = None

    def noise(self, like: Tensor, t: float) -> tuple[Tensor, NoiseFn]:
        """The first noise, shaped like ``like`` (B, ...) and for time ``t``, and what gives the next ones.

        Raises `ShapeError` unless there is one of ``indices`` for each row.
        """
        if self.noise_fn is not None:
            return noise_like(like, self.noise_fn(like, t)), self.noise_fn
        streams = SampleNoise(self.seed, range(len(like)) if self.indices is None else self.indices)
        return streams.initial(like.shape, like.device).to(like.dtype), streams

    def denoiser(self, sampler: Sampler, model: Model) -> Denoiser:
        """The denoiser that the steps of ``sampler`` see."""
        return sampler.denoiser(
            model, self.clip_denoised, self.denoised_fn, self.cond_fn, self.model_kwargs, self.guidance
        )

    def sample(self, sampler: Sampler, model: Model, x: Tensor, noise_fn: NoiseFn) -> Tensor:
        """What ``sampler`` makes of ``x`` (B, ...) at the first of its times."""
        return sampler.sample(
            model,
            x.shape,
            noise=x,
            clip_denoised=self.clip_denoised,
            denoised_fn=self.denoised_fn,
            cond_fn=self.cond_fn,
            model_kwargs=self.model_kwargs,
            noise_fn=noise_fn,
            guidance=self.guidance,
        )


PLAIN = SamplingOptions()
"""Clipped, unconditional, seed 0."""
