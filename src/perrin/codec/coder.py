"""A stack of bits by asymmetric numeral systems, from the package `constriction`, which nothing else imports."""

from __future__ import annotations

import math
from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from perrin.errors import ArgumentError

PRECISION = 24
TOTAL = 2**PRECISION
"""What the frequencies of a distribution sum to: the most that the coder knows."""

_DIGIT = 16  # bits of plain numbers pushed at a time, below PRECISION
_HEAD = 2  # words of the stack that the coder holds as its state


class Table(NamedTuple):
    """A distribution over 0 … n - 1 by integer frequencies."""

    model: Any
    digest: bytes
    """Of the frequencies."""


def require() -> None:
    """Raise `ArgumentError` where the package is missing."""
    _stream()


def table(frequencies: np.ndarray) -> Table:
    """The distribution of ``frequencies`` (n,), whole numbers from 1 that sum to `TOTAL`."""
    return Table(_models().Categorical(_spare(frequencies), perfect=False), _digest(frequencies))


class Stack:
    """Symbols pushed come back in reverse order; a distribution costs a symbol -log2(frequency / `TOTAL`) bits.

    Arrays are pushed so that a pop gives them back in their order. What was pushed by which frequencies is
    noted, so that two stacks that did the same, in either direction, can be told from two that did not.
    """

    def __init__(self, words: np.ndarray) -> None:
        self._coder = _coder(words)
        self._notes: list[bytes] = []

    def push(self, symbols: np.ndarray, by: Table) -> None:
        """``symbols`` (n,) by one distribution."""
        self.note(by.digest)
        self._coder.encode_reverse(symbols.astype(np.int32), by.model)

    def pop(self, count: int, by: Table) -> np.ndarray:
        """``count`` symbols (int32) of one distribution."""
        self.note(by.digest)
        return self._popped(count, by.model)

    def push_rows(self, symbols: np.ndarray, frequencies: np.ndarray) -> None:
        """``symbols`` (n,), each by its own row of ``frequencies`` (n, m)."""
        self.note(_digest(frequencies))
        rows = _models().Categorical(perfect=False)
        self._coder.encode_reverse(symbols.astype(np.int32), rows, _spare(frequencies))

    def pop_rows(self, frequencies: np.ndarray) -> np.ndarray:
        """Symbols (n,) int32, each by its own row of ``frequencies`` (n, m)."""
        self.note(_digest(frequencies))
        return self._popped(len(frequencies), _models().Categorical(perfect=False), _spare(frequencies))

    def push_bits(self, numbers: np.ndarray, width: int) -> None:
        """``numbers`` (n,) of ``width`` bits, all equally likely."""
        for start in reversed(range(0, width, _DIGIT)):
            bits = min(_DIGIT, width - start)
            digits = (numbers >> start) & ((1 << bits) - 1)
            self._coder.encode_reverse(digits.astype(np.int32), _models().Uniform(1 << bits))

    def pop_bits(self, count: int, width: int) -> np.ndarray:
        """Numbers (``count``,) int64 of ``width`` bits."""
        numbers = np.zeros(count, np.int64)
        for start in range(0, width, _DIGIT):
            bits = min(_DIGIT, width - start)
            numbers |= self._popped(count, _models().Uniform(1 << bits)).astype(np.int64) << start
        return numbers

    def note(self, what: bytes) -> None:
        """Remember ``what`` was done."""
        self._notes.append(what)

    def take_notes(self) -> list[bytes]:
        """What was noted since the last call, oldest first."""
        notes, self._notes = self._notes, []
        return notes

    def words(self) -> np.ndarray:
        """What lies on the stack, (n,) uint32, the top at the end."""
        found: np.ndarray = self._coder.get_compressed()
        return found

    def bits(self) -> float:
        """How much lies on the stack: its words, and the logarithm of the coder's state."""
        depth, state = self._coder.pos()
        return float(32 * depth + math.log2(max(state, 1)))

    def _popped(self, count: int, model: Any, *parameters: np.ndarray) -> np.ndarray:
        size = parameters if parameters else (count,)
        found: np.ndarray = self._coder.decode(model, *size)
        return found


class BorrowingStack(Stack):
    """A stack on top of `random_words`, as many as its pops reach down to: the initial bits of bits-back coding."""

    def __init__(self) -> None:
        self._supply = random_words()
        self._beneath = 0
        super().__init__(self._next_words(_HEAD))
        self._lowest = 0
        self._at_start = self.bits()

    @property
    def initial_bits(self) -> int:
        """How many random bits the pops so far have reached."""
        return 32 * (self._beneath - self._lowest)

    def net_bits(self) -> float:
        """What has been put on top of what was there before: pushes less pops."""
        return self.bits() - self._at_start - 32 * (self._beneath - _HEAD)

    def touched_words(self) -> np.ndarray:
        """What lies on the stack above the random words that no pop has reached."""
        return self.words()[self._lowest :]

    def _popped(self, count: int, model: Any, *parameters: np.ndarray) -> np.ndarray:
        most = count * PRECISION // 32 + _HEAD
        if self._coder.pos()[0] < most:
            self._slide_beneath(2 * most)
        found = super()._popped(count, model, *parameters)
        self._lowest = min(self._lowest, self._coder.pos()[0])
        return found

    def _slide_beneath(self, count: int) -> None:
        more = self._next_words(count)
        self._lowest += count
        self._coder = _coder(np.concatenate([more, self.words()]))

    def _next_words(self, count: int) -> np.ndarray:
        self._beneath += count
        return np.array(list(islice(self._supply, count)), np.uint32)[::-1]


def random_words() -> Iterator[int]:
    """The words that lie under a fresh stack, from the top: the same for ever, in every file.

    Their seed is no secret; they need only look random, so that what is popped of them has the distribution
    asked for.
    """
    generator = np.random.PCG64(0x7065_7272_696E)  # the raw stream is what NumPy promises to keep (NEP 19)
    yield int(generator.random_raw()) >> 32 | 1  # the coder knows no stack whose top is 0
    while True:
        yield int(generator.random_raw()) >> 32


def is_untouched(words: np.ndarray) -> bool:
    """Whether ``words`` (the top at the end) are the beginning of `random_words`: nothing is left on them."""
    return list(words[::-1]) == list(islice(random_words(), len(words)))


def combined(notes: list[bytes]) -> bytes:
    """One digest for all ``notes`` in their order."""
    return blake2b(b"".join(notes), digest_size=8).digest()


def _digest(frequencies: np.ndarray) -> bytes:
    return blake2b(np.ascontiguousarray(frequencies, "<i4").tobytes(), digest_size=8).digest()


def _spare(frequencies: np.ndarray) -> np.ndarray:
    # The coder scales what it is given to TOTAL less one for each symbol, and adds that one to each: given
    # whole numbers with just that sum, it scales by 1 and gets back the frequencies, exactly.
    return np.ascontiguousarray(frequencies - 1, dtype=np.float32)


def _coder(words: np.ndarray) -> Any:
    return _stream().stack.AnsCoder(np.ascontiguousarray(words, np.uint32))


def _models() -> Any:
    return _stream().model


def _stream() -> Any:
    try:
        import constriction
    except ImportError:
        raise ArgumentError(
            "compression needs the package constriction, which is not installed: pip install 'perrin[codec]'"
        ) from None
    return constriction.stream
