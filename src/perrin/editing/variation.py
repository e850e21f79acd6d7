"""Variations: data noised to an intermediate time and sampled from there (SDEdit, arXiv:2108.01073)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from perrin.diffusion import GaussianDiffusion
from perrin.editing.options import PLAIN, SamplingOptions
from perrin.errors import ArgumentError
from perrin.reverse import Model
from perrin.samplers.base import Sampler
from perrin.tensors import mix


def vary(
    sampler: Sampler,
    model: Model,
    x_start: Tensor,
    *,
    strength: float,
    variations: int = 1,
    options: SamplingOptions = PLAIN,
) -> Tensor:
    """``variations`` of each example in ``x_start`` (B, ...), as (B, ``variations``, ...).

    ``strength``, in (0, 1], is the share of noise in the variance of what sampling begins with: at 0.5 there is as
    much noise as data in [-1, 1] of unit power, at 1 as much as ``sampler`` ever begins with, and towards 0 the
    example comes back. That means the same for every chain, grid and number of steps. A rough drawing needs more of
    it than a photograph, 0.7 to 0.95, and so does a larger picture, over whose pixels the noise averages out.

    Variation v has the noise of seed + v, so that it stays the same when more are asked for. Raises `ArgumentError`
    for a ``strength`` or a number of variations out of range.
    """
    if variations < 1:
        raise ArgumentError(f"variations must be at least 1, got {variations}")
    later = begun_at(sampler, time_of_strength(sampler.diffusion, strength))
    seeds = (replace(options, seed=options.seed + v) for v in range(variations))
    return torch.stack([_variation(later, model, x_start, seeded) for seeded in seeds], 1)


def _variation(sampler: Sampler, model: Model, x_start: Tensor, options: SamplingOptions) -> Tensor:
    t = sampler.times[0]
    noise, noise_fn = options.noise(x_start, t)
    alpha, sigma = sampler.diffusion.level_of_batch(t)
    return options.sample(sampler, model, mix(alpha, x_start, sigma, noise), noise_fn)


def time_of_strength(diffusion: GaussianDiffusion, strength: float) -> float:
    """The time, mostly fractional, at which noise has the share ``strength`` of the variance: 1 - alphas_cumprod.

    It is the last or the first timestep where the chain does not go as far. Raises `ArgumentError` unless
    0 < ``strength`` <= 1.
    """
    if not 0 < strength <= 1:
        raise ArgumentError(f"strength must be above 0 and at most 1, got {strength}")
    log_snr = math.log1p(-strength) - math.log(strength) if strength < 1 else -math.inf
    clearest, noisiest = diffusion.log_snr(0), diffusion.log_snr(diffusion.num_timesteps - 1)
    return diffusion.time_of(min(max(log_snr, noisiest), clearest))


def begun_at(sampler: Sampler, t: float) -> Sampler:
    """``sampler`` from time ``t`` on: the first of its times on that is at most ``t`` is moved up to it.

    So the noise is what was asked for, however coarse the grid, and no step is tiny. ``t`` is rounded for a sampler
    of whole times, and its first time stands for later ones.
    """
    if sampler.discrete or not sampler.diffusion.knows_fractional_times:
        t = round(t)
    kept = [time for time in sampler.times[:-1] if time <= t]
    return sampler.at_times((min(t, sampler.times[0]), *kept[1:]))
