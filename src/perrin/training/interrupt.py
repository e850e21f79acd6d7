"""Ctrl-C that waits for a safe place."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Training was ended by Ctrl-C; what was reached is saved as the checkpoint of ``step``."""

    def __init__(self, step: int) -> None:
        super().__init__(f"interrupted; step {step} is saved")
        self.step = step


class Interrupts:
    """Within `handled`, the first Ctrl-C is kept for `check` or for work marked `cuttable`.

    A second one raises `KeyboardInterrupt` wherever it falls.
    """

    def __init__(self) -> None:
        self._asked = False
        self._cuttable = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Take over SIGINT, and give it back at the end; only the main thread can, others see no signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)

    @contextmanager
    def cuttable(self) -> Iterator[None]:
        """Work that only reads the state of training, so that Ctrl-C may end it at once."""
        self._cuttable = True
        try:
            self.check()
            yield
        finally:
            self._cuttable = False

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if Ctrl-C was pressed."""
        if self._asked:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self._asked = self._asked, True
        if again or self._cuttable:
            raise KeyboardInterrupt
