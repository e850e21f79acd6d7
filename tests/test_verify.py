"""`perrin verify`'s checks: green as things are, and each of them red where the thing it checks is broken."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase

import pytest
import torch
from torch import Tensor

from faults import FAULTS, Fault
from perrin.errors import ArgumentError
from perrin.evaluation.verify import CHECKS, Bench, Finding, chosen, process, verify
from perrin.oracles import Oracle

SLOW = (
    "bound: * 1000 steps",
    "bound: estimate",
    "bound: stated error",
    "bound: coverage",
    "bound: by image",
    "ode: *",
    "calibration: [!b]*",
    "calibration: bound*",
    "decoder: 65,536 levels*",
)
"""Checks that take more than a few tenths of a second."""

DOUBLE = Bench(torch.device("cpu"), torch.float64)


def named(*patterns: str, quick: bool | None = None) -> list[str]:
    """The checks that ``patterns`` name, all or only the ``quick`` or slow ones of them."""
    found = [name for name in CHECKS if any(fnmatchcase(name, pattern) for pattern in patterns)]
    slow = {name for name in found if any(fnmatchcase(name, pattern) for pattern in SLOW)}
    return [name for name in found if quick is None or (name not in slow) == quick]


def failures(names: list[str], where: Bench = DOUBLE) -> dict[str, str | None]:
    """Those of the checks that fail, with what they raised."""
    results = verify(where, {name: CHECKS[name] for name in names})
    return {result.name: result.error for result in results if not result.ok}


# As things are


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quick_checks_hold(dtype: torch.dtype) -> None:
    assert failures(named("*", quick=True), Bench(torch.device("cpu"), dtype)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, -7, 2**70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_check_holds_for_every_seed(dtype: torch.dtype, seed: int) -> None:
    assert failures(named("*"), Bench(torch.device("cpu"), dtype, seed)) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_check_holds_on_a_gpu(dtype: torch.dtype) -> None:
    assert failures(named("*"), Bench(torch.device("cuda"), dtype)) == {}


def test_the_seed_changes_what_is_random() -> None:
    check = CHECKS["ddim: order"]
    first, again, other = (check(Bench(torch.device("cpu"), torch.float64, seed)) for seed in (0, 0, 1))
    assert first == again
    assert first.measured != other.measured


@pytest.mark.parametrize(
    "name", ["ddpm: fixed-small, variance", "bound: entropy at 5 steps", "reading: velocity"]
)
def test_the_dtype_is_that_of_the_network(name: str) -> None:
    errors = []
    for dtype in (torch.float32, torch.float64):
        found = CHECKS[name](Bench(torch.device("cpu"), dtype))
        errors.append(abs(found.measured - found.expected))
    assert errors[0] > 5e-9 > errors[1]


# Broken on purpose


def cases(*, quick: bool) -> list[object]:
    return [
        pytest.param(fault, names, id=fault.__name__)
        for fault, patterns in FAULTS
        if (names := named(*patterns, quick=quick))
    ]


@pytest.mark.parametrize(("fault", "names"), cases(quick=True))
def test_a_fault_turns_its_checks_red(
    fault: Fault, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    assert failures(names) == dict.fromkeys(names)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "names"), cases(quick=False))
def test_a_fault_turns_its_slow_checks_red(
    fault: Fault, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    assert failures(names) == dict.fromkeys(names)


def test_every_check_has_a_fault_that_turns_it_red() -> None:
    assert {name for _, patterns in FAULTS for name in named(*patterns)} == set(CHECKS)
    assert all(named(pattern) for _, patterns in FAULTS for pattern in patterns)


@pytest.mark.parametrize(
    "name", named("reading: *", "ddp?: *", "decoder: 2 levels*", "bound: gap of beta at 5 *")
)
def test_a_network_that_says_nan_makes_nothing_hold(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = torch.tensor(math.nan)
    monkeypatch.setattr(
        Oracle, "__call__", lambda self, x, t: nowhere.to(x.dtype).expand(network_shape(self, x))
    )
    monkeypatch.setattr(process, "discretized_gaussian_log_likelihood", lambda x, **options: nowhere * x)
    assert failures([name]) == {name: None}


def network_shape(oracle: Oracle, x: Tensor) -> tuple[int, ...]:
    return (len(x), oracle.diffusion.output_channels(x.shape[1]), *x.shape[2:])


# Results


def test_a_check_that_raises_has_failed_and_the_others_run() -> None:
    def broken(where: Bench) -> Finding:
        raise RuntimeError("no such\nkernel")

    results = list(verify(DOUBLE, {"a": broken, "b": lambda where: Finding(1.0, 1.0, 0.0)}))
    assert [(result.ok, result.error, result.measured) for result in results] == [
        (False, "RuntimeError: no such kernel", None),
        (True, None, 1.0),
    ]
    assert all(result.seconds >= 0 for result in results)


@pytest.mark.parametrize(
    ("measured", "tolerance", "ok"),
    [
        (1.0, 0.0, True),
        (1.1, 0.05, False),
        (0.9, 0.05, False),
        (1.05, 0.1, True),
        (math.nan, math.inf, False),
    ],
)
def test_a_finding_holds_within_its_tolerance(measured: float, tolerance: float, ok: bool) -> None:
    assert Finding(measured, 1.0, tolerance).ok is ok


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("DDIM: ord", 1), ("ddim*order", 3), ("eta ?, mean", 2), ("bound: gap", 3), (None, len(CHECKS))],
)
def test_checks_are_chosen_by_a_part_of_their_name(pattern: str | None, count: int) -> None:
    assert len(chosen(pattern)) == count


def test_a_name_that_no_check_has_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"no check has 'bond' in its name \(there are schedule, forward"):
        chosen("bond")
