"""Bits-back coding along a chain, in an order that needs no more initial bits for more steps.

The latents are the x_1 … x_K of the papers, drawn on grids. To push x: pop x_1 ~ q(x_1 | x), push x ~ p(x | x_1),
pop x_2 ~ q(x_2 | x_1), push x_1 ~ p(x_1 | x_2), and so on up to x_K ~ N(0, 1): every pop but the first finds bits
that were just pushed (Bit-Swap, arXiv:1905.06845). On average this costs the variational bound (DDPM eq. 5), its
KL terms sampled. Examples follow each other on one stack, in batches that grow, so that only the first one
borrows bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from perrin.codec.coder import BorrowingStack, Stack, combined, is_untouched
from perrin.codec.kernels import Kernels
from perrin.errors import DataError

MOST_ROWS, MOST_VALUES = 64, 2**17
"""The largest batch: what a network of common size computes in a few hundred megabytes."""
GROWTH = 8
"""A batch has at most one example for so many before it, whose bits are then enough for it."""
CHECKED_BATCHES = 32
"""How many batches share a digest: the decoder stops there if it is wrong."""

Advance = Callable[[int, int], None]
"""Told how often the network was called, and how often it will be in all."""


class Encoded(NamedTuple):
    """What `encode` gives."""

    payload: bytes
    """Words of 32 bits, little-endian."""
    checks: tuple[str, ...]
    """A digest of the frequencies used, for each `CHECKED_BATCHES` batches in order."""
    net_bits: float
    """What the examples took: the payload without its initial bits."""
    initial_bits: int
    """Random bits in the payload: what the first example needed; the decoder gets them back."""
    network_calls: int
    """One for each batch and step."""


def batches(count: int, size: int) -> Iterator[slice]:
    """The batches of ``count`` examples of ``size`` values each."""
    most = max(1, min(MOST_ROWS, MOST_VALUES // size))
    start = 0
    while start < count:
        stop = min(start + min(max(1, start // GROWTH), most), count)
        yield slice(start, stop)
        start = stop


def encode(
    kernels: Kernels,
    values: np.ndarray,
    *,
    classes: Tensor | None = None,
    advance: Advance = lambda calls, total: None,
) -> Encoded:
    """``values`` (N, ...), level indices; ``classes`` (N,) for a conditional network.

    Raises `RunError` where the network gives values that are not finite.
    """
    stack, notes = BorrowingStack(), list[bytes]()
    parts = list(batches(len(values), values[0].size))
    for part in parts:
        given = None if classes is None else classes[part]
        _push(stack, values[part].astype(np.int64), kernels, given)
        notes.append(combined(stack.take_notes()))
        advance(len(notes) * kernels.steps, len(parts) * kernels.steps)
    starts = range(0, len(notes), CHECKED_BATCHES)
    checks = tuple(combined(notes[start : start + CHECKED_BATCHES]).hex() for start in starts)
    payload = stack.touched_words().astype("<u4").tobytes()
    return Encoded(payload, checks, stack.net_bits(), stack.initial_bits, len(parts) * kernels.steps)


def decode(
    kernels: Kernels,
    payload: bytes,
    checks: Sequence[str],
    shape: Sequence[int],
    *,
    classes: Tensor | None = None,
    advance: Advance = lambda calls, total: None,
) -> np.ndarray:
    """The values (N, ...) int64 of ``shape`` that `encode` made ``payload`` and ``checks`` of.

    Raises `DataError` where the frequencies are not the encoder's, or the stack does not come back to what it
    was before, and `RunError` like `encode`.
    """
    parts = _checked_parts(shape, len(checks))
    words = np.frombuffer(payload, "<u4")
    if not words.size or words[-1] == 0:
        raise DataError("the coded values must end in a word that is not 0, which every encoder leaves")
    stack = Stack(words)
    found: list[np.ndarray] = []
    notes: list[bytes] = []
    for number, part in reversed(list(enumerate(parts))):
        given = None if classes is None else classes[part]
        try:
            found.append(_pop(stack, (part.stop - part.start, *shape[1:]), kernels, given))
        except DataError:  # a value that no encoder writes
            raise DataError(_DISAGREEMENT) from None
        notes.append(combined(stack.take_notes()[::-1]))
        advance(len(found) * kernels.steps, len(parts) * kernels.steps)
        if number % CHECKED_BATCHES == 0:
            if combined(notes[::-1]).hex() != checks[number // CHECKED_BATCHES]:
                raise DataError(_DISAGREEMENT)
            notes = []
    if not is_untouched(stack.words()):
        raise DataError(_DISAGREEMENT)
    return np.concatenate(found[::-1])


def _push(stack: Stack, x: np.ndarray, kernels: Kernels, classes: Tensor | None) -> None:
    latent = kernels.first(x).pop(stack).reshape(x.shape)
    kernels.values(latent, classes).push(stack, x.ravel())
    for t in range(1, kernels.steps):
        above = kernels.noised(latent, t).pop(stack).reshape(x.shape)
        kernels.denoised(above, t, classes).push(stack, latent.ravel())
        latent = above
    kernels.prior(latent.size).push(stack, latent.ravel())


def _pop(stack: Stack, shape: tuple[int, ...], kernels: Kernels, classes: Tensor | None) -> np.ndarray:
    latent = kernels.prior(math.prod(shape)).pop(stack).reshape(shape)
    for t in range(kernels.steps - 1, 0, -1):
        below = kernels.denoised(latent, t, classes).pop(stack).reshape(shape)
        kernels.noised(below, t).push(stack, latent.ravel())
        latent = below
    x = kernels.values(latent, classes).pop(stack).reshape(shape)
    kernels.first(x).push(stack, latent.ravel())
    return x


def _checked_parts(shape: Sequence[int], checks: int) -> list[slice]:
    """The batches, once the number of ``checks`` is known to fit them."""
    plausible = shape[0] <= checks * CHECKED_BATCHES * MOST_ROWS  # otherwise the list could be of any length
    parts = list(batches(shape[0], math.prod(shape[1:]))) if plausible else []
    if math.ceil(len(parts) / CHECKED_BATCHES) != checks or not parts:
        raise DataError(f"{shape[0]} examples do not fit the number of checks, {checks}")
    return parts


_DISAGREEMENT = (
    "the model does not compute here what it computed where the file was compressed (another processor, or another "
    "version of torch, numpy, constriction or perrin): decompress it there"
)
