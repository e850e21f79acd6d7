"""Guidance by a classifier of noisy examples (ADM, arXiv:2105.05233 section 4)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from perrin.denoiser import DiffusionDenoiser, Time
from perrin.errors import ArgumentError, ShapeError
from perrin.guidance.base import Guidance, Guided
from perrin.networks.embeddings import NO_CLASS, check_classes
from perrin.parameterization import Denoised
from perrin.reverse import CondFn, Model
from perrin.tensors import mix


@dataclass(frozen=True)
class ScoreGuided(Guided):
    """``denoiser`` with the score of x_t moved by ``cond_fn(x, t)``, a gradient of log p(y | x_t) (ADM alg. 2).

    An ancestral step follows the x_start that comes of it, also where the network predicts x_{t-1} itself.
    """

    cond_fn: CondFn

    def raw(self, x: Tensor, t: Time) -> Denoised:
        """The score moved, and with it x_start and eps."""
        alpha, sigma = self.schedule(t)
        raw, score = self.denoiser.raw(x, t), _score(self.base, self.cond_fn, x, t)
        pull = self.base.diffusion.pull(self.base.step(t), x)
        return replace(
            raw,
            x_start=mix(1.0, raw.x_start, pull, score),
            make_eps=lambda: mix(1.0, raw.eps, -alpha / sigma * pull, score),
            previous=None,
        )


@dataclass(frozen=True)
class MeanGuided(Guided):
    """``denoiser`` whose ancestral step moves its mean by variance times ``cond_fn(x, t)`` (ADM alg. 1)."""

    cond_fn: CondFn

    def raw(self, x: Tensor, t: Time) -> Denoised:
        """The same x_start and eps, and the gradient, on top of one that is there already."""
        raw, score = self.denoiser.raw(x, t), _score(self.base, self.cond_fn, x, t)
        return replace(raw, gradient=score if raw.gradient is None else raw.gradient + score)


def classifier(guide: nn.Module | CondFn, scale: float = 1.0, *, y: Tensor | None = None) -> Guidance:
    """`ScoreGuided` by ``scale`` times the gradient of log p(y | x_t), for every sampler.

    ``guide`` is a network that gives the logits of noisy examples, see `classifier_gradient`, or any other function
    is itself the gradient, ``cond_fn(x, t, **model_kwargs)``. The ``cond_fn`` of a sampler's ``sample`` does the
    same, but moves the mean of ancestral steps as ADM does (`MeanGuided`). Raises `ArgumentError` for classes ``y``
    beside a function, which has its own.
    """
    if isinstance(guide, nn.Module):
        return partial(ScoreGuided, cond_fn=classifier_gradient(guide, scale, y=y))
    if y is not None:
        raise ArgumentError("y is for a classifier network; a cond_fn has classes of its own: y must be None")
    cond_fn = guide  # by a name of its own type, which the function below keeps

    def scaled(x: Tensor, t: Tensor, **model_kwargs: object) -> Tensor:
        return scale * cond_fn(x, t, **model_kwargs)

    return partial(ScoreGuided, cond_fn=scaled)


def classifier_gradient(network: Model, scale: float = 1.0, *, y: Tensor | None = None) -> CondFn:
    """The ``cond_fn`` of a classifier: ``scale`` times the gradient of log p(y | x_t) at x_t, rows independent.

    ``network(x, t)`` gives logits (B, classes) at the times that the diffusion's network is told. ``y`` (B,) holds
    the classes to guide to; without it they are those that the diffusion's network is told, ``model_kwargs["y"]``.
    `NO_CLASS` rows are not guided. The function raises `ArgumentError` where there are no classes or none so high,
    `ShapeError` unless there is one for each row.
    """
    bound = y

    def cond_fn(x: Tensor, t: Tensor, y: Tensor | None = None, **others: object) -> Tensor:
        labels = _labels(y if bound is None else bound, x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_p = torch.log_softmax(network(x, t), dim=1)
            check_classes(labels, log_p.shape[1])
            told = log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0] * (labels != NO_CLASS)
            return scale * torch.autograd.grad(told.sum(), x)[0]

    return cond_fn


def _labels(y: Tensor | None, x: Tensor) -> Tensor:
    if y is None:
        raise ArgumentError("a classifier's gradient needs the classes y (B,), got none")
    if y.shape != x.shape[:1] or y.is_floating_point():
        raise ShapeError(
            f"y must be {len(x)} integers, one class per example, got {y.dtype} {tuple(y.shape)}"
        )
    return y.to(x.device).long()


def _score(denoiser: DiffusionDenoiser, cond_fn: CondFn, x: Tensor, t: Time) -> Tensor:
    return denoiser.diffusion.classifier_gradient(cond_fn, x, denoiser.step(t), denoiser.model_kwargs)
