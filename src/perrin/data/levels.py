"""Level indices and the unit interval [-1, 1] that networks see, and the way between them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from perrin.errors import ArgumentError

MAX_LEVELS = 65536


def level_dtype(levels: int) -> type[np.uint8] | type[np.uint16]:
    """The narrowest unsigned type that holds the indices 0 to ``levels`` - 1."""
    return np.uint8 if levels <= 256 else np.uint16


def to_unit(values: np.ndarray, levels: int | None, device: torch.device | str = "cpu") -> Tensor:
    """Float32 ``2 k / (levels - 1) - 1`` for level indices k, in [-1, 1]; a copy of ``values``' shape.

    ``levels`` None: continuous values, already in [-1, 1], as float32. The narrow type is what travels
    to ``device``; the arithmetic happens there.
    """
    tensor = torch.from_numpy(np.require(values, requirements=["C", "W"])).to(device)
    tensor = tensor.to(torch.float32, copy=True)
    return tensor if levels is None else tensor.mul_(2).div_(levels - 1).sub_(1)


def to_levels(x: Tensor, levels: int | None) -> np.ndarray:
    """Level indices nearest to ``x``, clamped to 0 … ``levels`` - 1, as uint8 or uint16 of the same shape.

    Undoes `to_unit` exactly. ``levels`` None: float32 clamped to [-1, 1]. Raises `ArgumentError` where
    ``x`` is not finite.
    """
    x = x.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(x).all()):
        place = tuple(torch.nonzero(~torch.isfinite(x))[0].tolist())
        raise ArgumentError(f"levels need finite values, got {x[place].item()} at index {place}")
    x = x.clamp(-1, 1)
    if levels is None:
        return x.numpy()
    indices: np.ndarray = ((x + 1) * ((levels - 1) / 2)).round().numpy().astype(level_dtype(levels))
    return indices
