"""Learning rates, budgets and what is due when."""

import time

import pytest

from perrin.config import TrainingConfig
from perrin.errors import ConfigError
from perrin.training.schedule import Budget, Plan, Stopwatch, lr_factor


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_warm_up_rises_linearly_to_one(decay: str) -> None:
    factors = [lr_factor(step, 0.0, warmup_steps=4, decay=decay) for step in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_without_warm_up_the_first_step_is_full() -> None:
    assert lr_factor(0, 0.0, warmup_steps=0, decay="constant") == 1.0


@pytest.mark.parametrize(
    ("decay", "half", "end"), [("constant", 1.0, 1.0), ("linear", 0.5, 0.0), ("cosine", 0.5, 0.0)]
)
def test_decay_over_the_budget(decay: str, half: float, end: float) -> None:
    assert lr_factor(99, 0.5, warmup_steps=10, decay=decay) == pytest.approx(half, abs=1e-15)
    assert lr_factor(99, 1.0, warmup_steps=10, decay=decay) == pytest.approx(end, abs=1e-15)


def test_progress_is_the_larger_share_of_steps_and_minutes() -> None:
    budget = Budget(steps=100, minutes=2.0)
    assert budget.progress(50, 30.0) == 0.5
    assert budget.progress(10, 60.0) == 0.5
    assert budget.progress(10, 1000.0) == 1.0
    assert Budget(steps=None, minutes=1.0).progress(10**9, 15.0) == 0.25


def test_eta_is_the_earlier_end() -> None:
    assert Budget(100, None).eta(40, 0.0, steps_per_second=2.0) == 30.0
    assert Budget(100, 1.0).eta(40, 50.0, steps_per_second=2.0) == 10.0
    assert Budget(100, 1.0).eta(40, 50.0, steps_per_second=0.0) == 10.0


def test_training_without_an_end_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.steps and training\.minutes are both absent"):
        Budget.of(TrainingConfig(steps=None, minutes=None))


def test_plan_measures_and_saves_at_intervals_and_at_the_end() -> None:
    config = TrainingConfig(steps=20, evaluate_every=8, checkpoint_every=6, log_every=5)
    plan = Plan(config, Budget.of(config), stop_at=11)
    assert [step for step in range(21) if plan.measures(step, 0.0)] == [8, 16, 20]
    assert [step for step in range(1, 12) if plan.saves(step, 0.0)] == [6, 11]
    assert [step for step in range(1, 21) if plan.closes_window(step)] == [5, 10, 15, 20]
    assert not plan.over(10, 0.0)
    assert plan.over(11, 0.0)
    assert not plan.finished(11, 0.0)
    assert plan.finished(20, 0.0)


def test_plan_gives_the_scheduled_learning_rate() -> None:
    config = TrainingConfig(steps=100, lr=0.5, warmup_steps=10, decay="linear")
    plan = Plan(config, Budget.of(config), stop_at=None)
    assert plan.lr(0, 0.0) == pytest.approx(0.05)
    assert plan.lr(75, 0.0) == pytest.approx(0.125)


def test_stopwatch_counts_only_what_is_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    stopwatch = Stopwatch(5.0)
    with stopwatch:
        now[0] += 2
        assert stopwatch.seconds == 7.0
    now[0] += 50
    with stopwatch:
        now[0] += 1
    assert stopwatch.seconds == 8.0
