"""The oracle bench: what perrin computes, measured here and now, against closed forms."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from perrin.errors import ArgumentError
from perrin.evaluation.verify import bounds, calibrations, flows, process, sampling, solvers
from perrin.evaluation.verify.bench import Bench, Check, Finding

CHECKS: Mapping[str, Check] = {
    **process.CHECKS,
    **sampling.CHECKS,
    **solvers.CHECKS,
    **bounds.CHECKS,
    **flows.CHECKS,
    **calibrations.CHECKS,
}
"""Every check by name. A new one is a function from a `Bench` to a `Finding` and a line in its module's table."""


@dataclass(frozen=True)
class Result:
    """What came of one check; without figures where it raised ``error``."""

    name: str
    measured: float | None
    expected: float | None
    tolerance: float | None
    ok: bool
    seconds: float
    error: str | None = None


def chosen(pattern: str | None) -> dict[str, Check]:
    """The checks whose names contain ``pattern``, in which ``*`` and ``?`` stand for any characters; all for None.

    Raises `ArgumentError` where there is none.
    """
    if pattern is None:
        return dict(CHECKS)
    found = {
        name: check for name, check in CHECKS.items() if fnmatchcase(name.lower(), f"*{pattern.lower()}*")
    }
    if not found:
        groups = dict.fromkeys(name.partition(":")[0] for name in CHECKS)
        raise ArgumentError(f"no check has {pattern!r} in its name (there are {', '.join(groups)})")
    return found


def verify(bench: Bench, checks: Mapping[str, Check]) -> Iterator[Result]:
    """The results of ``checks``, one after the other. A check that raises has failed, and the others go on."""
    for name, check in checks.items():
        began = time.monotonic()
        try:
            found: Finding = check(bench)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            yield Result(name, None, None, None, False, time.monotonic() - began, reason)
        else:
            yield Result(name, *found, found.ok, time.monotonic() - began)


__all__ = ["CHECKS", "Bench", "Check", "Finding", "Result", "chosen", "verify"]
