"""Var[x_0 | x_t]: what the network leaves unknown of the data, on which the best variance of every jump depends.

The best variance of p(x_s | x_t) is ``posterior_variance + posterior_mean_coef1^2 Var[x_0 | x_t]``
(Analytic-DPM, arXiv:2201.06503, eq. 8; arXiv:2206.07309 for a mean that is not exact), the same table for any s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from perrin.variance import STATE_FLOOR

POWERS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""How steeply the variance may follow what the network says; 0 is not at all."""

LEAST = 1e-12
"""The smallest variance: of a network that knows x_0 exactly, or an estimate that came out negative."""


DECODER_SHARE = 1 / 8
"""Least deviation of a decoder in distances of two levels: a level that is known costs 1e-4 bits, one that is missed
by one some 15. A width fitted to images in which none is missed would ask hundreds for the first."""


def least_decoder_variance(levels: int | None) -> float:
    """What is added to the variance of a decoder of ``levels``; 0 for continuous data."""
    return 0.0 if levels is None else (DECODER_SHARE * 2 / (levels - 1)) ** 2


class Covariance(NamedTuple):
    """Var[x_0 | x_t] of one dimension where the network's variance output has place u: ``exp(log_scale) u^power``.

    Both are (T,) float64. Power 0 is one number for all states of a timestep.
    """

    power: Tensor
    log_scale: Tensor

    def log_at(self, t: int | Tensor, places: Tensor) -> Tensor:
        """The logarithm where the place is ``places`` (..., B), ``t`` being an int or (...)."""
        power, log_scale = self.power[t], self.log_scale[t]
        return power[..., None] * places.clamp(min=STATE_FLOOR).log() + log_scale[..., None]


def scalar(variance: Tensor) -> Covariance:
    """The same ``variance`` (T,) for all states of a timestep."""
    return Covariance(torch.zeros_like(variance), variance.clamp(min=LEAST).log())


def analytic(eps_gain: Tensor, snr: Tensor) -> Covariance:
    """Analytic-DPM's estimate (eq. 8), ``(1 - Gamma) / SNR``, from ``eps_gain`` = 1 - Gamma and ``snr``, both (T,).

    Clipped to [0, 1], data in [-1, 1] having no larger variance. At the noisy end, from where Gamma is not below 1,
    what is left is noise of the estimate, and the last value before is kept.
    """
    variance = torch.where(snr > 0, eps_gain / snr, torch.inf)
    trusted = (eps_gain > 0) & (variance <= 1)
    if not bool(trusted.any()):
        return scalar(torch.ones_like(snr))
    last = int(trusted.nonzero().max())
    variance = torch.cat([variance[: last + 1], variance[last].expand(len(snr) - last - 1)])
    return scalar(variance.clamp(0, 1))


def per_state(shares: Tensor, errors: Tensor, places: Tensor) -> Covariance:
    """The fit to the mean squared ``errors`` at ``places``, with ``shares`` that sum to 1; each is (T, bins).

    Least squares, which is the divergence of a short jump to leading order: there a fit over states is at least as
    good as any one number, which is the best power 0.
    """
    fits = []
    for power in POWERS:
        shape = places.clamp(min=STATE_FLOOR) ** power
        along, square = (shares * errors * shape).sum(1), (shares * shape**2).sum(1)
        fits.append((along**2 / square, along / square))
    gains, scales = (torch.stack(column) for column in zip(*fits, strict=True))
    best = gains.argmax(0, keepdim=True)
    scale = scales.gather(0, best)[0].clamp(min=LEAST)
    return Covariance(torch.tensor(POWERS, dtype=torch.float64)[best[0]], scale.log())
