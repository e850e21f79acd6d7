"""Files that are either whole or absent: written aside, synced to disk, renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def aside(path: Path) -> Path:
    """The hidden name beside ``path`` under which this process writes it."""
    return path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")


def is_leftover(path: Path) -> bool:
    """Whether ``path`` is what a killed write left behind."""
    return path.name.startswith(".") and ".tmp" in path.name


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A name to write to; at the end it is on disk under the name ``path``, or gone if the block raises.

    Missing parent folders are made. An `OSError` about the name to write to names ``path``.
    """
    with _hidden(path) as hidden:
        try:
            yield hidden
            sync_file(hidden)
            hidden.replace(path)
            sync_directory(path.parent)
        finally:
            hidden.unlink(missing_ok=True)


def claim(path: Path) -> None:
    """Make sure, before long work, that ``path`` can be written aside; missing parent folders are made.

    Raises `OSError`, which names ``path`` or a folder, where it cannot.
    """
    with _hidden(path) as hidden:
        hidden.touch()
        hidden.unlink()


@contextmanager
def _hidden(path: Path) -> Iterator[Path]:
    """The name `aside` of ``path``; within it, an `OSError` about that names ``path``, which people know.

    Missing parent folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = aside(path)
    try:
        yield hidden
    except OSError as error:
        if error.filename is not None and str(error.filename) == str(hidden):
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Put ``text`` (UTF-8) in the place of the file at ``path`` at one stroke."""
    with written_aside(path) as hidden:
        hidden.write_text(text, encoding="utf-8")


def sync_file(path: Path) -> None:
    """Wait until the file's content is on disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the names in a folder are on disk; Windows does so by itself and has no call for it."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
