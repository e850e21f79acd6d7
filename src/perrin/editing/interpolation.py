"""Interpolation: samples from between two x_T, which are noise of two seeds or come from two examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from perrin.editing.options import PLAIN, SamplingOptions
from perrin.errors import ArgumentError, ShapeError
from perrin.reverse import Model
from perrin.samplers.base import SampleNoise, Sampler, device_of
from perrin.samplers.ddim import SamplerDDIM
from perrin.tensors import append_dims, at_least_float32

NEARLY = 1e-4
"""Radians from parallel or from opposite at which rounding, not the vectors, would choose the arc between them."""

_UNCLIPPED = replace(PLAIN, clip_denoised=False)


def slerp(a: Tensor, b: Tensor, u: float | Tensor) -> Tensor:
    """The point a share ``u`` of the way along the arc from ``a`` to ``b`` (B, ...), row by row.

    ``u`` is one number or (B,), in [0, 1]. The angle is that between the flattened rows, and the norm goes evenly
    from one to the other, so it stays where they are equal. 0 gives ``a`` and 1 ``b``, exactly. Nearly parallel rows
    are mixed on a straight line; nearly opposite ones are joined by an arc through the axis farthest from them.

    Raises `ShapeError` unless the shapes are equal, `ArgumentError` for ``u`` out of range.
    """
    a, b = at_least_float32(a), at_least_float32(b)
    share = torch.as_tensor(u, dtype=a.dtype, device=a.device)
    if a.shape != b.shape or share.shape not in ((), a.shape[:1]):
        raise ShapeError(
            f"slerp needs two of one shape (B, ...) and u () or (B,), got {tuple(a.shape)}, {tuple(b.shape)} "
            f"and {tuple(share.shape)}"
        )
    if not bool(((share >= 0) & (share <= 1)).all()):
        raise ArgumentError(f"u must be from 0 to 1, got {share.tolist()}")
    return _along_arc(a, b, share)


def _along_arc(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    first, second, u = a.flatten(1), b.flatten(1), append_dims(u, 2)
    norm, other_norm = (rows.norm(dim=1, keepdim=True) for rows in (first, second))
    along, other = normalize(first), normalize(second)
    cosine = (along * other).sum(1, keepdim=True)
    across = other - cosine * along
    # Again: little may be left, and rounding be most of it.
    across = across - (across * along).sum(1, keepdim=True) * along
    # Of the cosine alone, acos would lose half the digits at either end.
    angle = torch.atan2(across.norm(dim=1, keepdim=True), cosine)
    across = torch.where(angle > math.pi - NEARLY, _perpendicular(along), across)
    arc = torch.cos(u * angle) * along + torch.sin(u * angle) * normalize(across)
    point = torch.lerp(norm, other_norm, u) * arc
    straight = (angle < NEARLY) | (norm == 0) | (other_norm == 0)
    point = torch.where(straight, torch.lerp(first, second, u), point)
    point = torch.where(u == 0, first, torch.where(u == 1, second, point))
    return point.reshape(a.shape)


def _perpendicular(unit: Tensor) -> Tensor:
    """Vectors (B, D) perpendicular to the unit vectors ``unit``."""
    axis = unit.abs().argmin(1, keepdim=True)
    return one_hot(axis[:, 0], unit.shape[1]).to(unit) - unit.gather(1, axis) * unit


def interpolate(
    sampler: Sampler,
    model: Model,
    *,
    first: Tensor,
    second: Tensor,
    count: int = 8,
    options: SamplingOptions = PLAIN,
) -> Tensor:
    """Samples (``count``, ...) from even places along the arc between two x_T, ``first`` and ``second`` (...).

    Entries of ``model_kwargs`` have ``count`` rows. The noise of the steps is one for all places, that of row 0: each
    sample depends on its place alone, and the ends are what ``sampler`` makes of ``first`` and ``second`` with it.
    Raises `ArgumentError` unless ``count`` is at least 2, `ShapeError` for ends of different shapes.
    """
    between = _Between(count, first)
    noise_fn = options.noise(first[None], sampler.times[0])[1]
    start = between(first[None], second[None])
    return options.sample(sampler, model, start, lambda x, t: noise_fn(x[:1], t).expand_as(x))


def interpolate_seeds(
    sampler: Sampler,
    model: Model,
    shape: Sequence[int],
    *,
    seeds: tuple[int, int],
    count: int = 8,
    options: SamplingOptions = PLAIN,
    device: torch.device | str | None = None,
) -> Tensor:
    """Samples (``count``, ...) from between the samples of ``shape`` (...) that two ``seeds`` give.

    The noise of the steps is interpolated as x_T is, so that the ends are sample 0, or ``options.indices[0]``, of
    either seed with a stochastic sampler too. The seed and ``noise_fn`` of ``options`` have no part in it. ``device``
    is that of `Sampler.sample`. Raises `ArgumentError` unless ``count`` is at least 2.
    """
    device = device_of(device, None, model, sampler.diffusion)
    index = 0 if options.indices is None else options.indices[0]
    streams = [SampleNoise(seed, [index]) for seed in seeds]
    start = [stream.initial((1, *shape), device) for stream in streams]
    between = _Between(count, start[0])
    return options.sample(
        sampler, model, between(*start), lambda x, t: between(*(stream(x[:1], t) for stream in streams))
    )


def interpolate_data(
    sampler: SamplerDDIM,
    model: Model,
    *,
    first: Tensor,
    second: Tensor,
    count: int = 8,
    options: SamplingOptions = _UNCLIPPED,
) -> Tensor:
    """Samples (``count``, ...) from between two examples, ``first`` and ``second`` (...), inverted by DDIM.

    The ends are the examples up to the error of the naive inversion, O(1 / steps), which `SamplerDDIM.round_trip`
    measures. Nothing is clipped unless asked: a clipped prediction cannot be inverted. Give ``sampler`` the grid
    "log-snr" or "karras", which leave out noise beyond sigma / alpha = 80. Cosine chains go far beyond it with any
    other grid; the network's errors blow up there, and what comes back is noise. Raises `ArgumentError` unless eta
    is 0, and as `interpolate` does.
    """
    told = (
        None
        if options.model_kwargs is None
        else {
            name: value[[0, -1]] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value
            for name, value in options.model_kwargs.items()
        }
    )
    ends = sampler.invert(
        model,
        torch.stack([first, second]),
        clip_denoised=options.clip_denoised,
        denoised_fn=options.denoised_fn,
        cond_fn=options.cond_fn,
        model_kwargs=told,
        guidance=options.guidance,
    )
    return interpolate(sampler, model, first=ends[0], second=ends[1], count=count, options=options)


class _Between:
    """``count`` even places between two single rows (1, ...)."""

    def __init__(self, count: int, like: Tensor) -> None:
        if count < 2:
            raise ArgumentError(f"count must be at least 2, both ends, got {count}")
        self.places = torch.linspace(0, 1, count, dtype=like.dtype, device=like.device)

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """(count, ...)"""
        a, b = (end.expand(len(self.places), *end.shape[1:]) for end in (first, second))
        return slerp(a, b, self.places)
