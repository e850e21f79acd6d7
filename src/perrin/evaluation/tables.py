"""Tables with one row per example, as CSV or parquet by the name's ending."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from perrin.errors import ArgumentError
from perrin.files import claim, written_aside

Columns = Mapping[str, Sequence[int] | Sequence[str] | Sequence[float]]
"""Values of equal number by the column's name, in order; a float that is NaN is a value that is not known."""

SUFFIXES = (".csv", ".parquet")


def claim_table(path: Path, leading: Sequence[str]) -> None:
    """Make sure, before long work, that a table can be written to ``path`` and overwrites nothing else.

    What exists there must be a table whose first columns are called ``leading``. Raises `ArgumentError` otherwise,
    for another ending, and for parquet without pyarrow; `OSError` where nothing can be written.
    """
    if path.suffix not in SUFFIXES:
        raise ArgumentError(f"the name of a table must end in {' or '.join(SUFFIXES)}, got {path}")
    if path.suffix == ".parquet":
        _parquet(path)
    if path.exists() and _header(path)[: len(leading)] != list(leading):
        raise ArgumentError(
            f"{path} exists and is no such table ({', '.join(leading)}, ...): choose another file"
        )
    claim(path)


def write_table(path: Path, columns: Columns) -> None:
    """Put ``columns`` in the place of the table at ``path`` at one stroke.

    CSV has 8 significant digits and nothing for NaN; parquet has 64-bit numbers and nulls.
    """
    with written_aside(path) as hidden:
        if path.suffix == ".parquet":
            parquet = _parquet(path)
            from pyarrow import table

            parquet.write_table(table({name: _array(values) for name, values in columns.items()}), hidden)
            return
        with hidden.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(map(_cell, row) for row in zip(*columns.values(), strict=True))


def _array(values: Sequence[int] | Sequence[str] | Sequence[float]) -> Any:
    """A column of parquet; NaN becomes null, and a column of nothing else stays one of numbers."""
    from pyarrow import array, float64

    kind = float64() if values and isinstance(values[0], float) else None
    return array(values, type=kind, from_pandas=True)


def _cell(value: float | str) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value + 0.0:.8g}"  # + 0.0: no -0
    return str(value)


def _header(path: Path) -> list[str]:
    """The names of the columns; none where the file is no table."""
    if path.is_dir():
        return []
    if path.suffix == ".parquet":
        from pyarrow import ArrowException

        try:
            return list(_parquet(path).read_schema(path).names)
        except ArrowException:
            return []
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return next(csv.reader([file.readline()]), [])


def _parquet(path: Path) -> ModuleType:
    """pyarrow's module. Raises `ArgumentError` where it is not installed."""
    if find_spec("pyarrow") is None:
        raise ArgumentError(f"{path}: parquet needs pyarrow (pip install 'perrin[data]'); .csv needs nothing")
    from pyarrow import parquet

    module: ModuleType = parquet
    return module
