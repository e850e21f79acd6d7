"""Dequantization: how whole levels become points of a density, and what that costs.

A level k of L is the middle 2 k / (L - 1) - 1 of a bin of width 2 / (L - 1). A point x~ drawn in the bin from
q has log P(bin) >= E[log p(x~) - log q(x~)], for any density p.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from perrin.errors import ArgumentError


class Offset(NamedTuple):
    """A displacement from the middle of the bin, and the price of it."""

    value: Tensor
    """(B, ...), at most half a bin."""
    log_density: Tensor
    """log q of each image's offset, (B,) in nats."""


@dataclass(frozen=True)
class Dequantization(ABC):
    """A distribution q within the bin, and ``draws`` points from it for each image.

    The bounds of the draws are averaged, or ``weighted`` into one that is tighter: the log of the mean of p / q
    (arXiv:1509.00519 eq. 8). That needs the exact trace: the errors of an estimated one would be averaged in the
    wrong place and flatter the model. ``start`` is the sigma / alpha whose density is taken for that of the data, by
    default the chain's first; the bound holds wherever it is, and the model is another one.

    Raises `ArgumentError` for fewer than 1 draw, or 2 weighted ones.
    """

    draws: int = 1
    weighted: bool = False
    start: float | None = None

    def __post_init__(self) -> None:
        fewest = 2 if self.weighted else 1
        if self.draws < fewest:
            raise ArgumentError(f"draws must be at least {fewest}, got {self.draws}")

    @property
    @abstractmethod
    def name(self) -> str:
        """What results call it."""

    @abstractmethod
    def offset(self, uniform: Tensor, half_bin: float, noise: float) -> Offset:
        """The offset made of ``uniform`` (B, ...) in [0, 1); ``noise`` is sigma / alpha where p is taken."""


@dataclass(frozen=True)
class Uniform(Dequantization):
    """Uniform over the bin: each dimension costs log2((levels - 1) / 2) bits.

    Where the noise is far below half a bin, a network has never seen such points, and their density is low: a
    ``start`` of about 0.8 half bins suits it.
    """

    @property
    def name(self) -> str:
        """What results call it."""
        return "uniform"

    def offset(self, uniform: Tensor, half_bin: float, noise: float) -> Offset:
        """The offset made of ``uniform`` (B, ...) in [0, 1); ``noise`` plays no part."""
        density = torch.full_like(uniform.flatten(1)[:, 0], -math.log(2 * half_bin) * uniform[0].numel())
        return Offset((2 * uniform - 1) * half_bin, density)


@dataclass(frozen=True)
class TruncatedNormal(Dequantization):
    """Normal with the standard deviation of the noise, cut at the bin's edges (arXiv:2305.03935 section 4.2).

    Its points are those that a network was trained on, up to the cut. What a point costs is its own -log q, where
    the paper takes the mean, the entropy: with the same mean, it cancels what the draw adds to log p.
    """

    @property
    def name(self) -> str:
        """What results call it."""
        return "truncated-normal"

    def offset(self, uniform: Tensor, half_bin: float, noise: float) -> Offset:
        """The offset made of ``uniform`` (B, ...) in [0, 1), by the inverse of the distribution."""
        edge = half_bin / noise
        inside = math.erf(edge / math.sqrt(2))
        z = math.sqrt(2) * torch.erfinv((2 * uniform - 1) * inside)
        z = z.clamp(-edge, edge)
        log_scale = 0.5 * math.log(2 * math.pi) + math.log(noise * inside)
        density = -(0.5 * z**2 + log_scale).flatten(1).sum(1)
        return Offset(noise * z, density)
