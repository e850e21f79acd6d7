"""How a network is told its inputs: the time, the class, and the fine detail of the values."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perrin.errors import ArgumentError, ShapeError

NO_CLASS = -1
"""The label of an example whose class a conditional network is not told."""

MIN_TIME_FEATURES = 32
"""Fewest features of the time that a network sees, however narrow it is."""


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """The sinusoidal features (B, dim) of times ``t`` (B,), integer or fractional.

    First ``dim // 2`` cosines, then as many sines, at angular frequencies that fall geometrically from 1
    towards ``1 / max_period``; an odd ``dim`` ends in a zero. In float32, or float64 where ``t`` is.
    Source: arXiv:1706.03762 section 3.5, with the cosines first as in Improved DDPM.
    """
    half = dim // 2
    dtype = torch.promote_types(t.dtype, torch.float32)
    exponents = torch.arange(half, dtype=dtype, device=t.device) / max(half, 1)
    angles = t.to(dtype)[:, None] * torch.exp(-math.log(max_period) * exponents)  # (B, half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def check_classes(y: Tensor, count: int) -> None:
    """Raise `ArgumentError` unless integers ``y`` (B,) are `NO_CLASS` or below ``count``, where looking is free.

    That is on the CPU, outside of compiled code.
    """
    if y.device.type != "cpu" or torch.compiler.is_compiling() or not len(y):
        return
    low, high = (int(end) for end in y.aminmax())
    if low < NO_CLASS or high >= count:
        raise ArgumentError(f"y must hold classes from 0 to {count - 1}, or {NO_CLASS}, got {low} to {high}")


class Conditioning(nn.Module):
    """The embedding (B, width) of the time and, in a conditional network, of the class; it ends in a SiLU.

    Where the label is `NO_CLASS`, nothing is added to the time's.
    """

    def __init__(self, channels: int, width: int, num_classes: int | None) -> None:
        super().__init__()
        self.time_features = max(channels, MIN_TIME_FEATURES)
        self.num_classes = num_classes
        self.time_in = nn.Linear(self.time_features, width)
        self.time_out = nn.Linear(width, width)
        self.classes = None if num_classes is None else nn.Embedding(num_classes, width)

    def forward(self, t: Tensor, y: Tensor | None, batch: int) -> Tensor:
        """Raises `ArgumentError` or `ShapeError` unless ``t`` (B,) and ``y`` (B,) or None fit the network."""
        if t.shape != (batch,):
            raise ShapeError(f"t must have shape ({batch},), one time per example, got {tuple(t.shape)}")
        features = timestep_embedding(t, self.time_features)
        h = F.silu(self.time_in(features.to(self.time_in.weight.dtype)))
        embedding: Tensor = self.time_out(h)
        if self.classes is not None:
            labels = self._labels(y, batch, self.classes.num_embeddings)
            told = (labels != NO_CLASS).to(embedding.dtype)[:, None]
            embedding = embedding + told * self.classes(labels.masked_fill(labels == NO_CLASS, 0))
        elif y is not None:
            raise ArgumentError("y must be None for a network without classes (num_classes=None), got labels")
        return F.silu(embedding)

    def _labels(self, y: Tensor | None, batch: int, count: int) -> Tensor:
        if y is None:
            raise ArgumentError(f"y must hold class labels for a network of {count} classes, got None")
        if y.is_floating_point():
            raise ArgumentError(f"y must hold integer class labels, got {y.dtype}")
        if y.shape != (batch,):
            raise ShapeError(f"y must have shape ({batch},), one label per example, got {tuple(y.shape)}")
        check_classes(y, count)
        return y.long()


class FourierFeatures(nn.Module):
    """The input with sin and cos of 2 pi 2^n x beside it: (B, C, ...) to (B, C (1 + 2 len(n)), ...).

    They show a network the last bits of values in [-1, 1]: n = 6 turns half round from one level of 8-bit
    data to the next. In float32 or better. Source: VDM, arXiv:2107.00630 appendix C.
    """

    def __init__(self, n: Sequence[int]) -> None:
        super().__init__()
        self.n = tuple(n)

    def forward(self, x: Tensor) -> Tensor:
        """The channels of x, of the sines by n, of the cosines by n; x itself where ``n`` is empty."""
        if not self.n:
            return x
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        angles = torch.cat([2 * math.pi * 2**n * x for n in self.n], dim=1)  # (B, C len(n), ...)
        return torch.cat([x, angles.sin(), angles.cos()], dim=1)

    def channels(self, channels: int) -> int:
        """How many channels come out for ``channels`` that go in."""
        return channels * (1 + 2 * len(self.n))

    def extra_repr(self) -> str:
        return f"n={self.n}"
