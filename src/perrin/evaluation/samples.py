"""Where samples go: one whole file per sample as it is drawn, so that an interrupted command goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from perrin.data import Facts, write_grid, write_image
from perrin.data.arrays import write_npz
from perrin.data.decode import decode
from perrin.errors import RunError
from perrin.files import write_text, written_aside

MAX_IN_GRID = 400
MOST_COLUMNS = 20
"""The most classes that have a column each."""
_SETTINGS = "settings.json"
_BEFORE = {"command": "sample"}  # what settings without it are of


def has_pictures(facts: Facts) -> bool:
    """Whether the data are images, which PNG files can show."""
    return len(facts.shape) == 3


@dataclass(frozen=True)
class PictureFolder:
    """``00000.png`` and so on, with ``grid.png`` at the end."""

    target: Path
    levels: int | None

    def done(self) -> set[int]:
        """The numbers of the samples that are there."""
        return {int(path.stem) for path in self.target.glob("*.png") if path.stem.isdecimal()}

    def write(self, number: int, values: np.ndarray) -> None:
        """Keep one sample, (C, H, W) level indices."""
        write_image(self._path(number), values, self.levels)

    def finish(self, count: int, classes: list[int] | None) -> dict[str, str]:
        """Draw the grid of the first samples, a column for each class; returns the paths written."""
        shown = [decode(self._path(i)) for i in range(min(count, MAX_IN_GRID))]
        grid = self.target / "grid.png"
        pixels = np.stack([picture.pixels for picture in shown])
        kinds = len(set(classes or ()))
        write_grid(grid, pixels, shown[0].levels, columns=kinds if 1 < kinds <= MOST_COLUMNS else None)
        return {"samples": str(self.target), "grid": str(grid)}

    def _path(self, number: int) -> Path:
        return self.target / f"{number:05d}.png"


@dataclass(frozen=True)
class ArrayFile:
    """An .npz file of ``images`` (N, H, W, C) or ``data`` (N, D), with ``labels`` where there are classes.

    Until it is finished, single samples are kept in a folder beside it.
    """

    target: Path
    settings: Mapping[str, Any]

    @property
    def parts(self) -> Path:
        """The folder of single samples."""
        return self.target.with_name(f"{self.target.name}.parts")

    def done(self) -> set[int]:
        """The numbers of the samples that are there."""
        return {int(path.stem) for path in self.parts.glob("*.npy") if path.stem.isdecimal()}

    def write(self, number: int, values: np.ndarray) -> None:
        """Keep one sample, (C, H, W) or (D,)."""
        with written_aside(self._path(number)) as aside, aside.open("wb") as file:
            np.save(file, values)

    def finish(self, count: int, classes: list[int] | None) -> dict[str, str]:
        """Put the first ``count`` samples into the file; returns the paths written."""
        values = np.stack([np.load(self._path(i)) for i in range(count)])
        arrays: dict[str, Any] = (
            {"images": np.moveaxis(values, 1, 3)} if values.ndim == 4 else {"data": values}
        )
        arrays["settings"] = np.array(json.dumps(self.settings))
        if classes is not None:
            arrays["labels"] = np.asarray(classes)
        write_npz(self.target, arrays)
        shutil.rmtree(self.parts)
        return {"samples": str(self.target)}

    def unpack(self) -> None:
        """Lay the samples of a finished file out as parts again, for a command that goes on with them."""
        with np.load(self.target, allow_pickle=False) as archive:
            images = "images" in archive
            values = np.moveaxis(archive["images"], 3, 1) if images else archive["data"]
        for number, sample in enumerate(values):
            self.write(number, sample)

    def _path(self, number: int) -> Path:
        return self.parts / f"{number:05d}.npy"


Store = PictureFolder | ArrayFile


def open_store(out: Path, settings: Mapping[str, Any], facts: Facts) -> Store:
    """The store at ``out``, new or begun by a command with the same ``settings``.

    Raises `RunError` where ``out`` holds samples of other settings, or something else, or cannot hold these.
    """
    if out.suffix != ".npz":
        if not has_pictures(facts):
            raise RunError(f"{out}: samples of shape {facts.shape} are no images: name a file ending in .npz")
        _claim(out, settings)
        return PictureFolder(out, facts.levels)
    file = ArrayFile(out, settings)
    if out.exists() and not file.parts.exists():
        _agree(out, _settings_within(out), settings)
        _claim(file.parts, settings)
        file.unpack()
    _claim(file.parts, settings)
    return file


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make ``folder`` the place of these settings."""
    record = folder / _SETTINGS
    if record.exists():
        _agree(folder, _settings_in(record), settings)
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(
            f"{folder} holds something else, which this command did not make: choose another place"
        )
    write_text(record, json.dumps(settings, indent=2) + "\n")


def _settings_in(record: Path) -> Mapping[str, Any]:
    try:
        settings = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{record} is damaged ({error}): choose another place") from None
    if not isinstance(settings, dict):
        raise RunError(f"{record} is damaged (it holds no settings): choose another place")
    return settings


def _agree(place: Path, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    for key, value in asked.items():
        there = found.get(key, _BEFORE.get(key))
        if there != value:
            raise RunError(
                f"{place} holds pictures of {key} {there}, asked for {value}: choose another place"
            )


def _settings_within(file: Path) -> Mapping[str, Any]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            settings: Mapping[str, Any] = json.loads(str(archive["settings"]))
            return settings
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        raise RunError(
            f"{file} holds something else, which this command did not make: choose another file"
        ) from None
