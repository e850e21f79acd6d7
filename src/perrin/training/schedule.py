"""How long training goes on, and the learning rate on the way."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from perrin.config import TrainingConfig
from perrin.errors import ConfigError


def lr_factor(step: int, progress: float, *, warmup_steps: int, decay: str) -> float:
    """The share of the full learning rate for the 0-based ``step`` at ``progress`` in [0, 1] of the budget.

    Rises as (step + 1) / warmup_steps; ``decay`` is constant, linear or cosine, the last two to 0.
    """
    fall = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return min(1.0, (step + 1) / max(1, warmup_steps)) * fall[decay]


@dataclass(frozen=True)
class Budget:
    """Steps or minutes of training, whichever end first; ``None`` is no limit."""

    steps: int | None
    minutes: float | None

    @classmethod
    def of(cls, config: TrainingConfig) -> Budget:
        """The budget of a configuration. Raises `ConfigError` where training would never end."""
        if config.steps is None and config.minutes is None:
            raise ConfigError("training.steps and training.minutes are both absent: training would never end")
        return cls(config.steps, config.minutes)

    def progress(self, step: int, seconds: float) -> float:
        """The share of the budget that ``step`` steps and ``seconds`` of training have used, in [0, 1]."""
        by_step = step / self.steps if self.steps else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_step, by_time))

    def eta(self, step: int, seconds: float, steps_per_second: float) -> float:
        """The seconds of training still to come at the present speed."""
        by_step = (self.steps - step) / steps_per_second if self.steps and steps_per_second else math.inf
        by_time = 60 * self.minutes - seconds if self.minutes else math.inf
        return max(0.0, min(by_step, by_time))


@dataclass(frozen=True)
class Plan:
    """What is due after ``step`` steps and ``seconds`` of training, in a session that ends at ``stop_at``."""

    config: TrainingConfig
    budget: Budget
    stop_at: int | None

    def lr(self, step: int, seconds: float) -> float:
        """The learning rate of the 0-based ``step``."""
        config, progress = self.config, self.budget.progress(step, seconds)
        return config.lr * lr_factor(step, progress, warmup_steps=config.warmup_steps, decay=config.decay)

    def finished(self, step: int, seconds: float) -> bool:
        """Whether the budget is used up."""
        return self.budget.progress(step, seconds) >= 1

    def over(self, step: int, seconds: float) -> bool:
        """Whether the session is to end."""
        return self.finished(step, seconds) or (self.stop_at is not None and step >= self.stop_at)

    def measures(self, step: int, seconds: float) -> bool:
        """Whether the network is to be measured on the held-out part."""
        return self.finished(step, seconds) or (step > 0 and step % self.config.evaluate_every == 0)

    def saves(self, step: int, seconds: float) -> bool:
        """Whether a checkpoint is to be written."""
        return self.over(step, seconds) or step % self.config.checkpoint_every == 0

    def closes_window(self, step: int) -> bool:
        """Whether a line of metrics ends here, at one of its regular places."""
        return step % self.config.log_every == 0


class Stopwatch:
    """Seconds spent inside ``with stopwatch:``, counted on from ``seconds``."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._spent = seconds
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """The seconds so far, the running stretch included."""
        return self._spent + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._spent, self._since = self.seconds, None
