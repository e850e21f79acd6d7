"""Folders that appear and vanish at one stroke, as checkpoints do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perrin.files import aside, is_leftover, sync_directory, sync_file


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A hidden folder to fill; left without an error, it is on disk and becomes ``target``."""
    hidden = aside(target)
    hidden.mkdir()
    yield hidden
    for file in hidden.iterdir():
        sync_file(file)
    sync_directory(hidden)
    hidden.rename(target)
    sync_directory(target.parent)


def remove_directory(target: Path) -> None:
    """Delete a folder; it vanishes at one stroke, so nobody meets it half deleted."""
    target.rename(aside(target))
    shutil.rmtree(aside(target))


def clear_leftovers(folder: Path) -> None:
    """Delete the hidden files and folders that killed writes and deletions left in ``folder``."""
    for path in filter(is_leftover, list(folder.iterdir())):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
