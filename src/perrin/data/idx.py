"""MNIST's idx files, plain or compressed by gzip."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from perrin.data.arrays import from_arrays
from perrin.data.dataset import Dataset
from perrin.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
_UNSIGNED_BYTE = 8


def load_idx(path: Path) -> Dataset:
    """The images of an idx file, with the labels of the file beside it where there is one.

    That file is named as MNIST names it: ``labels`` for ``images`` and ``idx1`` for ``idx3``, with or
    without ``.gz``. Raises `DataError` for a file that is damaged, cut short or holds no images.
    """
    images = _read(path)
    if images.ndim == 1:
        raise DataError(f"{path}: holds {len(images)} labels, not images; give the images-idx3 file")
    beside = _labels_beside(path)
    if beside is None:
        return from_arrays(images, None, path)
    labels = _read(beside)
    if labels.shape != images.shape[:1]:
        raise DataError(
            f"{beside}: shape {labels.shape} does not fit the {len(images)} images of {path.name}"
        )
    return from_arrays(images, labels, path)


def _labels_beside(path: Path) -> Path | None:
    if "images" not in path.name:
        return None
    name = path.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    candidates = (path.with_name(name), path.with_name(name + ".gz"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _read(path: Path) -> np.ndarray:
    """The array of an idx file: two zeros, the type, the rank, big-endian sizes, then the values."""
    try:
        content = path.read_bytes()
        if content.startswith(GZIP_MAGIC):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error})") from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE or content[3] == 0:
        raise DataError(
            f"{path}: expected an idx file of unsigned bytes, got the header {content[:4].hex(' ')}"
        )
    rank = content[3]
    start = 4 + 4 * rank
    if len(content) < start:
        raise DataError(f"{path}: cut short within the header")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", rank, offset=4))
    if len(content) - start != int(np.prod(shape, dtype=object)):
        raise DataError(f"{path}: the header states shape {shape}, but {len(content) - start} values follow")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
