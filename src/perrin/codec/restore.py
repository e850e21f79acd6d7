"""Decompressed data sets as files that the readers of `perrin.data` know: .npy, .npz, or a folder of PNG files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from perrin.codec.container import Header
from perrin.data import Dataset, write_image
from perrin.data.arrays import write_npz
from perrin.data.levels import MAX_LEVELS
from perrin.errors import ArgumentError, DataError
from perrin.files import aside, sync_directory, written_aside


def check_target(out: Path, header: Header) -> None:
    """Raise `ArgumentError` where what ``header`` describes cannot be written to ``out``, or something is there."""
    if out.suffix not in ("", ".npy", ".npz"):
        raise ArgumentError(f"--out must end in .npy or .npz, or name a folder, got {out}")
    if out.exists() and not (out.suffix == "" and out.is_dir() and not any(out.iterdir())):
        raise ArgumentError(f"{out} exists, and nothing is overwritten: choose another --out")
    if out.suffix == "":
        _check_pictures(out, header)
        _png_names(header)


def _check_pictures(out: Path, header: Header) -> None:
    wide = header.levels == MAX_LEVELS and header.shape[1] == 1
    if len(header.shape) != 4 or header.shape[1] > 4 or not (header.levels == 256 or wide):
        raise ArgumentError(
            f"--out {out}: PNG files keep images of 256 levels, or of {MAX_LEVELS} and one channel, not "
            f"{header.shape[1:]} of {header.levels} levels: choose .npy or .npz"
        )


def write(out: Path, dataset: Dataset, header: Header) -> None:
    """The data set of ``header`` as the ending of ``out`` says, whole or not at all; see `check_target`.

    An .npz file has ``images`` (N, C, H, W) or ``data`` (N, D) and, where there are such, ``labels`` (N,),
    ``class_names`` by label, and ``names`` (N,).
    """
    if out.suffix == "":
        _write_folder(out, dataset, _png_names(header))
        return
    if out.suffix == ".npy":
        with written_aside(out) as hidden:
            np.save(hidden, dataset.values)
        return
    arrays: dict[str, Any] = {"images" if dataset.values.ndim == 4 else "data": dataset.values}
    if dataset.labels is not None:
        arrays |= {"labels": dataset.labels, "class_names": np.array(dataset.facts.class_names)}
    if header.names:
        arrays["names"] = np.array(header.names)
    write_npz(out, arrays)


def _write_folder(out: Path, dataset: Dataset, names: Sequence[str]) -> None:
    with _filled_aside(out) as folder:
        for name, values in zip(names, dataset.values, strict=True):
            write_image(folder / name, values, dataset.facts.levels)


@contextmanager
def _filled_aside(out: Path) -> Iterator[Path]:
    """A hidden folder that becomes ``out``, or is gone if the block raises."""
    out.parent.mkdir(parents=True, exist_ok=True)
    hidden = aside(out)
    hidden.mkdir()
    try:
        yield hidden
        if out.is_dir():
            out.rmdir()  # refused if it is no longer empty
        hidden.rename(out)
        sync_directory(out.parent)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _png_names(header: Header) -> list[str]:
    """Where in a folder each example goes: its own name with .png, or its number.

    Raises `DataError` for names that lead out of the folder, or that two examples share.
    """
    if not header.names:
        return [f"{index:05d}.png" for index in range(header.shape[0])]
    for name in header.names:
        if {"", ".", ".."} & set(name.split("/")) or set(name) & set("\\:\0"):
            raise DataError(f"the file names an example {name!r}, which is no path within a folder")
    short = [str(PurePosixPath(name).with_suffix(".png")) for name in header.names]
    found = short if len(set(short)) == len(short) else [f"{name}.png" for name in header.names]
    if len(set(found)) < len(found):
        raise DataError("the file gives two examples one name: choose .npy or .npz for --out")
    return found
