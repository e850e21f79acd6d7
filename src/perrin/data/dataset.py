"""A data set in memory or memory-mapped, what a run remembers of it, and the order it is read in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from perrin.data.levels import to_unit
from perrin.errors import ArgumentError, DataError
from perrin.randomness import seed_of

FINGERPRINT_ROWS = 1024
"""Few enough to be read at once from a memory map of any length."""


@dataclass(frozen=True)
class Facts:
    """What a run remembers of its data; plain JSON values."""

    shape: tuple[int, ...]
    """(C, H, W) of an image or (D,) of a vector."""
    levels: int | None
    """Number of levels per value; None for continuous floats."""
    class_names: tuple[str, ...] | None
    """Name of each class, by label; None without labels."""
    count: int
    """Number of examples, on which the split into training and held-out part depends."""
    fingerprint: str = ""
    """A hash of names, labels and a part of the values; empty where it was not taken."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """N examples, decoded."""

    values: np.ndarray
    """(N, *shape): uint8 or uint16 level indices, or float32 in [-1, 1] where ``facts.levels`` is None."""
    labels: np.ndarray | None
    """(N,) int64 classes, or None."""
    names: Sequence[str]
    """N names: the file's path in its folder, or the index as text."""
    facts: Facts
    guessed: bool = False
    """Whether the values alone told the levels: whole numbers of a type wider than 16 bits."""

    def __len__(self) -> int:
        return len(self.values)

    def batch(
        self, indices: np.ndarray | Sequence[int], device: torch.device | str
    ) -> tuple[Tensor, Tensor | None]:
        """The examples at ``indices`` (B,): float32 (B, *shape) in [-1, 1], and labels (B,) int64 or None."""
        rows = np.asarray(indices, dtype=np.int64)
        x = to_unit(self.values[rows], self.facts.levels, device)
        return x, None if self.labels is None else torch.from_numpy(self.labels[rows]).to(device)


def fingerprint(dataset: Dataset) -> str:
    """A hash of the names, the labels and `FINGERPRINT_ROWS` evenly spaced examples: what a changed set changes."""
    names = "\0".join(dataset.names).encode(errors="surrogateescape")  # a file's name may be no UTF-8
    digest = blake2b(names, digest_size=12)
    if dataset.labels is not None:
        digest.update(dataset.labels.tobytes())
    rows = np.linspace(0, len(dataset) - 1, min(len(dataset), FINGERPRINT_ROWS)).astype(np.int64)
    digest.update(np.ascontiguousarray(dataset.values[rows]).tobytes())
    return digest.hexdigest()


def split(n: int, held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices (train, held-out) of ``n`` examples, the same for ever for the same ``n`` and share.

    The nearest whole number to ``held_out * n`` is held out, and at least one example on either side.
    Raises `ArgumentError` for a share outside (0, 1) and `DataError` for fewer than two examples.
    """
    if not 0 < held_out < 1:
        raise ArgumentError(f"held_out must lie between 0 and 1, got {held_out}")
    if n < 2:
        raise DataError(f"a held-out part needs at least 2 examples, got {n}")
    order = _permutation(n, seed_of("split", n))
    count = min(max(round(held_out * n), 1), n - 1)
    return np.sort(order[count:]), np.sort(order[:count])


def spread(indices: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of ``indices``, at even distances."""
    count = min(len(indices), most)
    return [indices[place * len(indices) // count] for place in range(count)]


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Indices (batch_size,) of the batch at ``step``: a pure function, so a resumed run goes on in order.

    Each pass over the ``n`` examples has its own permutation, keyed by (seed, pass); batches run on from
    one pass into the next.
    """
    begin, end = step * batch_size, (step + 1) * batch_size
    passes = [_pass_order(n, seed, epoch) for epoch in range(begin // n, (end - 1) // n + 1)]
    return np.concatenate(passes)[begin % n :][:batch_size]


@lru_cache(maxsize=4)
def _pass_order(n: int, seed: int, epoch: int) -> np.ndarray:
    order = _permutation(n, seed_of("pass", seed, epoch))
    order.flags.writeable = False
    return order


def _permutation(n: int, seed: int) -> np.ndarray:
    # The raw 64-bit stream is what NumPy promises never to change (NEP 19); `permutation` is not.
    return np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")
