"""What the commands share: the device flag, results on standard output, notes on standard error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from perrin.errors import ArgumentError

if TYPE_CHECKING:
    import torch

DeviceName = Literal["auto", "cpu", "cuda"]


def pick_device(name: DeviceName) -> torch.device:
    """The device that ``name`` asks for; auto is CUDA where there is one. Raises `ArgumentError` if there is none."""
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ArgumentError("--device cuda: torch finds no CUDA device here (expected auto or cpu)")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def note(text: str) -> None:
    """Tell the person at the terminal, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def report(figures: Mapping[str, object], lines: Iterable[str], *, as_json: bool) -> None:
    """Print the results: one JSON object of ``figures``, numbers that are not finite as null; or ``lines``."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
    print(json.dumps(plain) if as_json else "\n".join(lines), flush=True)


def with_error(mean: float, error: float | None) -> str:
    """``1.843 ± 0.021 bits/dim``; a single example has no standard error."""
    known = error is not None and math.isfinite(error)
    return f"{mean:.3f} ± {error:.3f} bits/dim" if known else f"{mean:.3f} ± unknown bits/dim"


def duration(seconds: float) -> str:
    """A time for people: ``42 s``, ``3 min 5 s``, ``2 h 10 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
