"""What every measurement of a likelihood asks of its examples."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from perrin.errors import ArgumentError, ShapeError
from perrin.tensors import at_least_float32, widest_dtype

_OFF_LEVEL = 0.1  # of a bin; float32 keeps the highest of 65,536 levels to 0.004


def checked(x_start: Tensor, levels: int | None, indices: Sequence[int] | None = None) -> Tensor:
    """``x_start`` (B, ...) in float32 or better, if it can be measured; ``levels`` None is continuous data.

    Raises `ShapeError` for no examples, and more or fewer than ``indices`` name; `ArgumentError` for values that are
    not finite or not on the levels 2 k / (levels - 1) - 1.
    """
    x = at_least_float32(x_start)
    if x.numel() == 0 or x.ndim < 2:
        raise ShapeError(f"x_start must have shape (B, ...), got {tuple(x.shape)}")
    if indices is not None and len(indices) != len(x):
        raise ShapeError(f"indices must name {len(x)} images, got {len(indices)}")
    if not bool(x.isfinite().all()):
        raise ArgumentError("x_start must be finite, got NaN or infinity")
    if levels is None:
        return x
    if levels < 2:
        raise ArgumentError(f"levels must be at least 2, or None for continuous data, got {levels}")
    place = x.detach().to(widest_dtype(x.device)).add(1).mul((levels - 1) / 2)
    off = (place - place.round()).abs().amax() > _OFF_LEVEL
    if bool(off | (place.amin() < -_OFF_LEVEL) | (place.amax() > levels - 1 + _OFF_LEVEL)):
        raise ArgumentError(f"x_start must hold the {levels} levels 2 k / {levels - 1} - 1, got other values")
    return x
