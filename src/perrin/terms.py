"""What the engine's methods return: dictionaries with the reference implementation's keys, typed."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from torch import Tensor


class PMeanVariance(TypedDict):
    """p(x_{t-1} | x_t) and the prediction of x_0, each shaped like x."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_xstart: Tensor


class BoundTerms(TypedDict):
    """One term of the bound (B,), in bits per dimension, and the prediction of x_0."""

    output: Tensor
    pred_xstart: Tensor


class TrainingTerms(TypedDict):
    """The loss (B,) and what it is the sum of."""

    loss: Tensor
    mse: NotRequired[Tensor]
    vb: NotRequired[Tensor]


class BoundCurve(TypedDict):
    """The bound (B,) and its terms (B, T) in bits per dimension, and the squared errors of x_0 and eps (B, T).

    Column 0 is t = T - 1.
    """

    total_bpd: Tensor
    prior_bpd: Tensor
    vb: Tensor
    xstart_mse: Tensor
    mse: Tensor
