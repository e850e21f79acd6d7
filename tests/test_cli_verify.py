"""``perrin verify``: the table, the JSON object, the exit codes."""

import json
import math

import pytest

from cli_helpers import error_of, figures_of
from perrin.cli.main import main
from perrin.evaluation import verify
from perrin.evaluation.verify import Finding

KEYS = {"name", "measured", "expected", "tolerance", "ok", "seconds", "error"}


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    """One check that holds, one that does not, one that raises."""

    def raises(bench: verify.Bench) -> Finding:
        raise ZeroDivisionError("division by zero")

    checks = {
        "good: one": lambda bench: Finding(1.0, 1.0, 0.1),
        "bad: nan": lambda bench: Finding(math.nan, 0.0, 0.1),
        "bad: raises": raises,
    }
    monkeypatch.setattr(verify, "CHECKS", checks)


def test_checks_that_hold_end_in_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--only", "ddim: eta", "--device", "cpu"]) == 0
    head, *lines, verdict, how = capsys.readouterr().out.splitlines()
    assert head.split() == ["check", "measured", "expected", "tolerance", "verdict"]
    assert all(line.startswith("ddim: eta") and line.endswith("  ok") for line in lines)
    assert verdict == f"all {len(lines)} checks hold"
    assert "cpu, float32, seed 0" in how


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_json_is_one_object_of_every_check(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--only", "bound: gap of beta at 5 ", "--dtype", dtype, "--seed", "3", "--device", "cpu"]
    figures = figures_of(["verify", *flags], capsys)
    assert (figures["ok"], figures["dtype"], figures["seed"], figures["device"]) == (True, dtype, 3, "cpu")
    assert figures["seconds"] > 0
    (check,) = figures["checks"]
    assert set(check) == KEYS
    assert check["name"] == "bound: gap of beta at 5 steps"
    assert check["expected"] == 0.277474
    assert abs(check["measured"] - 0.277474) < check["tolerance"] == (1e-6 if dtype == "float64" else 2e-5)
    assert (check["ok"], check["error"]) == (True, None)


@pytest.mark.usefixtures("three")
def test_checks_that_fail_end_in_1_and_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--device", "cpu"]) == 1
    _, good, bad, raised, reason, verdict, _ = capsys.readouterr().out.splitlines()
    assert good.endswith("  ok")
    assert bad.endswith("  FAILED")
    assert "nan" in bad
    assert raised.startswith("bad: raises")
    assert raised.endswith("  FAILED")
    assert reason.strip() == "ZeroDivisionError: division by zero"
    assert verdict == "2 of 3 checks FAILED"


@pytest.mark.usefixtures("three")
def test_json_of_failures_has_null_for_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--json", "--device", "cpu"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    figures = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    good, nan, raised = figures["checks"]
    assert (good["ok"], nan["ok"], raised["ok"], figures["ok"]) == (True, False, False, False)
    assert (nan["measured"], nan["expected"], nan["error"]) == (None, 0.0, None)
    assert (raised["measured"], raised["error"]) == (None, "ZeroDivisionError: division by zero")


@pytest.mark.usefixtures("three")
def test_only_leaves_out_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    assert [check["name"] for check in figures_of(["verify", "--only", "good"], capsys)["checks"]] == [
        "good: one"
    ]


def test_mistakes_are_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no check has 'nothing' in its name" in error_of(["verify", "--only", "nothing"], capsys)
    assert "--dtype" in error_of(["verify", "--dtype", "float16"], capsys)
