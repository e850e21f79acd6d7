"""DDIM's inverse by fixed-point iteration, with the residual of every step: a certificate, or "not converged"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from perrin.denoiser import Denoiser
from perrin.errors import ArgumentError
from perrin.guidance import Guidance
from perrin.noise import CLEAN
from perrin.reverse import CondFn, Model, ModelKwargs
from perrin.samplers.bdia import DATA_STD
from perrin.samplers.ddim import SamplerDDIM
from perrin.tensors import Coefficient, append_dims, mean_flat, mix, scale

MEMORY = 4
"""Earlier iterates that a new one is combined of."""

LEAST_DAMPING = 0.25
"""A share that halving does not go below: what still grows then needs another direction, not a smaller step."""

PATIENCE = 8
"""Calls in which the residual of a sample's step from the data must fall by the share `LEAST_GAIN`, else that step is
given up: predictions of discrete data lie near a level there, whatever z is. In later steps residuals may wander for
15 calls before they fall."""

LEAST_GAIN = 0.1

_RIDGE = 10  # roundings of the trace: keeps the least squares solvable where earlier moves are alike


class Inversion(NamedTuple):
    """An x_T, and how nearly each DDIM step from it leads where it should."""

    noise: Tensor
    """x_T, shaped like the data."""
    residuals: Tensor
    """Root mean square of what each step misses its target by, (steps, B), in the order of inversion, clean end
    first."""
    converged: Tensor
    """Whether all residuals are at most the tolerance, (B,)."""
    network_calls: int
    """Calls of the network, each for the whole batch."""


@dataclass(frozen=True)
class FixedPoint:
    """Finds the x_T whose DDIM samples are given data, step by step upwards.

    A step solves ``DDIM(z, t to s) = x_s`` for z by Anderson's acceleration of the fixed-point iteration, from the
    naive guess. Each sample goes its own way: it keeps its best iterate, halves its step while the residual
    grows, and rests once its residual is at most ``tolerance``, or in the step from the data has hardly fallen in
    `PATIENCE` calls. ``iterations`` bounds the network calls of a step.

    Raises `ArgumentError` unless ``iterations`` >= 1 and ``tolerance`` >= 0, and where eta is not 0.
    """

    sampler: SamplerDDIM
    iterations: int = 30
    tolerance: float = 1e-5
    """In the units of x, as a root mean square. Float32 reaches some 1e-6, float64 some 1e-14."""

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ArgumentError(f"iterations must be at least 1, got {self.iterations}")
        if not self.tolerance >= 0:
            raise ArgumentError(f"tolerance must be at least 0, got {self.tolerance}")
        self.sampler.check_deterministic()

    @torch.no_grad()
    def invert(
        self,
        model: Model,
        x_start: Tensor,
        *,
        clip_denoised: bool = False,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
        guidance: Sequence[Guidance] = (),
    ) -> Inversion:
        """The inversion of ``x_start`` (B, ...) under the arguments of `SamplerDDIM.invert`.

        A step may have no solution, and then does not converge: where predictions are clipped, or hardly depend on
        z, as those of discrete data at the first timestep, which lie near a level whatever z is. Give the sampler the
        grid "log-snr" or "karras": noise beyond sigma / alpha = 80, unclipped, blows up the network's errors.
        """
        denoise = self.sampler.denoiser(model, clip_denoised, denoised_fn, cond_fn, model_kwargs, guidance)
        times = self.sampler.times[::-1]
        x, eps = x_start, denoise(x_start, times[1]).eps  # the network has not seen the data's own level
        residuals, calls = [], 1
        for s, t in pairwise(times):
            found, made = self._solved(_Step(denoise, x, s, t), eps)
            x, eps = found.z, found.eps
            residuals.append(found.residual)
            calls += made
        all_residuals = torch.stack(residuals)
        return Inversion(x, all_residuals, (all_residuals <= self.tolerance).all(0), calls)

    def _solved(self, step: _Step, eps: Tensor) -> tuple[_Trial, int]:
        """The best trial of each sample, and the network calls that it took; ``eps`` is that of the step below."""
        best, calls = step.tried(step.guess(eps)), 1
        damping = torch.ones_like(best.residual)
        moves: list[_Move] = []
        reached = [best.residual]
        while calls < self.iterations and not bool((resting := self._resting(step, reached)).all()):
            trial = step.tried(_where(resting, best.z, _proposed(best, moves, damping)))
            moves = [_Move(trial.z - best.z, trial.change - best.change), *moves][:MEMORY]
            better = trial.residual < best.residual
            damping = torch.where(better, 1.0, (damping / 2).clamp(min=LEAST_DAMPING))
            best = _Trial(*(_where(better, new, old) for new, old in zip(trial, best, strict=True)))
            reached.append(best.residual)
            calls += 1
        return best, calls

    def _resting(self, step: _Step, reached: Sequence[Tensor]) -> Tensor:
        """Which samples have no more to gain of ``step``, (B,), by the residual that each call has ``reached``."""
        done = reached[-1] <= self.tolerance
        if step.s != CLEAN or len(reached) <= PATIENCE:
            return done
        return done | (reached[-1] > (1 - LEAST_GAIN) * reached[-1 - PATIENCE])


class _Trial(NamedTuple):
    """A guess at a step's solution, and what the network made of it."""

    z: Tensor
    eps: Tensor
    change: Tensor
    """By how much z should change, shaped like it."""
    residual: Tensor
    """(B,)."""


class _Move(NamedTuple):
    """What one move of z did to the change that is still called for."""

    z: Tensor
    change: Tensor


@dataclass(frozen=True)
class _Step:
    """The equation DDIM(z, t to s) = x_s."""

    denoise: Denoiser
    x_s: Tensor
    s: float
    t: float

    def guess(self, eps: Tensor) -> Tensor:
        """The naive inversion's z, of the ``eps`` that belongs to x_s."""
        (alpha, sigma), (alpha_s, sigma_s) = self.denoise.schedule(self.t), self.denoise.schedule(self.s)
        return mix(alpha / alpha_s, self.x_s, sigma - alpha / alpha_s * sigma_s, eps)

    def tried(self, z: Tensor) -> _Trial:
        """``z`` with one call of the network."""
        alpha_s, sigma_s = self.denoise.schedule(self.s)
        x_start, eps = self.denoise(z, self.t)
        missed = mix(1.0, self.x_s, -1.0, mix(alpha_s, x_start, sigma_s, eps))
        return _Trial(z, eps, scale(1 / self.slope, missed), mean_flat(missed**2).sqrt())

    @property
    def slope(self) -> Coefficient:
        """d DDIM(z, t to s) / dz for Gaussian data of `DATA_STD`.

        For data of any larger spread it is alpha_s / alpha_t, which makes of the iteration the usual one,
        ``z <- DDIM^-1(x_s, eps(z, t))``: slow at the noisy end, where x_t says little of x_0.
        """
        (alpha, sigma), (alpha_s, sigma_s) = self.denoise.schedule(self.t), self.denoise.schedule(self.s)
        kept, variance = sigma_s / sigma, DATA_STD**2
        return kept + (alpha_s - kept * alpha) * alpha * variance / (alpha**2 * variance + sigma**2)


def _proposed(best: _Trial, moves: Sequence[_Move], damping: Tensor) -> Tensor:
    """Anderson's next z: ``moves`` combined so that of the change little is left, and that, damped (B,), made."""
    share = append_dims(damping, best.z.ndim)
    if not moves:
        return best.z + share * best.change
    changes = torch.stack([move.change.flatten(1) for move in moves], 1)  # (B, moves, D)
    places = torch.stack([move.z.flatten(1) for move in moves], 1)
    normal = torch.einsum("bmd,bnd->bmn", changes, changes)
    rounding = torch.finfo(normal.dtype)
    ridge = _RIDGE * rounding.eps * normal.diagonal(dim1=1, dim2=2).sum(1) + rounding.tiny
    normal = normal + torch.diag_embed(ridge[:, None].expand(normal.shape[:2]))
    right = torch.einsum("bmd,bd->bm", changes, best.change.flatten(1))
    weights = torch.linalg.solve(normal, right)[..., None]  # (B, moves, 1)
    left = best.change - (weights * changes).sum(1).reshape(best.z.shape)
    proposed: Tensor = best.z - (weights * places).sum(1).reshape(best.z.shape) + share * left
    return proposed


def _where(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(append_dims(rows, new.ndim), new, old)
