"""Masks: which pixels of an image are meant, from a picture or an array."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from perrin.data.decode import decode
from perrin.errors import DataError


def load_mask(path: Path) -> np.ndarray:
    """The mask in ``path``, (H, W) of bool: True where a picture is white, or an .npy array (H, W) is not 0.

    White is a mean of the colours above half of the highest level; alpha has no part in it. Raises `OSError` where
    there is no file or it may not be read, `DataError` for a damaged one, or an array of another shape or kind.
    """
    path.open("rb").close()  # decoding takes a missing file for a damaged one
    if path.suffix == ".npy":
        return _from_array(path)
    pixels, levels = decode(path)
    colours = pixels[: 1 if len(pixels) < 3 else 3]
    white: np.ndarray = colours.mean(0) > (levels - 1) / 2
    return white


def rule_of(path: Path) -> str:
    """What marks a pixel in the mask at ``path``, in words."""
    if path.suffix == ".npy":
        return "what is not 0 is filled"
    return "filled is what is white: colours above half of the highest level on average; alpha is ignored"


def _from_array(path: Path) -> np.ndarray:
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: damaged array file ({' '.join(str(error).split())})") from None
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        raise DataError(f"{path}: expected numbers (H, W), got {values.dtype} of shape {values.shape}")
    marked: np.ndarray = values != 0
    return marked
