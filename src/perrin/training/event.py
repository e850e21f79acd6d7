"""What training tells its caller."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

EventKind = Literal["start", "progress", "evaluation", "checkpoint"]


@dataclass(frozen=True)
class TrainEvent:
    """How training stands; figures are the latest known, None before the first."""

    kind: EventKind
    """What has just happened."""
    step: int
    total_steps: int | None
    progress: float
    """Share of the budget used, in [0, 1]."""
    seconds: float
    """Seconds of training, over all sessions."""
    loss: float | None = None
    """Mean over the steps since the last line of metrics."""
    images_per_second: float | None = None
    eta_seconds: float | None = None
    """Seconds of training to come."""
    held_out_bpd: float | None = None
    held_out_bpd_se: float | None = None
    grid: Path | None = None
    """The latest picture of samples of this session."""
