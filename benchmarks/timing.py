"""Interleaved timing of cases in one process and one thread, and what the figures depend on."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch

from perrin import __version__

Loop = Callable[[], int]
"""A case: runs, and says how many steps that was."""

NETWORK = "network (subtracted)"
"""The case that calls the network alone, whose time is subtracted from the others'."""


@dataclass(frozen=True)
class Result:
    """Microseconds of CPU per step with the network's own time subtracted: median and quartiles over the rounds."""

    name: str
    median: float
    low: float
    high: float


def measure(loops: Mapping[str, Loop], rounds: int) -> list[Result]:
    """Each case once in every round, after one round to warm up. One of them is `NETWORK`; noise calls none."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for round_ in range(rounds + 1):
        for name, loop in loops.items():
            start = time.thread_time()
            steps = loop()
            if round_ > 0:
                times[name].append((time.thread_time() - start) / steps * 1e6)
    network = statistics.median(times[NETWORK])
    results = []
    for name, values in times.items():
        own = 0.0 if name == NETWORK or name.startswith("noise") else network
        low, median, high = (value - own for value in statistics.quantiles(values, n=4))
        results.append(Result(name, median, low, high))
    return results


def table(title: str, results: list[Result]) -> str:
    """Lines to print."""
    rows = (f"{r.name:<38} {r.median:>10.1f} {r.low:>9.1f} {r.high:>9.1f}" for r in results)
    return "\n".join([f"{title:<38} {'median us':>10} {'quartiles':>19}", *rows, ""])


def machine() -> dict[str, str]:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": str(len(models)),
        "load average": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "perrin": __version__,
    }
