"""The training loop: steps, and between them metrics, measurements and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from perrin.data import Dataset
from perrin.diffusion import GaussianDiffusion
from perrin.errors import NonFiniteError
from perrin.training.evaluate import evaluate
from perrin.training.event import EventKind, TrainEvent
from perrin.training.folder import RunFolder
from perrin.training.interrupt import Interrupted, Interrupts
from perrin.training.metrics import Window
from perrin.training.schedule import Budget, Plan
from perrin.training.state import TrainingState
from perrin.training.step import Batches, StepRecord, backward, network_call, seed_dropout

SECONDS_BETWEEN_REPORTS = 2.0
"""Longest silence towards the caller where lines of metrics are further apart."""


Report = Callable[[TrainEvent], None]


def train(
    folder: RunFolder,
    *,
    diffusion: GaussianDiffusion,
    network: nn.Module,
    dataset: Dataset,
    device: torch.device | str,
    report: Report,
    stop_at: int | None = None,
) -> TrainEvent:
    """Train ``network`` in place as ``folder.config`` says, from the newest checkpoint on, if there is one.

    What is random in a step depends on (seed, step) alone and torch's global generators are left as they
    were, so a run that was stopped or killed ends with the same weights as one that was not (where the
    device's arithmetic is repeatable and the budget is in steps). ``stop_at`` ends this session early after
    that step, with a checkpoint, and changes nothing else.

    Raises `Interrupted` after Ctrl-C, with a checkpoint of the last whole step; `NonFiniteError` for a loss
    or a gradient that is not finite, leaving the last checkpoint as the newest; `RunError`, `DataError` and
    `ConfigError` before the first step.
    """
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        chain, trained = diffusion.to(device), network.to(device)
        session = Session(folder, chain, trained, dataset, device, report=report, stop_at=stop_at)
        with session.interrupts.handled():
            return session.run()


class Session:
    """Training from one checkpoint to the end of the budget, or until it is stopped."""

    def __init__(
        self,
        folder: RunFolder,
        diffusion: GaussianDiffusion,
        network: nn.Module,
        dataset: Dataset,
        device: torch.device,
        *,
        report: Report,
        stop_at: int | None,
    ) -> None:
        self.folder, self.diffusion, self.device, self.report = folder, diffusion, device, report
        self.config = folder.config.training
        self.plan = Plan(self.config, Budget.of(self.config), stop_at)
        self.batches = Batches(dataset, folder.config, device)
        self.state = TrainingState(network.train(), diffusion, self.config)
        self.model = network_call(network, self.config.precision, device)
        self.interrupts = Interrupts()
        self.pending: list[StepRecord] = []
        self.whole = True
        self.saved = self._restore()
        self.last_report = time.monotonic()
        self.event = self._first_event()

    def run(self) -> TrainEvent:
        """Train until the budget or the session ends; see `train`."""
        try:
            self.tell("start")
            if self.plan.measures(*self.state.age) and not self._measured():
                self.evaluate()
            while not self.plan.over(*self.state.age):
                self.advance()
                self.attend()
                self.interrupts.check()
        except KeyboardInterrupt:
            if not self.whole:
                raise
            self.save()
            raise Interrupted(self.state.step) from None
        return self.event

    def advance(self) -> None:
        """Take one step; on a CPU, where that is free, only after a look at its figures."""
        with self.state.stopwatch:
            lr = self.plan.lr(*self.state.age)
            record = self._gradient()
        self.whole = False
        self.pending.append(record)
        if self.device.type == "cpu":
            self.absorb()
        with self.state.stopwatch:
            self.state.apply(lr, record)
        self.whole = True

    def attend(self) -> None:
        """Between two steps: write, measure and save what is due."""
        plan, state = self.plan, self.state
        line = plan.closes_window(state.step)
        overdue = time.monotonic() - self.last_report > SECONDS_BETWEEN_REPORTS
        if not (line or overdue or plan.measures(*state.age) or plan.saves(*state.age)):
            return
        self.absorb()
        if line or plan.finished(*state.age):
            self.write_line()
        self.tell("progress")
        if line:
            state.window = Window(began=state.stopwatch.seconds)
        if plan.measures(*state.age):
            self.evaluate()
        if plan.saves(*state.age):
            self.save()

    def absorb(self) -> None:
        """Wait for the device and take in the figures of the pending steps.

        Raises `NonFiniteError` at the first step whose loss or gradient is not finite.
        """
        if not self.pending:
            return
        with self.state.stopwatch:
            for record in self.pending:
                names, values = record.figures.keys(), torch.stack([*record.figures.values()]).tolist()
                if not all(map(math.isfinite, values)):
                    raise NonFiniteError(f"{record.fault()}; {self._last_good()}")
                self.state.window.add(dict(zip(names, values, strict=True)))
        self.pending.clear()

    def write_line(self) -> None:
        """Write the means over the window's ``steps``, which a last, short line leaves open for a longer budget."""
        state = self.state
        row = {"step": state.step, "steps": state.window.steps, **state.window.means()}
        row |= {"lr": state.optimizer.param_groups[0]["lr"]}
        row |= {"images_per_second": self._speed(), "seconds": state.stopwatch.seconds}
        self.folder.metrics.append(row)

    def evaluate(self) -> None:
        """Measure the first average on the held-out part; Ctrl-C cuts it short."""
        step = self.state.step
        with self.interrupts.cuttable():
            grid = self.folder.grid_path(step)
            found = evaluate(self.state.averaged_network(), self.diffusion, self.batches, grid)
        self.folder.metrics.append(found.row(step))
        self.event = replace(
            self.event,
            held_out_bpd=found.held_out_bpd,
            held_out_bpd_se=found.held_out_bpd_se,
            grid=found.grid,
        )
        self.tell("evaluation")

    def save(self) -> None:
        """Write a checkpoint, unless this step's is there."""
        self.absorb()
        if self.saved == self.state.step:
            return
        self.folder.metrics.sync()
        self.folder.save_checkpoint(self.state.checkpoint())
        self.saved = self.state.step
        self.tell("checkpoint")

    def tell(self, kind: EventKind) -> None:
        """Report how training stands."""
        state, seconds = self.state, self.state.stopwatch.seconds
        if state.window.steps:
            rate = state.window.steps_per_second(seconds)
            self.event = replace(
                self.event,
                loss=state.window.means()["loss"],
                images_per_second=self._speed(),
                eta_seconds=self.plan.budget.eta(state.step, seconds, rate),
            )
        progress = self.plan.budget.progress(state.step, seconds)
        self.event = replace(self.event, kind=kind, step=state.step, progress=progress, seconds=seconds)
        self.last_report = time.monotonic()
        self.report(self.event)

    def _restore(self) -> int | None:
        """Go on from the newest checkpoint, whose step it gives, and drop the lines of metrics past it."""
        steps = self.folder.checkpoints()
        if steps:
            self.state.restore(self.folder.load_checkpoint())
        self.folder.metrics.rewind(self.state.step)
        return self.state.step if steps else None

    def _first_event(self) -> TrainEvent:
        measured = [row for row in self.folder.metrics.rows() if "held_out_bpd" in row]
        latest = measured[-1] if measured else {}
        return TrainEvent(
            kind="start",
            step=self.state.step,
            total_steps=self.plan.budget.steps,
            progress=self.plan.budget.progress(self.state.step, self.state.stopwatch.seconds),
            seconds=self.state.stopwatch.seconds,
            held_out_bpd=latest.get("held_out_bpd"),
            held_out_bpd_se=latest.get("held_out_bpd_se"),
        )

    def _gradient(self) -> StepRecord:
        """Leave the next step's gradient in the parameters; nothing else changes."""
        state, config = self.state, self.config
        draw = self.batches.draw(state.step, state.t_sampler)
        seed_dropout(self.device, config.seed, state.step)
        state.optimizer.zero_grad()
        terms = backward(self.diffusion, self.model, draw, config.microbatch)
        return StepRecord.of(state.step + 1, draw, terms, state.network)

    def _measured(self) -> bool:
        """Whether this step's measurement is written: not so where Ctrl-C cut it short."""
        rows = self.folder.metrics.rows()
        return any(row["step"] == self.state.step and "held_out_bpd" in row for row in rows)

    def _speed(self) -> float:
        """Examples per second since the last line of metrics."""
        rate = self.state.window.steps_per_second(self.state.stopwatch.seconds)
        return rate * self.config.batch_size

    def _last_good(self) -> str:
        return (
            "there is no checkpoint yet"
            if self.saved is None
            else f"step {self.saved} is the last checkpoint"
        )
