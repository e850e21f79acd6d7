"""``perrin verify``: samplers and likelihoods against closed forms, in this installation, dtype and device."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from perrin.cli.console import DeviceName, pick_device, plain, report
from perrin.cli.flags import parse

if TYPE_CHECKING:
    from perrin.evaluation.verify import Result


@dataclass(frozen=True)
class Options:
    """Measure what is known in closed form, for data whose ideal network is known: processes, samplers, likelihoods.

    Exits with 0 where all checks hold and with 1 where one does not."""

    only: str | None = None
    """Only the checks whose names contain this, such as `ddim` or `bound: gap`; * and ? stand for any characters."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of data and network; each tolerance is for this dtype."""
    seed: int = 0
    """Seed of what is random."""
    device: DeviceName = "auto"
    """Where to compute."""
    json: bool = False
    """Print one JSON object instead of text."""


def run(args: Sequence[str]) -> int:
    """Run the checks that ``args`` ask for; 0 if all hold, else 1."""
    options = parse(Options, args, command="verify")
    device = pick_device(options.device)
    import torch

    from perrin.cli.progress import Bar
    from perrin.evaluation.verify import Bench, chosen, verify

    checks = chosen(options.only)
    bench = Bench(device, getattr(torch, options.dtype), options.seed)
    results: list[Result] = []
    began = time.monotonic()
    with Bar("checking", len(checks)) as bar:
        for result in verify(bench, checks):
            results.append(result)
            bar.update(len(results), result.name)
    seconds = time.monotonic() - began
    figures = {
        "checks": [plain(asdict(result)) for result in results],
        "ok": all(result.ok for result in results),
        "device": str(device),
        "dtype": options.dtype,
        "seed": options.seed,
        "torch": torch.__version__,
        "seconds": seconds,
    }
    summary = f"torch {torch.__version__}, {device}, {options.dtype}, seed {options.seed}; {seconds:.1f} s"
    report(figures, [*table(results), verdict(results), summary], as_json=options.json)
    return 0 if figures["ok"] else 1


def table(results: Iterable[Result]) -> list[str]:
    """One line for each check, and one more for each that raised."""
    lines = [f"{'check':<42} {'measured':>13} {'expected':>13} {'tolerance':>9}  verdict"]
    for result in results:
        figures = (
            f"{_shown(result.measured):>13} {_shown(result.expected):>13} {_shown(result.tolerance, 2):>9}"
        )
        lines.append(f"{result.name:<42} {figures}  {'ok' if result.ok else 'FAILED'}")
        if result.error is not None:
            lines.append(f"  {result.error}")
    return lines


def verdict(results: Sequence[Result]) -> str:
    """``all 73 checks hold``, or how many do not."""
    failed = sum(not result.ok for result in results)
    return f"{failed} of {len(results)} checks FAILED" if failed else f"all {len(results)} checks hold"


def _shown(value: float | None, digits: int = 7) -> str:
    return "-" if value is None else f"{value:.{digits}g}"
