"""Dynamic thresholding of x_start (Imagen, arXiv:2205.11487 section 2.3)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from perrin.errors import ArgumentError
from perrin.tensors import append_dims


def dynamic_threshold(percentile: float = 0.995) -> Callable[[Tensor], Tensor]:
    """A ``denoised_fn``: x_start clipped to [-s, s] and divided by s, eps then made to match.

    s is the ``percentile`` of each example's absolute values, at least 1: a strongly guided x_start keeps its
    contrasts where clipping would saturate it. Raises `ArgumentError` unless 0 < percentile <= 1.
    """
    if not 0 < percentile <= 1:
        raise ArgumentError(f"percentile must be a share, above 0 and at most 1, got {percentile}")

    def threshold(x_start: Tensor) -> Tensor:
        s = append_dims(_quantile(x_start.abs().flatten(1), percentile).clamp(min=1), x_start.ndim)
        return x_start.clamp(-s, s) / s

    return threshold


def _quantile(values: Tensor, share: float) -> Tensor:
    """The quantile (B,) of each row of ``values`` (B, N), linear between neighbours, for rows of any length."""
    place = share * (values.shape[1] - 1)
    below = int(place)
    low = values.kthvalue(below + 1, dim=1).values
    if below == place:
        return low
    return low.lerp(values.kthvalue(below + 2, dim=1).values, place - below)
