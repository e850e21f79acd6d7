"""Solvers of the probability-flow ODE with its log density: Heun on a fixed grid, and an adaptive pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from perrin.errors import ArgumentError
from perrin.likelihood.flow import Flow, Timeline
from perrin.tensors import append_dims


class Solution(NamedTuple):
    """The end of the trajectories."""

    y: Tensor
    """x / alpha at the noisiest time, (B, ...)."""
    growth: Tensor
    """By how much log p(y) has fallen on the way, (B, P) in nats: the integral of div_y eps ds."""


class Solver(Protocol):
    """Integrates from noise level ``start`` (u = log sigma / alpha) to the noisiest."""

    def solve(self, flow: Flow, y: Tensor, start: float) -> Solution:
        """The solution for ``y`` (B, ...), whose dtype is that of all sums."""
        ...


@dataclass(frozen=True)
class Heun:
    """Heun's method, order 2: ``steps`` steps evenly spaced in log(sigma / alpha), or the chain's own if None.

    y steps in s = sigma / alpha, in which it is nearly linear at both ends; the density is integrated in log s, by
    the trapezoidal rule at the nodes alone. So N steps take 2 N + 1 network calls, N + 1 of them with a divergence.
    A PREVIOUS_X network, which knows whole timesteps only, needs ``steps=None`` and the chain's first level.

    Raises `ArgumentError` for fewer than 1 step.
    """

    steps: int | None = 100

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ArgumentError(f"steps must be at least 1, got {self.steps}")

    def solve(self, flow: Flow, y: Tensor, start: float) -> Solution:
        """The solution for ``y`` (B, ...)."""
        nodes = self._nodes(flow.timeline, start)
        eps, rate = flow.eps_and_growth(y, nodes[0])
        growth = torch.zeros_like(rate)
        for before, after in pairwise(nodes):
            step = math.exp(after) - math.exp(before)
            ahead = flow.eps(y + step * eps, after)
            y = y + step / 2 * (eps + ahead)
            growth = growth + (after - before) / 2 * rate
            eps, rate = flow.eps_and_growth(y, after)
            growth = growth + (after - before) / 2 * rate
        return Solution(y, growth)

    def calls(self, timeline: Timeline) -> int:
        """Network calls for an image from the first level of ``timeline`` on."""
        return 2 * len(self._nodes(timeline, timeline.first)) - 1

    def _nodes(self, timeline: Timeline, start: float) -> Sequence[float]:
        if self.steps is None:
            return [start, *(u for u in timeline.log_noise if u > start)]
        inner = [start + (timeline.last - start) * i / self.steps for i in range(self.steps)]
        return [*inner, timeline.last]


# The tableau of Dormand and Prince, order 5 with an embedded 4 (J. Comput. Appl. Math. 6, 1980, table 2): the
# nodes, the stages' weights, of which the last are those of the solution too, and the weights of the error.
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_LOCAL_ORDER = 5
_COARSEST, _FIRST, _FINEST = 2, 3, 40
_MOST_HALVINGS = 4
_SAFETY = 2.0


@dataclass(frozen=True)
class Adaptive:
    """Dormand and Prince's pair, order 5(4), in log(sigma / alpha), each image with steps of its own.

    Steps are halves of halves of the whole way, so that images whose steps agree share a network call: an image is
    stepped over a cell if it is due to take so long a step, and over the two halves if not, or if the error was too
    large. Its path does not depend on what else is in the batch. A step is accepted when the error of x, by
    root mean square over the dimensions, and of log p / D are below ``atol + rtol |value|``.

    ``max_steps`` is the most attempts for a batch, of 6 network calls each; `ArgumentError` beyond it, and for
    a tolerance out of range.
    """

    rtol: float = 1e-4
    atol: float = 1e-4
    max_steps: int = 1000

    def __post_init__(self) -> None:
        if not (self.rtol >= 0 and self.atol > 0):
            raise ArgumentError(f"rtol must be at least 0 and atol above 0, got {self.rtol} and {self.atol}")
        if self.max_steps < 1:
            raise ArgumentError(f"max_steps must be at least 1, got {self.max_steps}")

    def solve(self, flow: Flow, y: Tensor, start: float) -> Solution:
        """The solution for ``y`` (B, ...)."""
        state = _State.at(flow, y, start)
        # due: the level of the longest step that an image may take
        due = torch.full((len(y),), _FIRST, device=y.device)
        cells = [(start, flow.timeline.last, 0, torch.ones_like(due, dtype=torch.bool))]
        attempts = 0
        while cells:
            begin, end, level, rows = cells.pop()
            trying = rows & (due <= level)
            if bool(trying.any()):
                attempts += 1
                self._check(attempts, level, begin)
                new, error = _attempt(flow, state, begin, end, self)
                accepted = trying & (error <= 1)
                wanted = (level + (error * _SAFETY).log2() / _LOCAL_ORDER).ceil()
                wanted = wanted.nan_to_num(level + 1).clamp(_COARSEST, level + _MOST_HALVINGS)
                wanted = torch.where(accepted, wanted, wanted.clamp(min=level + 1)).long()
                due = torch.where(trying, wanted, due)
                state, rows = state.replaced(new, accepted), rows & ~accepted
            if bool(rows.any()):
                middle = (begin + end) / 2
                cells += [(middle, end, level + 1, rows), (begin, middle, level + 1, rows)]
        return Solution(state.y, state.growth)

    def _check(self, attempts: int, level: int, u: float) -> None:
        if attempts > self.max_steps or level > _FINEST:
            raise ArgumentError(
                f"the adaptive solver needs more than {min(attempts, self.max_steps)} steps, at "
                f"sigma/alpha = {math.exp(u):.3g}: raise max_steps, rtol or atol, or use Heun"
            )


class _State(NamedTuple):
    y: Tensor
    growth: Tensor
    slopes: tuple[Tensor, Tensor]
    """dy/du and d growth/du."""

    @classmethod
    def at(cls, flow: Flow, y: Tensor, u: float, growth: Tensor | None = None) -> _State:
        eps, rate = flow.eps_and_growth(y, u)
        return cls(y, torch.zeros_like(rate) if growth is None else growth, (math.exp(u) * eps, rate))

    def replaced(self, new: _State, rows: Tensor) -> _State:
        """This state, with ``rows`` (B,) from ``new``."""

        def chosen(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(append_dims(rows, a.ndim), a, b)

        slopes = chosen(new.slopes[0], self.slopes[0]), chosen(new.slopes[1], self.slopes[1])
        return _State(chosen(new.y, self.y), chosen(new.growth, self.growth), slopes)


def _attempt(
    flow: Flow, state: _State, begin: float, end: float, tolerance: Adaptive
) -> tuple[_State, Tensor]:
    """The state at ``end``, and its error (B,) in units of the tolerance."""
    width, stage = end - begin, state
    slopes = [state.slopes]
    for node, weights in zip(_NODES[1:], _STAGES, strict=True):
        y, growth = (
            value + width * _weighted(weights, [slope[i] for slope in slopes])
            for i, value in enumerate(state[:2])
        )
        stage = _State.at(flow, y, end if node == 1 else begin + node * width, growth)
        slopes.append(stage.slopes)
    y_error, growth_error = (width * _weighted(_ERROR, [slope[i] for slope in slopes]) for i in range(2))
    alpha, dimensions = flow.alpha(end), state.y[0].numel()
    parts = [
        (alpha * y_error, alpha * state.y, alpha * stage.y),
        (growth_error / dimensions, state.growth / dimensions, stage.growth / dimensions),
    ]
    errors = [
        (e / (tolerance.atol + tolerance.rtol * torch.maximum(a.abs(), b.abs()))).flatten(1).square().mean(1)
        for e, a, b in parts
    ]
    return stage, torch.maximum(*errors).sqrt()


def _weighted(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(values[0])
    for weight, value in zip(weights, values, strict=True):
        total = total.add_(value, alpha=weight)
    return total
