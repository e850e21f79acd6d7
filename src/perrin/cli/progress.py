"""How far the work is, on standard error: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from perrin.cli.console import duration, note

SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """A context manager that shows how much of ``total`` is done and the time left."""

    def __init__(self, label: str, total: float) -> None:
        self._label, self._total, self._done = label, total, 0.0
        self._began = self._last_line = time.monotonic()
        self._rich: Progress | None = None
        if sys.stderr.isatty():
            figures = TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True, ratio=1))
            columns = TextColumn("{task.description}"), BarColumn(10), figures
            self._rich = Progress(*columns, console=Console(stderr=True), transient=True, expand=True)
            self._rich.add_task(label, total=total, figures="")

    def __enter__(self) -> Self:
        if self._rich is not None:
            self._rich.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._rich is not None:
            self._rich.stop()

    def advance(self, amount: float = 1.0) -> None:
        """``amount`` more is done."""
        self.update(self._done + amount)

    def update(self, done: float, figures: str = "", *, left: float | None = None) -> None:
        """``done`` in all; ``figures`` stand beside it. ``left``: seconds to go, where the caller knows better."""
        self._done = done
        now = time.monotonic()
        if self._rich is not None:
            self._rich.update(self._rich.task_ids[0], completed=done, figures=self._state(now, figures, left))
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            note(f"{self._label}: {self._state(now, figures, left)}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._rich is None:
            note(text)
        else:
            self._rich.console.print(text, highlight=False, markup=False)

    def _state(self, now: float, figures: str, left: float | None) -> str:
        if left is None and self._done > 0:
            left = (now - self._began) * (self._total - self._done) / self._done
        parts = [f"{self._done / self._total:.0%}", "" if left is None else f"{duration(left)} left", figures]
        return ", ".join(part for part in parts if part)
