"""Inpainting with any sampler and an unconditional network (RePaint, arXiv:2201.09865).

What is known of x_s is drawn from q(x_s | x_0) after each step, eq. 8a and c. That alone leaves the rest little time
to agree with it, so steps are taken several times over, with noise added in between (algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from perrin.editing.options import PLAIN, SamplingOptions
from perrin.errors import ArgumentError, ShapeError
from perrin.forward import noise_like
from perrin.reverse import Model
from perrin.samplers.base import Memory, NoiseFn, Sampler
from perrin.tensors import Coefficient, mix, root


@torch.no_grad()
def inpaint(
    sampler: Sampler,
    model: Model,
    x_start: Tensor,
    *,
    fill: Tensor,
    resamples: int = 10,
    jump: int = 1,
    options: SamplingOptions = PLAIN,
) -> Tensor:
    """``x_start`` (B, ...) with the values where ``fill`` is True drawn anew, to fit the others, which are kept.

    ``fill`` is of bool and expands to the shape of ``x_start``; what is there already has no influence. (RePaint's
    mask is its opposite, 1 where known.) Each ``jump`` steps are taken ``resamples`` times; only the last one, to the
    data, is taken once. So there are ``resamples (K - 1) + 1`` steps. One resample is plain replacement.

    With ``jump`` 1, a stochastic sampler and the right variance the result tends to the conditional distribution as
    ``resamples`` grows. A longer jump ends each block with steps that nothing brings into agreement, a bias that
    stays. A deterministic sampler, or too small a variance, makes results too much alike, more so by each resample.

    Raises `ArgumentError` for ``resamples`` below 1, a ``jump`` that is not from 1 to K and a ``fill`` that is not of
    bool, `ShapeError` for one of another shape.
    """
    check_fill(fill, x_start)
    denoise = options.denoiser(sampler, model)
    x, noise_fn = options.noise(x_start, sampler.times[0])
    memory: Memory = ()
    for t, s in inpainting_moves(sampler.times, resamples, jump):
        now, then, draw = denoise.schedule(t), denoise.schedule(s), partial(_noise, noise_fn, x, t)
        if s > t:
            x, memory = _noised(x, now, then, draw()), ()
        else:
            x, _, memory = sampler.step(denoise, x, t, s, draw, memory)
            x = torch.where(fill, x, mix(then[0], x_start, then[1], draw()))
            memory = tuple(visit for visit in memory if visit.t != s)  # made at s of x before it was merged
    return x


def inpainting_moves(times: Sequence[float], resamples: int, jump: int) -> Iterator[tuple[float, float]]:
    """Pairs of a sampler's ``times``, from which to which: a step to an earlier time, or noise up to a later one.

    Blocks of ``jump`` steps end at the last time before the data; the first block may be shorter. Raises
    `ArgumentError` as `inpaint` does.
    """
    steps = len(times) - 1
    if resamples < 1:
        raise ArgumentError(f"resamples must be at least 1, got {resamples}")
    if not 1 <= jump <= steps:
        raise ArgumentError(f"jump must be from 1 to {steps}, the number of steps, got {jump}")
    bounds = sorted({0, *range(steps - 1, 0, -jump)})
    for first, last in pairwise(bounds):
        block = list(pairwise(times[first : last + 1]))
        for _ in range(resamples - 1):
            yield from block
            yield times[last], times[first]
        yield from block
    yield times[-2], times[-1]


def _noise(noise_fn: NoiseFn, x: Tensor, t: float) -> Tensor:
    return noise_like(x, noise_fn(x, t))


def _noised(
    x: Tensor, now: tuple[Coefficient, Coefficient], then: tuple[Coefficient, Coefficient], noise: Tensor
) -> Tensor:
    """``x`` taken from level ``now`` up to ``then`` by the forward process."""
    ratio = then[0] / now[0]
    return mix(ratio, x, root(then[1] ** 2 - (ratio * now[1]) ** 2), noise)


def check_fill(fill: Tensor, x_start: Tensor) -> None:
    """Raise `ArgumentError` or `ShapeError` unless ``fill`` is of bool and expands to the shape of ``x_start``."""
    if fill.dtype != torch.bool:
        raise ArgumentError(f"fill must be of bool, True where to fill, got {fill.dtype}")
    try:
        fill.expand_as(x_start)
    except RuntimeError:
        raise ShapeError(
            f"fill must expand to the shape of x_start, {tuple(x_start.shape)}, got {tuple(fill.shape)}"
        ) from None
