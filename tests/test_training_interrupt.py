"""Ctrl-C and kill -9: what was reached is kept, and the run goes on as if nothing had happened."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from perrin.training import Interrupted, RunFolder, TrainEvent, checkpoint, loop, state
from perrin.training.checkpoint import Checkpoint
from perrin.training.interrupt import Interrupts
from perrin.training.metrics import MetricsLog
from test_training_loop import assert_same_run
from test_training_step import Trial, config


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def pressing(trial: Trial, kind: str, step: int) -> list[TrainEvent]:
    """Run a session in which Ctrl-C is pressed at one event; it must end by `Interrupted`."""
    seen: list[TrainEvent] = []

    def report(event: TrainEvent) -> None:
        seen.append(event)
        if (event.kind, event.step) == (kind, step):
            ctrl_c()

    with pytest.raises(Interrupted) as caught:
        trial.session(report=report)
    assert caught.value.step == trial.folder().checkpoints()[-1]
    return seen


@pytest.mark.parametrize(
    ("kind", "step"), [("start", 0), ("progress", 4), ("evaluation", 8), ("checkpoint", 9)]
)
def test_ctrl_c_saves_the_step_and_the_run_goes_on_alike(tmp_path: Path, kind: str, step: int) -> None:
    setting = config(evaluate_every=8, checkpoint_every=9)
    Trial(tmp_path / "whole", setting).session()
    before = signal.getsignal(signal.SIGINT)
    pressing(Trial(tmp_path / "parts", setting), kind, step)
    assert signal.getsignal(signal.SIGINT) is before
    assert RunFolder.open(tmp_path / "parts").checkpoints()[-1] == max(step, 1) if kind != "start" else True
    Trial(tmp_path / "parts", setting).session()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_ctrl_c_in_a_step_finishes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, trial = loop.backward, Trial(tmp_path, config())

    def pressed(*args: object) -> object:
        ctrl_c()
        return inner(*args)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(loop, "backward", pressed)
    with pytest.raises(Interrupted) as caught:
        trial.session()
    assert caught.value.step == 1
    assert RunFolder.open(tmp_path).checkpoints() == [1]


def test_ctrl_c_cuts_a_measurement_short_and_it_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = config(evaluate_every=8)
    Trial(tmp_path / "whole", setting).session()

    def pressed(*args: object) -> None:
        ctrl_c()
        pytest.fail("the measurement went on")

    monkeypatch.setattr(loop, "evaluate", pressed)
    with pytest.raises(Interrupted, match="step 8 is saved"):
        Trial(tmp_path / "parts", setting).session()
    monkeypatch.undo()
    Trial(tmp_path / "parts", setting).session()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_second_ctrl_c_while_saving_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = config(checkpoint_every=4)
    inner = RunFolder.save_checkpoint

    def impatient(self: RunFolder, reached: Checkpoint) -> Path:
        if reached.step == 6:
            monkeypatch.setattr("torch.save", lambda *args: ctrl_c())
        return inner(self, reached)

    def report(event: TrainEvent) -> None:
        if event.step == 6:
            ctrl_c()

    monkeypatch.setattr(RunFolder, "save_checkpoint", impatient)
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_REPORTS", -1.0)
    with pytest.raises(KeyboardInterrupt) as caught:
        Trial(tmp_path / "parts", setting).session(report=report)
    assert not isinstance(caught.value, Interrupted)
    monkeypatch.undo()
    assert RunFolder.open(tmp_path / "parts").checkpoints() == [4]
    Trial(tmp_path / "parts", setting).session()
    Trial(tmp_path / "whole", setting).session()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_an_interrupt_in_the_middle_of_an_update_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(*args: object) -> None:
        ctrl_c()
        ctrl_c()

    monkeypatch.setattr(state.EMA, "update", twice)
    with pytest.raises(KeyboardInterrupt) as caught:
        Trial(tmp_path, config()).session()
    assert not isinstance(caught.value, Interrupted)
    assert RunFolder.open(tmp_path).checkpoints() == []


def test_training_runs_outside_the_main_thread(tmp_path: Path) -> None:
    steps: list[int] = []
    thread = threading.Thread(target=lambda: steps.append(Trial(tmp_path, config()).session(stop_at=2).step))
    thread.start()
    thread.join()
    assert steps == [2]


def test_ctrl_c_is_kept_until_asked_for() -> None:
    interrupts = Interrupts()
    with interrupts.handled():
        interrupts.check()
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        with pytest.raises(KeyboardInterrupt), interrupts.cuttable():
            pytest.fail("work began after Ctrl-C")


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def dying_at(patch: pytest.MonkeyPatch, count: int) -> None:
    """Let the process end before its ``count``-th operation on files from now on."""
    left = [count]

    def mortal(owner: object, name: str) -> None:
        inner = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return inner(*args, **kwargs)

        patch.setattr(owner, name, call)

    for owner, name in (
        (os, "fsync"), (Path, "mkdir"), (Path, "rename"), (Path, "replace"),
        (shutil, "rmtree"), (checkpoint, "save_file"), (MetricsLog, "append"),
    ):  # fmt: skip
        mortal(owner, name)


def test_a_run_that_dies_at_any_operation_on_files_goes_on_alike(tmp_path: Path) -> None:
    setting = config(checkpoint_every=2, evaluate_every=6, keep=2)
    Trial(tmp_path / "whole", setting).session()
    for operation in range(1, 200):
        with pytest.MonkeyPatch.context() as patch:
            dying_at(patch, operation)
            try:
                Trial(tmp_path / "parts", setting).session()
                break
            except Killed:
                pass
    assert operation > 20
    assert RunFolder.open(tmp_path / "parts").checkpoints() == [10, 12]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


CHILD = """
import sys, warnings
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_training_step import Trial, config
setting = config(steps=60, log_every=3, evaluate_every=20, checkpoint_every=2, t_sampler="loss-second-moment")
print("ready", flush=True)
Trial(Path(sys.argv[1]), setting).session()
"""


def kill_sometimes(path: Path, seed: int) -> int:
    """Start the run again and again, kill -9 it at random moments until it ends; the number of kills."""
    delays = random.Random(seed)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for kills in range(20):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path)], env=environment, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        with child.stdout:
            child.stdout.readline()
            time.sleep(delays.uniform(0.05, 0.6) if kills < 3 else 0)
            if kills < 3:
                child.kill()
        if child.wait() == 0:
            return kills
    return 20


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    setting = config(
        steps=60, log_every=3, evaluate_every=20, checkpoint_every=2, t_sampler="loss-second-moment"
    )
    Trial(tmp_path / "whole", setting).session()
    assert kill_sometimes(tmp_path / "parts", seed=0) == 3
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
