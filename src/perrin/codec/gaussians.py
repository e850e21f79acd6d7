"""Normal distributions over the points of a grid, with integer frequencies from few parameters.

The frequencies are this module's own, not those of a Gaussian model of the coder's: means and scales are first
rounded to grids, a table is made for each pair of them that occurs, and what the coder gets are whole numbers
that sum to its total. So encoder and decoder agree unless a parameter crosses a rounding boundary, or a value of
Phi differs by 1e-7 of itself, and both are noted. Tables are short: they end where the mass does, or, for numbers
that others have drawn, in one symbol, the escape, after which the number follows in plain bits; and where a
Gaussian is wide against its grid, the low bits are plain, since the density hardly changes over them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import torch

from perrin.codec.coder import TOTAL, Stack, Table, table
from perrin.errors import DataError

SCALES = 128
"""Scales in an octave: a standard deviation is at most 0.27% off, which costs 5e-6 nats on average."""
PARTS = 16
"""Places of the mean between two cells of the table."""
OWN_REACH = 5.5
"""Standard deviations to the end of a table that numbers are drawn from: 4e-8 of the mass lies beyond."""
ESCAPE_REACH = 8.0
"""Standard deviations to the escape, which takes 24 bits and the number's own, about what a Gaussian takes there."""
_NARROWEST = -1  # octaves: half a cell
_WIDEST = 7  # octaves: from 128 cells on, low bits are plain


@dataclass(frozen=True, eq=False)
class Gaussians:
    """Independent distributions of n whole numbers; all arrays (n,) int64."""

    whole: np.ndarray
    """The cell of the table's middle."""
    key: np.ndarray
    """Which table: its scale times `PARTS`, and the mean's place in the cell."""
    shift: np.ndarray
    """Low bits of the number below a cell."""
    width: int | None
    """Bits of a number after the escape, of a signed one; None for distributions that end where the table does."""

    @classmethod
    def of(cls, mean: np.ndarray, log2_std: np.ndarray, width: int | None) -> Gaussians:
        """Of means and binary logarithms of standard deviations, (n,) float64 in grid steps."""
        most = 40.0 if width is None else width + 1.0
        scale = np.rint(np.clip(log2_std, _NARROWEST, most) * SCALES).astype(np.int64)
        shift = np.maximum(scale // SCALES - (_WIDEST - 1), 0)
        cells = np.exp2(-shift.astype(np.float64))
        middle = np.clip(mean, -(2.0**50), 2.0**50) - (np.exp2(shift) - 1) / 2  # of a cell's numbers
        place = np.rint(middle * cells * PARTS).astype(np.int64) + PARTS // 2
        return cls(place // PARTS, (scale - shift * SCALES) * PARTS + place % PARTS, shift, width)

    def push(self, stack: Stack, numbers: np.ndarray) -> None:
        """``numbers`` (n,) int64. Raises `DataError` where one lies outside its distribution."""
        offset = (numbers >> self.shift) - self.whole
        reach = _reach(self.key // PARTS, self.width is not None)
        inside = np.abs(offset) <= reach
        self._push_low_bits(stack, numbers, inside)
        if not inside.all():
            self._push_escaped(stack, numbers[~inside])
        symbols = np.where(inside, offset + reach, 2 * reach + 1)
        for rows, by in reversed(list(self._groups())):
            stack.push(symbols[rows], by)
        stack.note(self._digest())

    def pop(self, stack: Stack) -> np.ndarray:
        """Numbers (n,) int64."""
        stack.note(self._digest())
        reach = _reach(self.key // PARTS, self.width is not None)
        symbols = np.empty(len(self.whole), np.int64)
        for rows, by in self._groups():
            symbols[rows] = stack.pop(len(rows), by)
        inside = symbols <= 2 * reach
        numbers: np.ndarray = (symbols - reach + self.whole) << self.shift
        if self.width is not None and not inside.all():
            numbers[~inside] = stack.pop_bits(int((~inside).sum()), self.width) - (1 << self.width - 1)
        self._pop_low_bits(stack, numbers, inside)
        return numbers

    def _push_escaped(self, stack: Stack, numbers: np.ndarray) -> None:
        if self.width is None:
            raise DataError("a noised value lies further from its mean than any encoder puts it")
        if np.abs(numbers).max() >= 1 << self.width - 1:
            raise DataError(f"a noised value lies beyond {self.width} bits")
        stack.push_bits(numbers + (1 << self.width - 1), self.width)

    def _groups(self) -> Iterator[tuple[np.ndarray, Table]]:
        """Rows that share a table, and the table."""
        order = np.argsort(self.key, kind="stable")
        ends = np.flatnonzero(np.diff(self.key[order])) + 1
        for rows in np.split(order, ends):
            yield rows, _table(int(self.key[rows[0]]), self.width is not None)

    def _shifted(self, inside: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Each shift above 0 and its rows among ``inside``."""
        found = (int(shift) for shift in np.unique(self.shift) if shift)
        return [(shift, np.flatnonzero(inside & (self.shift == shift))) for shift in found]

    def _push_low_bits(self, stack: Stack, numbers: np.ndarray, inside: np.ndarray) -> None:
        for shift, rows in reversed(self._shifted(inside)):
            stack.push_bits(numbers[rows] & ((1 << shift) - 1), shift)

    def _pop_low_bits(self, stack: Stack, numbers: np.ndarray, inside: np.ndarray) -> None:
        for shift, rows in self._shifted(inside):
            numbers[rows] |= stack.pop_bits(len(rows), shift)

    def _digest(self) -> bytes:
        digest = blake2b(digest_size=8)
        for parameter in (self.whole, self.key, self.shift):
            digest.update(parameter.astype("<i8").tobytes())
        return digest.digest()


def _reach(scale: np.ndarray, escape: bool) -> np.ndarray:
    """Cells of the tables on either side of their middle."""
    found: np.ndarray = _reaches(escape)[scale - _NARROWEST * SCALES]
    return found


@lru_cache(maxsize=2)
def _reaches(escape: bool) -> np.ndarray:
    """`_reach` by scale from the narrowest."""
    octaves = np.arange(_NARROWEST * SCALES, _WIDEST * SCALES + 1) / SCALES
    return np.ceil((ESCAPE_REACH if escape else OWN_REACH) * np.exp2(octaves)).astype(np.int64) + 1


@lru_cache(maxsize=2**13)  # some 50 MB; learned variances take a few thousand of them
def _table(key: int, escape: bool) -> Table:
    return table(frequencies(key // PARTS, key % PARTS, escape=escape))


def frequencies(scale: int, part: int, *, escape: bool) -> np.ndarray:
    """The table of standard deviation 2^(scale / SCALES) cells, its mean part / PARTS - 1/2 from the middle's.

    (2 reach + 1,) int64 by the offset from the middle, and one more for the escape.
    """
    reach = int(_reach(np.array(scale), escape))
    edges = torch.arange(-reach, reach, dtype=torch.float64) + 0.5 - (part / PARTS - 0.5)
    below = torch.special.ndtr(edges * 2.0 ** (-scale / SCALES)).numpy()
    return rounded(np.concatenate([[0.0], below, [1.0]]), escape)


def rounded(below: np.ndarray, escape: bool = False) -> np.ndarray:
    """Frequencies (..., n) from 1 of a distribution function at its n + 1 edges, 0 to 1: the sum is `TOTAL`.

    ``escape``: beside them, one of a last symbol that has no mass of its own.
    """
    share = TOTAL - (below.shape[-1] - 1) - escape
    steps = np.rint(np.maximum.accumulate(below, axis=-1) * share).astype(np.int64)
    found = np.diff(steps, axis=-1) + 1
    return np.append(found, 1) if escape else found
