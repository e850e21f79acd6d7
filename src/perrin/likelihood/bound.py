"""The variational bound per image in bits per dimension: every term, or an unbiased estimate from a few."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from perrin.diffusion import GaussianDiffusion
from perrin.errors import ArgumentError, ShapeError
from perrin.randomness import generator_for, normal_rows, seed_of
from perrin.reverse import Model, ModelKwargs
from perrin.tensors import at_least_float32


class Bound(NamedTuple):
    """The bound on -log2 p(x_0) / D of each image, (B,) float64 on the CPU, in bits per dimension."""

    total: Tensor
    prior: Tensor
    vb: Tensor
    """The sum of the KL terms, t >= 1."""
    decoder: Tensor
    """The term at t = 0."""
    network_calls: int
    """Calls per image."""


def bound(
    diffusion: GaussianDiffusion,
    model: Model,
    x_start: Tensor,
    *,
    indices: Sequence[int],
    seed: int = 0,
    terms: int | None = None,
    clip_denoised: bool = True,
    model_kwargs: ModelKwargs = None,
) -> Bound:
    """The bound of ``x_start`` (B, ...), whose places in its data set are ``indices``.

    With ``terms`` None every timestep is evaluated, each at one draw of x_t. Otherwise the sum over t >= 1 is
    estimated at ``terms`` timesteps per image, one in each of as many equal strata (IDDPM's terms fall steeply
    in t, so expect noise); the estimate is unbiased and independent between images.

    The noise of image i at t depends on (seed, i, t) alone: the same for any batch size, and common to two models
    that are compared. Raises `ArgumentError` unless 1 <= terms <= T - 1, `ShapeError` for too few indices.
    """
    if len(indices) != len(x_start):
        raise ShapeError(f"indices must name {len(x_start)} images, got {len(indices)}")
    if terms is not None and not 1 <= terms <= diffusion.num_timesteps - 1:
        raise ArgumentError(f"terms must be from 1 to {diffusion.num_timesteps - 1}, got {terms}")
    estimate = _Estimate(
        diffusion, model, at_least_float32(x_start), indices, seed, clip_denoised, model_kwargs
    )
    with torch.no_grad():
        vb = estimate.every_kl() if terms is None else estimate.some_kl(terms)
        decoder = estimate.term(0).cpu().double()
        prior = diffusion.prior_bpd(estimate.x_start).cpu().double()
    calls = diffusion.num_timesteps if terms is None else terms + 1
    return Bound(prior + vb + decoder, prior, vb, decoder, calls)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of ``values`` (n,) and its standard error, which is NaN for a single value."""
    count = len(values)
    error = float(values.double().std()) / math.sqrt(count) if count > 1 else math.nan
    return float(values.double().mean()), error


class _Estimate(NamedTuple):
    diffusion: GaussianDiffusion
    model: Model
    x_start: Tensor
    indices: Sequence[int]
    seed: int
    clip_denoised: bool
    model_kwargs: ModelKwargs

    def every_kl(self) -> Tensor:
        terms = [self.term(t) for t in range(self.diffusion.num_timesteps - 1, 0, -1)]
        return _sum(terms, self.x_start)

    def some_kl(self, terms: int) -> Tensor:
        last = self.diffusion.num_timesteps - 1  # the strata divide 1..last
        drawn = []
        for stratum in range(terms):
            u = torch.tensor([self._uniform(index, stratum) for index in self.indices], dtype=torch.float64)
            t = 1 + ((stratum + u) / terms * last).long().clamp(max=last - 1)
            drawn.append(self.term(t))
        return _sum(drawn, self.x_start) * last / terms

    def term(self, t: int | Tensor) -> Tensor:
        """One term of each image, (B,); ``t`` is an int or (B,) on the CPU."""
        steps = [t] * len(self.indices) if isinstance(t, int) else t.tolist()
        noise = normal_rows(self.x_start, self._generators(steps))
        step = t if isinstance(t, int) else t.to(self.x_start.device)
        x_t = self.diffusion.q_sample(self.x_start, step, noise)
        terms = self.diffusion.vb_terms_bpd(
            self.model, self.x_start, x_t, step, self.clip_denoised, self.model_kwargs
        )
        return terms["output"]

    def _generators(self, steps: Sequence[int]) -> Iterator[torch.Generator]:
        generator = torch.Generator(self.x_start.device)
        for index, t in zip(self.indices, steps, strict=True):
            yield generator.manual_seed(seed_of("bound", int(self.seed), int(index), t))

    def _uniform(self, index: int, stratum: int) -> float:
        return float(
            torch.rand((), generator=generator_for("cpu", "stratum", int(self.seed), int(index), stratum))
        )


def _sum(terms: Sequence[Tensor], x_start: Tensor) -> Tensor:
    """The sum of (B,) terms in float64 on the CPU, fetched from the device once."""
    if not terms:
        return torch.zeros(len(x_start), dtype=torch.float64)
    return torch.stack(list(terms)).cpu().double().sum(0)
