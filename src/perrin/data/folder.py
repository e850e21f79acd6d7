"""A folder of images: found, decoded once, and cached where it is large."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from perrin.data.dataset import Dataset, Facts
from perrin.data.decode import SUFFIXES, Picture, decode
from perrin.errors import DataError
from perrin.files import written_aside

CACHE_ABOVE_BYTES = 2**27
"""Decoded size from which a folder is kept as a memory-mapped file: a few seconds of decoding."""


def load_folder(folder: Path, cache: Path | None) -> Dataset:
    """The images below ``folder``, sorted by path; all must have one size, colour mode and depth.

    Where every image lies in a direct sub-folder, the sub-folders' names are the classes. Decoded once: into
    memory, or above `CACHE_ABOVE_BYTES` into a memory-mapped file in ``cache`` that is used again until a
    name, size or time of the files changes. Raises `DataError` naming the file that does not fit.
    """
    names = sorted(_image_names(folder), key=lambda name: name.split("/"))
    if not names:
        raise DataError(f"{folder}: no images in this folder (looked for {', '.join(SUFFIXES)})")
    first = decode(folder / names[0])
    shape = (len(names), *first.pixels.shape)
    size = int(np.prod(shape)) * first.pixels.itemsize
    if cache is None or size <= CACHE_ABOVE_BYTES:
        values = _in_memory(folder, shape, first.pixels.dtype)
        _fill(values, folder, names, first)
    else:
        values = _cached(folder, names, first, cache / f"{folder.name}-{_fingerprint(folder, names)}.npy")
    classes, labels = _classes(names)
    return Dataset(values, labels, names, Facts(first.pixels.shape, first.levels, classes, len(names)))


def _image_names(folder: Path) -> Iterator[str]:
    """Paths below ``folder``, with slashes; hidden ones are left out, links are followed once."""
    seen = set()
    for parent, children, files in os.walk(folder, followlinks=True):
        here = os.path.realpath(parent)
        children[:] = sorted(child for child in children if not child.startswith(".") and here not in seen)
        if here in seen:
            continue
        seen.add(here)
        for file in files:
            if not file.startswith(".") and file.lower().endswith(SUFFIXES):
                yield (Path(parent) / file).relative_to(folder).as_posix()


def _classes(names: Sequence[str]) -> tuple[tuple[str, ...] | None, np.ndarray | None]:
    parts = [name.split("/") for name in names]
    if any(len(part) != 2 for part in parts):
        return None, None
    classes = sorted({part[0] for part in parts})
    number = {name: label for label, name in enumerate(classes)}
    return tuple(classes), np.array([number[part[0]] for part in parts], dtype=np.int64)


def _in_memory(folder: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    try:
        return np.empty(shape, dtype)
    except MemoryError as error:
        raise DataError(f"{folder}: the decoded images do not fit in memory ({error})") from None


def _fill(out: np.ndarray, folder: Path, names: Sequence[str], first: Picture) -> None:
    """Decodes ``names`` into ``out`` (N, C, H, W), one after the other: threads were measured to be no faster."""
    for index, name in enumerate(names):
        picture = decode(folder / name)
        _check_alike(folder, (names[0], first), (name, picture))
        out[index] = picture.pixels


def _check_alike(folder: Path, one: tuple[str, Picture], other: tuple[str, Picture]) -> None:
    (name, picture), (name2, picture2) = one, other
    if picture.kind != picture2.kind:
        faults = f"{name} is {picture.kind}, {name2} is {picture2.kind}"
        raise DataError(f"{folder}: images must share one colour mode and depth, but {faults}")
    (_, height, width), (_, height2, width2) = picture.pixels.shape, picture2.pixels.shape
    if (height, width) != (height2, width2):
        faults = f"{name} is {width}x{height}, {name2} is {width2}x{height2} (width x height)"
        raise DataError(f"{folder}: images must share one size, but {faults}")


def _fingerprint(folder: Path, names: Sequence[str]) -> str:
    digest = blake2b(digest_size=12)
    for name in names:
        stat = (folder / name).stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _cached(folder: Path, names: Sequence[str], first: Picture, path: Path) -> np.ndarray:
    """The images as a read-only memory map of ``path``, which is written if it is not there."""
    if not path.is_file():
        shape = (len(names), *first.pixels.shape)
        with written_aside(path) as aside:
            _check_space(path.parent, int(np.prod(shape)) * first.pixels.itemsize)
            out = open_memmap(aside, mode="w+", dtype=first.pixels.dtype, shape=shape)
            _fill(out, folder, names, first)
            out.flush()
    return open_memmap(path, mode="r")


def _check_space(folder: Path, size: int) -> None:
    # Writing to a memory map on a full disk kills the process, so it is found out before.
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DataError(
            f"{folder}: the decoded images need {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        )
