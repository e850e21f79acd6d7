"""Which K of T timesteps a chain keeps: the best ones by dynamic programming, and rules of thumb."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from perrin.errors import ArgumentError, ShapeError
from perrin.schedules import space_timesteps

MOST_STEPS = 256
"""The most timesteps for which the best ones are sought."""


class BestTimesteps:
    """The timesteps of least total cost, for every K up to ``most`` (Watson et al., arXiv:2106.03802, alg. 1, 2).

    ``costs`` (T, T) float64 holds the cost of the jump from t to s at [t, s + 1], and at [t, 0] that of ending
    at t; it is infinite where s is not below t. Takes O(K T^2) time and keeps K T numbers and ``costs``.

    Raises `ShapeError` unless ``costs`` is square.
    """

    def __init__(self, costs: Tensor, most: int = MOST_STEPS) -> None:
        if costs.ndim != 2 or costs.shape[0] != costs.shape[1]:
            raise ShapeError(f"costs must be (T, T), got {tuple(costs.shape)}")
        self._costs = costs
        rows = [costs[:, 0]]  # eq. 17: the least cost from t on with k timesteps left, t being one of them
        for _ in range(1, min(most, len(costs))):
            rows.append(self._next(rows[-1]))
        self._least = torch.stack(rows)

    def _next(self, least: Tensor) -> Tensor:
        """The least cost with one more timestep. Jumps end below t, so the first t of a block bound its columns."""
        total = len(least)
        found = torch.full_like(least, torch.inf)
        for begin in range(0, total, BLOCK):
            rows = slice(begin, min(begin + BLOCK, total))
            ends = slice(0, rows.stop - 1)
            if rows.stop > 1:
                found[rows] = (self._costs[rows, 1 : rows.stop] + least[ends]).amin(1)
        return found

    @property
    def most(self) -> int:
        """The largest K."""
        return len(self._least)

    @property
    def totals(self) -> Tensor:
        """(most,): the least total cost of K = 1, 2, ... timesteps from T - 1 on."""
        return self._least[:, -1]

    def timesteps(self, steps: int) -> list[int]:
        """The best ``steps`` timesteps, ascending; the last is T - 1. Raises `ArgumentError` outside 1..most."""
        if not 1 <= steps <= self.most:
            raise ArgumentError(f"steps must be from 1 to {self.most}, got {steps}")
        t = len(self._costs) - 1
        found = [t]
        for left in range(steps - 2, -1, -1):
            t = int((self._costs[t, 1 : t + 1] + self._least[left, :t]).argmin())
            found.append(t)
        return found[::-1]


BLOCK = 128
"""Rows of the costs that are added at a time, to stay within a processor's cache."""


def even_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """``steps`` timesteps evenly spaced from 0 to T - 1."""
    return sorted(space_timesteps(num_timesteps, steps))


def quadratic_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """``steps`` timesteps from 0 to T - 1, spaced as squares, and by at least 1 (DDIM, arXiv:2010.02502, D.2)."""
    if steps == 1:
        return [num_timesteps - 1]
    squares = [round((num_timesteps - 1) * (i / (steps - 1)) ** 2) for i in range(steps)]
    return _distinct(squares)


def dense_head_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """The first T / K timesteps, at most half of the ``steps``, all of them, and the rest evenly up to T - 1.

    Most of the bound lies at low noise, which even spacing would skip (IDDPM, arXiv:2102.09672, appendix E).
    """
    head = min(-(-num_timesteps // steps), steps // 2)
    first, left = head, steps - head
    rest = (
        [num_timesteps - 1]
        if left == 1
        else [first + round(i * (num_timesteps - 1 - first) / (left - 1)) for i in range(left)]
    )
    return [*range(head), *rest]


def _distinct(timesteps: list[int]) -> list[int]:
    """``timesteps`` with each at least one above the one before."""
    found = timesteps[:1]
    for t in timesteps[1:]:
        found.append(max(t, found[-1] + 1))
    return found


SPACINGS: Mapping[str, Callable[[int, int], list[int]]] = {
    "even": even_timesteps,
    "quadratic": quadratic_timesteps,
    "dense head": dense_head_timesteps,
}
"""Rules that know nothing of the network, by name."""
