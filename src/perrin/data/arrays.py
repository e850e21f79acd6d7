"""Arrays from .npy and .npz files (or anywhere) as a data set, nothing ever unpickled; and writing .npz files."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from perrin.data.dataset import Dataset, Facts
from perrin.data.levels import MAX_LEVELS, level_dtype
from perrin.errors import DataError
from perrin.files import written_aside

IMAGE_KEYS = ("images", "x", "arr_0", "data")
LABEL_KEYS = ("labels", "y")
WORD_KEYS = ("class_names", "names")
_MAX_CHANNELS = 4
_MAX_CLASSES = 2**16
_CHUNK_VALUES = 2**24
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, SyntaxError, zipfile.BadZipFile, zlib.error)


def load_npy(path: Path) -> Dataset:
    """The array in an .npy file, memory-mapped where its type is one that `Dataset` holds."""
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None
    return from_arrays(values, None, path)


def write_npz(path: Path, arrays: dict[str, Any]) -> None:
    """Put ``arrays`` in the place of the .npz file at ``path`` at one stroke."""
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez(file, **arrays)


def load_npz(path: Path) -> Dataset:
    """The images of an .npz file, with labels, ``class_names`` by label, and ``names``, where there are some.

    See `IMAGE_KEYS` and `LABEL_KEYS`; an array that stands alone, or beside those, may have any key.
    """
    try:
        # Opened here, because NumPy leaves a damaged archive open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            labels = next((key for key in LABEL_KEYS if key in archive.files), None)
            others = [key for key in archive.files if key not in (labels, *WORD_KEYS)]
            images = next(
                (key for key in IMAGE_KEYS if key in others), others[0] if len(others) == 1 else None
            )
            if images is None:
                raise DataError(
                    f"{path}: expected one array or one named {', '.join(IMAGE_KEYS)}, "
                    f"found {', '.join(archive.files[:10]) or 'none'}"
                )
            dataset = from_arrays(archive[images], archive[labels] if labels else None, path)
            return _named(dataset, {key: archive[key] for key in WORD_KEYS if key in archive.files}, path)
    except DataError:
        raise
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None


def _named(dataset: Dataset, words: dict[str, np.ndarray], path: Path) -> Dataset:
    """``dataset`` with the ``names`` and, if it has labels, the ``class_names`` among ``words``."""
    classes = len(dataset.facts.class_names or ())
    for key, found in words.items():
        count = found.size if found.ndim == 1 and found.dtype.kind == "U" else -1
        if count < classes if key == "class_names" else count != len(dataset):
            expected = f"at least {classes}" if key == "class_names" else len(dataset)
            raise DataError(
                f"{path}: {key} must be {expected} strings, got {found.dtype} of shape {found.shape}"
            )
    names = words["names"].tolist() if "names" in words else dataset.names
    if "class_names" not in words or dataset.labels is None:
        return replace(dataset, names=names)
    facts = replace(dataset.facts, class_names=tuple(words["class_names"].tolist()))
    return replace(dataset, names=names, facts=facts)


def _unreadable(path: Path, error: Exception) -> DataError:
    if "allow_pickle" in str(error) or "Python objects" in str(error):
        return DataError(f"{path}: holds pickled Python objects, which are not read; save plain numbers")
    return DataError(f"{path}: damaged array file ({' '.join(str(error).split())})")


def from_arrays(values: np.ndarray, labels: np.ndarray | None, source: Path | str) -> Dataset:
    """A data set from vectors (N, D) or images (N, H, W), (N, H, W, C) or (N, C, H, W) with C from 1 to 4.

    bool has 2 levels, uint8 256, uint16 65536; other integers 256 where all values are below it, else
    65536; floats in [-1, 1] are continuous. ``labels`` are (N,) whole numbers from 0. ``source`` names the
    input in errors. Raises `DataError`.
    """
    guessed = values.dtype.kind in "iu" and values.itemsize > 2
    values, levels = _typed(_shaped(values, source), source)
    classes, labels = _classes(labels, len(values), source)
    names = [str(index) for index in range(len(values))]
    return Dataset(values, labels, names, Facts(values.shape[1:], levels, classes, len(values)), guessed)


def _shaped(values: np.ndarray, source: Path | str) -> np.ndarray:
    """``values`` as (N, D) or (N, C, H, W), without a copy."""
    shape = values.shape
    if values.ndim not in (2, 3, 4) or 0 in shape:
        raise DataError(
            f"{source}: expected vectors (N, D) or images (N, H, W), (N, H, W, C), (N, C, H, W), got {shape}"
        )
    if values.ndim != 4:
        return values if values.ndim == 2 else values[:, None]
    first, last = shape[1] <= _MAX_CHANNELS, shape[3] <= _MAX_CHANNELS
    if first and last:
        raise DataError(
            f"{source}: shape {shape} could be (N, C, H, W) or (N, H, W, C); "
            "save tiny images as (N, H, W) or flattened as (N, D)"
        )
    if not first and not last:
        raise DataError(f"{source}: expected 1 to {_MAX_CHANNELS} channels on axis 1 or 3, got shape {shape}")
    return values if first else np.moveaxis(values, 3, 1)


def _typed(values: np.ndarray, source: Path | str) -> tuple[np.ndarray, int | None]:
    """``values`` as uint8, uint16 or float32 in native byte order, and their number of levels."""
    kind = values.dtype.kind
    if kind == "b":
        return values.astype(np.uint8), 2
    if kind == "f":
        _check_floats(values, source)
        return values.astype(np.float32, copy=False), None
    if kind not in "iu":
        raise DataError(f"{source}: expected whole numbers or floats, got {values.dtype}")
    if kind == "u" and values.itemsize <= 2:
        levels = 256 if values.itemsize == 1 else MAX_LEVELS
    else:
        levels = _levels_of_wide(values, source)
    return values.astype(level_dtype(levels), copy=False), levels


def _levels_of_wide(values: np.ndarray, source: Path | str) -> int:
    low, high = value_range(values)
    if low < 0 or high >= MAX_LEVELS:
        raise DataError(
            f"{source}: whole numbers must lie in 0..{MAX_LEVELS - 1}, got {low:.0f} to {high:.0f}"
        )
    return 256 if high < 256 else MAX_LEVELS


def _check_floats(values: np.ndarray, source: Path | str) -> None:
    for start, chunk in _chunks(values):
        bad = ~np.isfinite(chunk)
        if bad.any():
            row, *rest = (int(i) for i in np.argwhere(bad)[0])
            raise DataError(f"{source}: {chunk[(row, *rest)]} at index {(start + row, *rest)}")
    low, high = value_range(values)
    if low < -1 or high > 1:
        raise DataError(
            f"{source}: floats must lie in [-1, 1], got {low:g} to {high:g}; "
            "scale them, or save level indices as uint8 or uint16"
        )


def value_range(values: np.ndarray) -> tuple[float, float]:
    """The least and the largest value, read in pieces so that a memory map stays on disk."""
    ranges = [(float(chunk.min()), float(chunk.max())) for _, chunk in _chunks(values)]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _chunks(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    rows = max(1, _CHUNK_VALUES // max(1, values[0].size))
    for start in range(0, len(values), rows):
        yield start, values[start : start + rows]


def _classes(
    labels: np.ndarray | None, n: int, source: Path | str
) -> tuple[tuple[str, ...] | None, np.ndarray | None]:
    if labels is None:
        return None, None
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{source}: expected {n} whole numbers as labels, got {labels.dtype} of shape {labels.shape}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= _MAX_CLASSES:
        raise DataError(f"{source}: labels must lie in 0..{_MAX_CLASSES - 1}, got {low} to {high}")
    return tuple(str(label) for label in range(high + 1)), labels.astype(np.int64)
