"""The one way in: a name or a path becomes a data set."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np

from perrin.data.arrays import from_arrays, load_npy, load_npz, value_range
from perrin.data.dataset import Dataset, fingerprint
from perrin.data.folder import load_folder
from perrin.data.idx import GZIP_MAGIC, load_idx
from perrin.data.levels import MAX_LEVELS
from perrin.errors import ArgumentError, DataError

_DIGITS_LEVELS = 17
_ACCEPTED = "`digits`, a folder of images, an .npy or .npz file, or an MNIST idx file (plain or .gz)"


def load(path: str | Path, *, levels: int | None = None, cache: Path | None = None) -> Dataset:
    """The data set at ``path``: `digits` (shipped), a folder of images, an .npy, .npz or MNIST idx file.

    The string ``"digits"`` is always the shipped set; a folder of that name is ``"./digits"``. What a file
    is, its first bytes tell. ``levels`` states that a value k is level k of so many, where the depth of the
    data does not tell. ``cache`` is a folder for the decoded images of large folders. Raises `DataError`.
    """
    if levels is not None and not 2 <= levels <= MAX_LEVELS:
        raise ArgumentError(f"levels must be a whole number from 2 to {MAX_LEVELS}, got {levels}")
    if not str(path):
        raise DataError(f"the path of the data is empty; expected {_ACCEPTED}")
    dataset = _digits() if path == "digits" else _read(Path(path), cache)
    if levels is not None:
        dataset = _stated(dataset, levels, path)
    return replace(dataset, facts=replace(dataset.facts, fingerprint=fingerprint(dataset)))


def _digits() -> Dataset:
    with resources.files("perrin.data").joinpath("digits.npz").open("rb") as file, np.load(file) as archive:
        dataset = from_arrays(archive["images"], archive["labels"], "digits")
    return _stated(dataset, _DIGITS_LEVELS, "digits")


def _read(path: Path, cache: Path | None) -> Dataset:
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        return load_folder(path, cache)
    try:
        with path.open("rb") as file:
            magic = file.read(6)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file or folder; expected {_ACCEPTED}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if magic == b"\x93NUMPY":
        return load_npy(path)
    if magic.startswith((b"PK\3\4", b"PK\5\6")):
        return load_npz(path)
    if magic.startswith((GZIP_MAGIC, b"\0\0")):
        return load_idx(path)
    raise DataError(f"{path}: not a data set (its first bytes are {magic!r}); expected {_ACCEPTED}")


def _stated(dataset: Dataset, levels: int, source: str | Path) -> Dataset:
    """``dataset`` with the stated number of levels, which its values must keep below."""
    found = dataset.facts.levels
    if found is None:
        raise DataError(f"{source}: holds continuous floats, so levels cannot be stated (got {levels})")
    if levels < found and (highest := value_range(dataset.values)[1]) >= levels:
        raise DataError(
            f"{source}: values must lie in 0..{levels - 1} for {levels} levels, the largest is {highest:.0f}"
        )
    return replace(dataset, facts=replace(dataset.facts, levels=levels))
