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
    print(json.dumps(plain(figures), allow_nan=False) if as_json else "\n".join(lines), flush=True)


def plain(figures: object) -> object:
    """``figures`` for JSON, which has no word for numbers that are not finite but null, however deep they lie."""
    if isinstance(figures, Mapping):
        return {name: plain(value) for name, value in figures.items()}
    if isinstance(figures, list | tuple):
        return [plain(value) for value in figures]
    return None if isinstance(figures, float) and not math.isfinite(figures) else figures


def with_error(mean: float, error: float | None) -> str:
    """``1.843 ± 0.021 bits/dim``; a single example has no standard error."""
    known = error is not None and math.isfinite(error)
    return f"{mean:.3f} ± {error:.3f} bits/dim" if known else f"{mean:.3f} ± unknown bits/dim"


def measured_text(mean: float, error: float, noise: float, *, count: int, remedy: str | None) -> str:
    """The mean of ``count`` examples with its standard ``error``, and the Monte-Carlo ``noise``, all in bits/dim.

    A single example has that noise alone. Where it is not known (NaN), ``remedy`` are the flags that would tell it;
    None where none would.
    """
    known = not math.isnan(noise)
    if count == 1 and known:
        return f"{with_error(mean, noise)} (n = 1: the error is the Monte-Carlo part alone)"
    part = f"{noise:.4f}" if known else "unknown" + (f" ({remedy} tells it)" if remedy else "")
    return (
        f"{with_error(mean, error)} (mean and standard error of n = {count}; the Monte-Carlo part is {part})"
    )


def examples(count: int) -> str:
    """``1 example``, ``2 examples``."""
    return f"{count} example{'s' * (count != 1)}"


def many(count: float, noun: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{count:g} {noun}{'s' * (count != 1)}"


def cost_text(calls: float | None) -> str:
    """How often a network saw each picture, to go on a line with; nothing where none was drawn."""
    return "" if calls is None else f", {many(calls, 'network call')} each"


def duration(seconds: float) -> str:
    """A time for people: ``42 s``, ``3 min 5 s``, ``2 h 10 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
