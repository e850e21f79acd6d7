"""Autoguidance: away from what a worse network says (arXiv:2406.02507)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from perrin.denoiser import Time
from perrin.guidance.base import Guidance
from perrin.guidance.contrast import Contrasted, Interval, extrapolated
from perrin.parameterization import Denoised
from perrin.reverse import Model, ModelKwargs
from perrin.tensors import Coefficient


@dataclass(frozen=True)
class Autoguided(Contrasted):
    """``denoiser`` extrapolated from what ``weaker`` says; see `autoguidance`."""

    weaker: Model
    model_kwargs: ModelKwargs

    def guided(self, x: Tensor, t: Time, weight: Coefficient) -> Denoised:
        """The prediction extrapolated, with the variance of the better network (arXiv:2406.02507 eq. 3)."""
        told = self.base.model_kwargs if self.model_kwargs is None else self.model_kwargs
        weak = replace(self.base, model=self.weaker, model_kwargs=told)
        return extrapolated(weak.raw(x, t), self.denoiser.raw(x, t), weight)


def autoguidance(
    weaker: Model, scale: float, *, model_kwargs: ModelKwargs = None, interval: Interval | None = None
) -> Guidance:
    """``weak + scale (strong - weak)``, where ``weaker`` is a worse network for the same diffusion.

    It may be smaller, or less trained: such as an earlier or shorter average of the same weights. It is told
    ``model_kwargs``, by default what the better one is told. ``interval`` is that of `classifier_free`. One call more
    of the network ``weaker`` at each time within it. Raises `ArgumentError` as `classifier_free` does.
    """
    return partial(Autoguided, scale=scale, interval=interval, weaker=weaker, model_kwargs=model_kwargs)
