"""How progress is shown."""

import sys

import pytest

from perrin.cli import progress
from perrin.cli.console import duration
from perrin.cli.progress import Bar


@pytest.fixture
def clock(monkeypatch):
    """Seconds, to be set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_away_from_a_terminal_a_line_comes_now_and_then(clock, capsys):
    with Bar("sampling", 40) as bar:
        for _ in range(30):
            clock[0] += 1
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "sampling: 25%, 30 s left",
        "sampling: 50%, 20 s left",
        "sampling: 75%, 10 s left",
    ]


def test_the_caller_may_know_the_time_left_and_more(clock, capsys):
    with Bar("training", 1.0) as bar:
        clock[0] += 11
        bar.update(0.5, "loss 2", left=200)
        bar.say("a line")
    assert capsys.readouterr().err.splitlines() == ["training: 50%, 3 min 20 s left, loss 2", "a line"]


def test_a_terminal_shows_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with Bar("measuring", 2) as bar:
        bar.advance()
        bar.say("step 5: [held-out]")
    output = capsys.readouterr()
    assert output.out == ""
    assert "measuring" in output.err
    assert "50%, 0 s left" in output.err
    assert "step 5: [held-out]" in output.err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (42.4, "42 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7800, "2 h 10 min")],
)
def test_a_time_for_people(seconds, text):
    assert duration(seconds) == text
