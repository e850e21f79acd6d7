"""The variational bound per image in bits per dimension: every term, or an unbiased estimate from a few.

The sum of KL terms is estimated by stratified importance sampling over t; what is drawn is independent between
images, so that the standard error of a mean over images holds the Monte-Carlo noise as well.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from perrin.diffusion import GaussianDiffusion
from perrin.errors import ArgumentError, NonFiniteError, ShapeError
from perrin.likelihood.examples import checked
from perrin.randomness import generator_for, normal_rows, seed_of
from perrin.reverse import Model, ModelKwargs

CHUNK = 64
"""Rows, each an image at a timestep, of one network call."""

PILOT_IMAGES = 8
PILOT_TIMES = 24
UNIFORM_SHARE = 0.1
"""The share of the probabilities that is even: it bounds the weight of a term which the pilot took for small."""


class Bound(NamedTuple):
    """The bound on -log2 p(x_0) / D of each image, (B,) float64 on the CPU, in bits per dimension."""

    total: Tensor
    prior: Tensor
    vb: Tensor
    """The sum of the KL terms, t >= 1."""
    decoder: Tensor
    """The term at t = 0, a mean over its draws."""
    error: Tensor
    """Monte-Carlo standard error of ``total``; NaN where a part was drawn only once."""
    times: Tensor
    """(B, S) int64: the timesteps of the KL terms that were drawn, ascending in strata."""
    terms: Tensor
    """(B, S) float64: the KL terms at ``times``."""
    weights: Tensor
    """(B, S) float64: ``vb = (terms * weights).sum(1)``; all 1 where every term was evaluated."""
    network_calls: int
    """Evaluations of the network per image."""


def bound(
    diffusion: GaussianDiffusion,
    model: Model,
    x_start: Tensor,
    *,
    indices: Sequence[int],
    seed: int = 0,
    terms: int | None = None,
    decoder_draws: int = 1,
    probabilities: Tensor | None = None,
    clip_denoised: bool = True,
    model_kwargs: ModelKwargs = None,
) -> Bound:
    """The bound of ``x_start`` (B, ...), whose places in its data set are ``indices``.

    With ``terms`` None every timestep is evaluated, each at one draw of x_t. Otherwise the sum over t >= 1 is
    estimated from ``terms`` timesteps per image, one in each of as many strata of equal probability under
    ``probabilities`` (T,), which need not sum to 1; None is uniform. The estimate is unbiased for any
    probabilities that do not depend on its noise, and precise for those of `term_probabilities`. The decoder is
    drawn ``decoder_draws`` times.

    The noise of image i depends on (seed, i, the timestep as the network knows it, how often it was drawn) alone:
    the same for any batch size, and common to two models that are compared. Tensors in ``model_kwargs`` hold a
    row for each image. Raises `ArgumentError` unless 1 <= terms <= T - 1 and decoder_draws >= 1, for probabilities
    that are not positive, and for data that are not finite or not on the diffusion's levels; `ShapeError` for no data
    and for too few indices or probabilities; `NonFiniteError` where the network gives a term that is not finite.
    """
    x_start = checked(x_start, diffusion.levels, indices)
    _check(diffusion.num_timesteps - 1, terms, decoder_draws)
    estimate = _Estimate(diffusion, model, x_start, indices, seed, clip_denoised, model_kwargs)
    times, weights = _every_time(diffusion, len(x_start))
    if terms is not None:
        times, weights = _drawn_times(diffusion, indices, seed, terms, probabilities)
    with torch.no_grad():
        kl = estimate.values(times)
        decoders = estimate.values(torch.zeros(len(x_start), decoder_draws, dtype=torch.int64))
        prior = diffusion.prior_bpd(x_start).cpu().double()
    vb, decoder = (kl * weights).sum(1), decoders.mean(1)
    scale = _log_snr_gaps(diffusion)[times] if terms is None else torch.ones_like(weights)
    error = (_stratified_variance(kl * weights, scale) + _mean_variance(decoders)).sqrt()
    calls = times.shape[1] + decoder_draws
    return Bound(prior + vb + decoder, prior, vb, decoder, error, times, kl, weights, calls)


def _check(most: int, terms: int | None, decoder_draws: int) -> None:
    if terms is not None and not 1 <= terms <= most:
        raise ArgumentError(f"terms must be from 1 to {most}, got {terms}")
    if decoder_draws < 1:
        raise ArgumentError(f"decoder_draws must be at least 1, got {decoder_draws}")


def term_probabilities(
    diffusion: GaussianDiffusion,
    model: Model,
    x_start: Tensor,
    *,
    seed: int = 0,
    clip_denoised: bool = True,
    model_kwargs: ModelKwargs = None,
) -> Tensor:
    """Probabilities of the timesteps, (T,) float64, from a pilot: the root of each KL term's second moment.

    Evaluates the first few images of ``x_start`` at some timesteps, denser at low noise, and interpolates the term
    per length of its step in log-SNR; entry 0, the decoder, is 0 (IDDPM eq. 18, for the model as it is).
    Raises like `bound`.
    """
    images, last = checked(x_start[:PILOT_IMAGES], diffusion.levels), diffusion.num_timesteps - 1
    if last == 0:
        return torch.zeros(1, dtype=torch.float64)
    even = torch.linspace(1, last, PILOT_TIMES, dtype=torch.float64)
    dense = torch.logspace(0, math.log10(last), PILOT_TIMES, dtype=torch.float64)
    grid = torch.tensor(sorted({min(round(t), last) for t in [*even.tolist(), *dense.tolist()]}))
    told = _rows_of(model_kwargs, len(x_start), list(range(len(images))))
    key = seed_of("pilot", int(seed))
    estimate = _Estimate(diffusion, model, images, range(len(images)), key, clip_denoised, told)
    with torch.no_grad():
        moments = estimate.values(grid.expand(len(images), -1)).square().mean(0).clamp(min=1e-30)
    times = torch.arange(1, last + 1)
    gaps = _log_snr_gaps(diffusion)
    moments = moments.log() - 2 * gaps[grid].log()  # of the term per length of its step, which is smooth in t
    right = torch.searchsorted(grid, times).clamp(1 if len(grid) > 1 else 0, len(grid) - 1)
    left = (right - 1).clamp(min=0)
    share = (times - grid[left]) / (grid[right] - grid[left]).clamp(min=1)
    p = gaps[1:] * torch.lerp(moments[left], moments[right], share.double()).div(2).exp()
    p = (1 - UNIFORM_SHARE) * p / p.sum() + UNIFORM_SHARE / last
    return torch.cat([p.new_zeros(1), p])


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

    def values(self, times: Tensor) -> Tensor:
        """The terms (B, S), float64 on the CPU, at the ``times`` (B, S) of each image."""
        count, draws = times.shape
        # Time by time, so that the rows of one call are alike where all images have the same times.
        rows = [(image, t, again) for column in _columns(times) for image, (t, again) in enumerate(column)]
        parts = [self._terms(rows[i : i + CHUNK]) for i in range(0, len(rows), CHUNK)]
        flat = torch.cat(parts) if parts else torch.zeros(0)
        values = flat.cpu().double().reshape(draws, count).T
        _check_finite(values, times)
        return values

    def _terms(self, rows: Sequence[tuple[int, int, int]]) -> Tensor:
        """The term of each row: an image, a timestep, and which draw of that timestep it is."""
        device, images = self.x_start.device, [image for image, _, _ in rows]
        x_start = self.x_start[images]
        noise = normal_rows(x_start, (self._generator(*row) for row in rows))
        t = torch.tensor([t for _, t, _ in rows], device=device)
        x_t = self.diffusion.q_sample(x_start, t, noise)
        told = _rows_of(self.model_kwargs, len(self.x_start), images)
        return self.diffusion.vb_terms_bpd(self.model, x_start, x_t, t, self.clip_denoised, told)["output"]

    def _generator(self, image: int, t: int, again: int) -> torch.Generator:
        time = int(self.diffusion.floats["timestep_map"][t])
        repeated = (again,) if again else ()
        return generator_for(
            self.x_start.device, "bound", int(self.seed), int(self.indices[image]), time, *repeated
        )


def _check_finite(values: Tensor, times: Tensor) -> None:
    """Raise `NonFiniteError` unless the terms ``values`` (B, S) at ``times`` (B, S) are finite."""
    wrong = times[~values.isfinite()]
    if len(wrong):
        raise NonFiniteError(
            f"the bound's term at timestep {int(wrong.amin())} is not finite: the network's output there is not, "
            "or it is far out of range"
        )


def _columns(times: Tensor) -> list[list[tuple[int, int]]]:
    """Of each column of ``times`` (B, S): the timesteps, and how often the image had each of them before."""
    seen: list[Counter[int]] = [Counter() for _ in range(len(times))]
    columns = []
    for column in times.T.tolist():
        columns.append([(t, seen[image][t]) for image, t in enumerate(column)])
        for image, t in enumerate(column):
            seen[image][t] += 1
    return columns


def _every_time(diffusion: GaussianDiffusion, count: int) -> tuple[Tensor, Tensor]:
    times = torch.arange(1, diffusion.num_timesteps).expand(count, -1)
    return times, torch.ones(times.shape, dtype=torch.float64)


def _drawn_times(
    diffusion: GaussianDiffusion, indices: Sequence[int], seed: int, terms: int, probabilities: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Timesteps and their weights (B, S): one in each stratum of equal probability."""
    total = diffusion.num_timesteps
    p = torch.ones(total) if probabilities is None else probabilities
    if p.shape != (total,):
        raise ShapeError(f"probabilities must be ({total},), got {tuple(p.shape)}")
    p = p.detach().cpu().double()[1:]
    if not bool((p > 0).all()) or not bool(p.isfinite().all()):
        raise ArgumentError("probabilities must be positive and finite at every t >= 1")
    p = p / p.sum()
    u = torch.stack(
        [
            torch.rand(
                terms, dtype=torch.float64, generator=generator_for("cpu", "strata", int(seed), int(index))
            )
            for index in indices
        ]
    )
    position = (torch.arange(terms) + u) / terms
    place = torch.searchsorted(p.cumsum(0), position, right=True).clamp(max=total - 2)
    return place + 1, 1 / (terms * p[place])


def _stratified_variance(values: Tensor, scale: Tensor) -> Tensor:
    """Of the sum of ``values`` (B, S), drawn once in each stratum: from differences of neighbours, (B,).

    Exact where ``values / scale`` have one mean in all strata, else too large by what the means of neighbours differ.
    """
    if values.shape[1] < 2:
        return values.new_full((len(values),), math.nan if values.shape[1] else 0.0)
    between = (values / scale).diff(dim=1).square() / 2  # (B, S - 1), each a variance
    each = (torch.cat([between[:, :1], between], 1) + torch.cat([between, between[:, -1:]], 1)) / 2
    return (each * scale**2).sum(1)


def _log_snr_gaps(diffusion: GaussianDiffusion) -> Tensor:
    """(T,): how far log-SNR falls from t - 1 to t, which a KL term is roughly proportional to; 1 at t = 0."""
    levels = [diffusion.level_of_batch(t).log_snr for t in range(diffusion.num_timesteps)]
    gaps = -torch.tensor(levels, dtype=torch.float64).diff()
    largest = gaps[gaps.isfinite()].amax() if bool(gaps.isfinite().any()) else gaps.new_ones(())
    return torch.cat([gaps.new_ones(1), gaps.clamp(max=float(largest))])  # a last level may hold no signal


def _mean_variance(values: Tensor) -> Tensor:
    """Of the mean of ``values`` (B, R): NaN for a single one."""
    return (
        values.var(1) / values.shape[1] if values.shape[1] > 1 else values.new_full((len(values),), math.nan)
    )


def _rows_of(model_kwargs: ModelKwargs, count: int, rows: list[int]) -> ModelKwargs:
    """``model_kwargs`` for the images ``rows`` out of ``count``."""
    return {
        name: value[rows] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value
        for name, value in (model_kwargs or {}).items()
    }
