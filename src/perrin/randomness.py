"""Random numbers by key: what is drawn depends on a key such as (seed, rank, step), never on what ran before."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import torch
from torch import Tensor


def seed_of(*key: int | str) -> int:
    """A 63-bit seed for ``key``; nearby keys give unrelated seeds."""
    plain = tuple(
        part if isinstance(part, str) else int(part) for part in key
    )  # NumPy's ints print otherwise
    digest = blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_for(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator on ``device`` whose stream is determined by ``key`` alone."""
    return torch.Generator(device).manual_seed(seed_of(*key))


def normal_rows(like: Tensor, generators: Iterable[torch.Generator]) -> Tensor:
    """Standard normal noise shaped like ``like`` (B, ...), row i drawn from the i-th generator.

    A row is the same whatever the other rows are, so results do not depend on the batch size.
    """
    noise = torch.empty_like(like, memory_format=torch.contiguous_format)
    for row, generator in zip(noise.unbind(), generators, strict=True):
        row.normal_(generator=generator)
    return noise
