"""What a training loss weighs: the mean's squared error, and the variational bound."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

HYBRID_SHARE = 0.001
"""The share of the bound in the hybrid loss (IDDPM section 3.1, lambda)."""


class LossType(Enum):
    """Which loss `GaussianDiffusion.training_losses` returns."""

    MSE = "mse"
    RESCALED_MSE = "rescaled-mse"
    KL = "kl"
    RESCALED_KL = "rescaled-kl"


class LossWeights(NamedTuple):
    """Weights of the squared error (a mean over dimensions) and of one bound term (bits per dimension)."""

    mse: float
    vb: float


def loss_weights(loss_type: LossType, num_timesteps: int) -> LossWeights:
    """The weights of ``loss_type`` on a chain of T steps.

    A bound term drawn at a uniform t is 1/T of the bound on average: T times it estimates the bound, and
    T/1000 times it is the hybrid's share of it (IDDPM eq. 16).
    """
    return {
        LossType.MSE: LossWeights(1.0, 1.0),
        LossType.RESCALED_MSE: LossWeights(1.0, num_timesteps * HYBRID_SHARE),
        LossType.KL: LossWeights(0.0, 1.0),
        LossType.RESCALED_KL: LossWeights(0.0, float(num_timesteps)),
    }[loss_type]
