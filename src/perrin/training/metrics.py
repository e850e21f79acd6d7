"""The figures of training: their running means, and the file of one JSON object per line."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from perrin.errors import RunError
from perrin.files import sync_file, write_text

Row = dict[str, Any]


@dataclass
class Window:
    """Sums over the steps since the last line, kept in checkpoints so that a resumed run writes the same lines."""

    began: float = 0.0
    """Seconds of training when it began."""
    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, figures: dict[str, float]) -> None:
        """Take in one step."""
        self.steps += 1
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Each figure's mean over the steps."""
        return {name: total / self.steps for name, total in self.sums.items()}

    def steps_per_second(self, seconds: float) -> float:
        """The speed of training, 0 before it can be told; ``seconds`` is the training time now."""
        return self.steps / (seconds - self.began) if seconds > self.began else 0.0

    def state_dict(self) -> Row:
        """The fields as plain values."""
        return asdict(self)


class MetricsLog:
    """A file with one JSON object per line; each has the key ``step``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Row) -> None:
        """Write one line; figures that are not finite become null, which is all JSON has for them."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain) + "\n")

    def rows(self) -> list[Row]:
        """Every line, less a last one that a crash cut short. Raises `RunError` naming any other damage."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]
        return [row for number, line in enumerate(lines) if (row := self._row(number, line, len(lines)))]

    def _row(self, number: int, line: bytes, count: int) -> Row | None:
        try:
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                return row
        except ValueError:
            pass
        if number + 1 == count:
            return None
        raise RunError(f"{self.path}: line {number + 1} is damaged; delete that line to go on")

    def rewind(self, step: int) -> None:
        """Drop the lines past ``step``, which a run resumed from there writes again, and a torn last line."""
        if self.path.exists():
            kept = [row for row in self.rows() if row["step"] <= step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def sync(self) -> None:
        """Wait until the lines are on disk."""
        if self.path.exists():
            sync_file(self.path)
