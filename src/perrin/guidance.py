"""Guidance: functions from one denoiser to another, so that every sampler has it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from perrin.denoiser import DiffusionDenoiser, Time
from perrin.parameterization import Denoised
from perrin.reverse import CondFn
from perrin.tensors import Coefficient, mix


@dataclass(frozen=True)
class ScoreGuided:
    """``denoiser`` with the score of x_t moved by ``cond_fn(x, t)``, a gradient of log p(y | x_t) (ADM alg. 2).

    The guided x_start is clipped and eps made to match, so that the two never disagree.
    """

    denoiser: DiffusionDenoiser
    cond_fn: CondFn

    def __call__(self, x: Tensor, t: Time) -> Denoised:
        """x_start and eps for ``x`` (B, ...) at time ``t``."""
        alpha, sigma = self.schedule(t)
        raw, score = self.denoiser.raw(x, t), _score(self.denoiser, self.cond_fn, x, t)
        pull = self.denoiser.diffusion.pull(self.denoiser.step(t), x)
        guided = replace(
            raw,
            x_start=mix(1.0, raw.x_start, pull, score),
            make_eps=lambda: mix(1.0, raw.eps, -alpha / sigma * pull, score),
        )
        return self.denoiser.processed(guided, x, t)

    def schedule(self, t: Time) -> tuple[Coefficient, Coefficient]:
        """(alpha, sigma) at time ``t``, in float64."""
        return self.denoiser.schedule(t)


@dataclass(frozen=True)
class MeanGuided:
    """``denoiser`` whose ancestral step moves its mean by variance times ``cond_fn(x, t)`` (ADM alg. 1)."""

    denoiser: DiffusionDenoiser
    cond_fn: CondFn

    def __call__(self, x: Tensor, t: Time) -> Denoised:
        """x_start and eps for ``x`` (B, ...) at time ``t``, and the gradient."""
        return replace(self.denoiser(x, t), gradient=_score(self.denoiser, self.cond_fn, x, t))

    def schedule(self, t: Time) -> tuple[Coefficient, Coefficient]:
        """(alpha, sigma) at time ``t``, in float64."""
        return self.denoiser.schedule(t)


def _score(denoiser: DiffusionDenoiser, cond_fn: CondFn, x: Tensor, t: Time) -> Tensor:
    return denoiser.diffusion.classifier_gradient(cond_fn, x, denoiser.step(t), denoiser.model_kwargs)
