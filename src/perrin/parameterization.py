"""What a network predicts: one pair (a_t, b_t) for each mean type, its output standing for a_t x_0 + b_t eps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

Number = TypeVar("Number", float, Tensor)
"""One number for the whole batch, or as many as a table has or a batch needs."""


class ModelMeanType(Enum):
    """What the network's output (or the first half of it) is a prediction of."""

    PREVIOUS_X = "previous-x"
    START_X = "start-x"
    EPSILON = "epsilon"
    VELOCITY = "velocity"


def output_pair(
    mean_type: ModelMeanType,
    alpha: Number,
    sigma: Number,
    previous: tuple[Number, Number],
) -> tuple[Number, Number]:
    """(a, b) where x_t = ``alpha`` x_0 + ``sigma`` eps: the network predicts ``a x_0 + b eps``.

    ``previous`` is the pair of PREVIOUS_X, which depends on the step before too.
    """
    zero, one = 0.0 * alpha, 0.0 * alpha + 1.0
    return {
        ModelMeanType.EPSILON: (zero, one),
        ModelMeanType.START_X: (one, zero),
        ModelMeanType.VELOCITY: (-sigma, alpha),  # arXiv:2202.00512, appendix D
        ModelMeanType.PREVIOUS_X: previous,
    }[mean_type]


class Reading(NamedTuple, Generic[Number]):
    """How an output is read: ``x_0 = xstart_out out + xstart_x x_t`` and ``eps = eps_out out + eps_x x_t``."""

    xstart_out: Number
    xstart_x: Number
    eps_out: Number
    eps_x: Number


def reading(a: Number, b: Number, alpha: Number, sigma: Number) -> Reading[Number]:
    """x_0 and eps from the two equations ``out = a x_0 + b eps`` and ``x_t = alpha x_0 + sigma eps``."""
    determinant = a * sigma - b * alpha
    return Reading(sigma / determinant, -b / determinant, -alpha / determinant, a / determinant)


@dataclass(frozen=True, slots=True)
class Denoised:
    """What a network says of x_t; unpacks as ``x_start, eps``.

    ``x_t = alpha x_start + sigma eps`` holds, also where x_start was clipped; eps is computed when it is asked for,
    anew each time by ``make_eps``, since most step rules do without. Only the ancestral step looks at
    the rest: ``extra``, the variance half of the output; ``previous``, an output that is itself the mean of
    x_{t-1}; ``gradient``, by which a classifier moves the mean, in units of the variance.
    """

    x_start: Tensor
    make_eps: Callable[[], Tensor]
    extra: Tensor | None = None
    previous: Tensor | None = None
    gradient: Tensor | None = None

    @property
    def eps(self) -> Tensor:
        """The noise in x_t."""
        return self.make_eps()

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.x_start, self.eps))
