"""The width of the decoder p(x_0 | x_t), fitted at every timestep at which a chain might end.

The bin of a level under a Gaussian narrower than half the distance of two levels is not most probable at the root
mean squared error, so the width is searched for the likelihood itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from perrin.likelihood.covariance import Covariance, least_decoder_variance, per_state, scalar
from perrin.likelihood.predictions import Histogram, Prediction

FACTORS = tuple(1.1**i for i in range(-24, 25))
"""The widths that are tried, as multiples of the root mean squared error."""


class Decoder(Protocol):
    """The decoder's variance at the timesteps in order, and what it costs."""

    def add(self, found: Prediction, histogram: Histogram) -> Mapping[str, Tensor]:
        """-log p(x_0 | x_t) / D (N,) in nats by kind, at the next timestep."""
        ...

    def widths(self) -> dict[str, Covariance]:
        """The decoder's variance by kind, at the timesteps so far."""
        ...


class FixedDecoder:
    """Widths that are known."""

    def __init__(self, levels: int | None, widths: Mapping[str, Covariance]) -> None:
        self._levels, self._widths, self._t = levels, dict(widths), 0

    def add(self, found: Prediction, histogram: Histogram) -> Mapping[str, Tensor]:
        """-log p(x_0 | x_t) / D (N,) in nats by kind, at the next timestep."""
        t, self._t = self._t, self._t + 1
        places = places_or_one(found)
        return {
            kind: found.decoder_nats(with_least(width.log_at(t, places), self._levels), self._levels)
            for kind, width in self._widths.items()
        }

    def widths(self) -> dict[str, Covariance]:
        """The decoder's variance by kind."""
        return self._widths


class FittedDecoder:
    """Widths that are fitted to the images: ``calibrated``, and ``per-state`` where the network has a variance."""

    def __init__(self, levels: int | None) -> None:
        self._levels = levels
        self._nearest: dict[str, int] = {}
        self._found: dict[str, list[Covariance]] = {}

    def add(self, found: Prediction, histogram: Histogram) -> Mapping[str, Tensor]:
        """-log p(x_0 | x_t) / D (N,) in nats by kind, at the next timestep."""
        row = Histogram(*(column[None] for column in histogram))
        starts = {"calibrated": scalar((row.shares * row.errors).sum(1))}
        if found.places is not None:
            starts["per-state"] = per_state(*row)
        costs: dict[str, Tensor] = {}
        widths: dict[str, Covariance] = {}
        for kind, start in starts.items():
            widths[kind], costs[kind] = self._widened(kind, start, found)
        if found.places is not None and costs["per-state"].mean() > costs["calibrated"].mean():
            widths["per-state"], costs["per-state"] = widths["calibrated"], costs["calibrated"]
        for kind, width in widths.items():
            self._found.setdefault(kind, []).append(width)
        return costs

    def _widened(self, kind: str, start: Covariance, found: Prediction) -> tuple[Covariance, Tensor]:
        """``start`` times the factor with the least cost, which is sought from the last timestep's on."""
        known: dict[int, Tensor] = {}
        log_variance = start.log_at(0, places_or_one(found))

        def cost(i: int) -> float:
            if i not in known:
                wider = with_least(log_variance + 2 * math.log(FACTORS[i]), self._levels)
                known[i] = found.decoder_nats(wider, self._levels)
            return float(known[i].mean())

        best = descend(cost, self._nearest.get(kind, len(FACTORS) // 2), len(FACTORS))
        self._nearest[kind] = best
        return Covariance(start.power, start.log_scale + 2 * math.log(FACTORS[best])), known[best]

    def widths(self) -> dict[str, Covariance]:
        """The decoder's variance by kind, at the timesteps so far."""
        return {
            kind: Covariance(*(torch.cat(column) for column in zip(*parts, strict=True)))
            for kind, parts in self._found.items()
        }


def descend(cost: Callable[[int], float], start: int, count: int) -> int:
    """The place, out of ``count``, at which ``cost`` is least near ``start``; ``cost`` should have one valley."""
    while True:
        best = min((i for i in (start, start - 1, start + 1) if 0 <= i < count), key=cost)
        if best == start:
            return best
        start = best


def with_least(log_variance: Tensor, levels: int | None) -> Tensor:
    """``log_variance`` of a decoder's variance with the least one added."""
    least = least_decoder_variance(levels)
    return (
        torch.logaddexp(log_variance, torch.full_like(log_variance, math.log(least)))
        if least
        else log_variance
    )


def places_or_one(found: Prediction) -> Tensor:
    """The places (N, D) of the prediction, or a single 1 where there are none; float64 on the CPU."""
    if found.places is None:
        return torch.ones(1, dtype=torch.float64)
    return found.places.double().cpu()
