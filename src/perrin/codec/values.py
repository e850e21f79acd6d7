"""The last reverse step: a discretised Gaussian over the levels of the data, with integer frequencies.

Up to 256 levels are one symbol. More are two, the high and the low byte, so that a row of frequencies is never
longer than 256 and every level keeps a frequency of at least 1 in 2^24 for each byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from perrin.codec.coder import Stack
from perrin.codec.gaussians import SCALES, rounded
from perrin.errors import DataError

BASE = 256
_ROWS = 4096  # values whose frequencies are held at a time: 8 MB
_OCTAVES = (-10, 24)  # of a standard deviation in levels
_FINENESS = 7  # the mean lies on a grid of at most std / 2^6


@dataclass(frozen=True, eq=False)
class Values:
    """Independent distributions of n levels (DDPM eq. 13); arrays (n,) float64 in units of a level."""

    mean: np.ndarray
    std: np.ndarray
    levels: int

    @classmethod
    def of(cls, mean: np.ndarray, log2_std: np.ndarray, levels: int) -> Values:
        """Of means and binary logarithms of standard deviations of data in [-1, 1], (n,) float64."""
        per_unit = (levels - 1) / 2
        scale = np.rint(np.clip(log2_std + np.log2(per_unit), *_OCTAVES) * SCALES)
        grid = np.exp2(scale // SCALES - _FINENESS)
        place = np.clip((mean + 1) * per_unit, -levels, 2 * levels)
        return cls(np.rint(place / grid) * grid, np.exp2(scale / SCALES), levels)

    def push(self, stack: Stack, numbers: np.ndarray) -> None:
        """``numbers`` (n,) int64 from 0 to ``levels`` - 1."""
        for part, some in reversed(list(self._pieces())):
            high, low = np.divmod(numbers[part], some._unit)
            if some._unit > 1:
                stack.push_rows(low, some._low(high))
            stack.push_rows(high, some._high())

    def pop(self, stack: Stack) -> np.ndarray:
        """Numbers (n,) int64. Raises `DataError` for a level that does not exist, which no encoder writes."""
        numbers = np.empty(len(self.mean), np.int64)
        for part, some in self._pieces():
            high = stack.pop_rows(some._high()).astype(np.int64)
            low = stack.pop_rows(some._low(high)) if some._unit > 1 else 0
            numbers[part] = high * some._unit + low
        if (numbers >= self.levels).any():
            raise DataError(f"a decoded value is {numbers.max()}, beyond the {self.levels} levels")
        return numbers

    @property
    def _unit(self) -> int:
        """Levels to a high symbol."""
        return 1 if self.levels <= BASE else BASE

    def _pieces(self) -> Iterator[tuple[slice, Values]]:
        for start in range(0, len(self.mean), _ROWS):
            part = slice(start, start + _ROWS)
            yield part, Values(self.mean[part], self.std[part], self.levels)

    def _high(self) -> np.ndarray:
        inner = np.arange(self._unit, self.levels, self._unit) - 0.5
        edges = np.concatenate([[-np.inf], inner, [np.inf]])
        return rounded(self._below(np.broadcast_to(edges, (len(self.mean), len(edges)))))

    def _low(self, high: np.ndarray) -> np.ndarray:
        edges = high[:, None] * self._unit + np.arange(self._unit + 1) - 0.5
        edges[edges < 0] = -np.inf
        edges[edges > self.levels - 1] = np.inf
        return rounded(self._below(edges))

    def _below(self, edges: np.ndarray) -> np.ndarray:
        """The distribution function at ``edges`` (n, m), 0 at the first and 1 at the last of each row."""
        z = torch.from_numpy((edges - self.mean[:, None]) / self.std[:, None])
        above = z[:, :1] > 0  # there Phi is 1 - tiny: the same from the other side keeps its digits
        phi = torch.special.ndtr(torch.where(above, -z, z))
        mass = (phi[:, -1:] - phi[:, :1]).abs()
        even = torch.linspace(0, 1, z.shape[1], dtype=torch.float64)
        found: np.ndarray = torch.where(mass > 0, (phi - phi[:, :1]).abs() / mass, even).numpy()
        return found
