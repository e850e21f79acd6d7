"""What a network leaves unknown of some images, timestep by timestep, in one pass: T network calls per image.

From these statistics follows the expected bound of every chain over any of the timesteps with any variance, so
that variances and timesteps can be chosen, and compared on other images, without another call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perrin.diffusion import GaussianDiffusion
from perrin.errors import ArgumentError, NonFiniteError
from perrin.likelihood.covariance import Covariance
from perrin.likelihood.decoder import Decoder, FittedDecoder, FixedDecoder
from perrin.likelihood.examples import checked
from perrin.likelihood.predictions import Histogram, Images, Prediction
from perrin.parameterization import ModelMeanType
from perrin.reverse import Model


@dataclass(frozen=True, eq=False)
class Statistics:
    """What N images gave, in float64 on the CPU; nats and errors are means over the dimensions."""

    prior: Tensor
    """(N,): KL(q(x_T | x_0) || N(0, I)), nats."""
    squared_error: Tensor
    """(N, T): of the clipped prediction of x_0 at one draw of x_t."""
    eps_gain: Tensor
    """(T,): 1 - Gamma, as the mean of eps^2 less that of the network's, so that most of the noise cancels."""
    histograms: Histogram
    """Of all images, each (T, bins)."""
    widths: Mapping[str, Covariance]
    """The decoder's variance by kind: ``calibrated``, and ``per-state`` where the network has a variance."""
    decoder: Mapping[str, Tensor]
    """(N, T) by kind: -log p(x_0 | x_t) under ``widths``, nats."""

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.squared_error.shape[1]

    @property
    def learned(self) -> bool:
        """Whether the network gives a variance."""
        return "per-state" in self.decoder


def collect(
    diffusion: GaussianDiffusion,
    model: Model,
    x_start: Tensor,
    *,
    indices: Sequence[int],
    seed: int = 0,
    batch_size: int = 64,
    widths: Mapping[str, Covariance] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Statistics:
    """Statistics of ``x_start`` (N, ...), whose places in its data set are ``indices``, at every timestep.

    Predictions are clipped to [-1, 1]. The noise is that of `bound` for the same seed, indices and timesteps.
    The decoder's ``widths`` are fitted to these images unless they are given. Tensors in ``model_kwargs`` hold a
    row for each image.

    Raises `ShapeError` for no images or too few indices; `ArgumentError` for data that are not finite or not on the
    diffusion's levels, and for PREVIOUS_X, whose mean in the full chain is not that of any clipped x_0;
    `NonFiniteError` where the network's output is not finite.
    """
    x_start = checked(x_start, diffusion.levels, indices)
    if diffusion.model_mean_type is ModelMeanType.PREVIOUS_X:
        raise ArgumentError("calibration needs a network that predicts epsilon, x_0 or v, got previous-x")
    images = Images(diffusion, model, x_start, indices, seed, batch_size, dict(model_kwargs or {}))
    levels = diffusion.levels
    with torch.no_grad():
        return _passage(images, FittedDecoder(levels) if widths is None else FixedDecoder(levels, widths))


def _passage(images: Images, decoder: Decoder) -> Statistics:
    errors, gains, histograms, costs = [], [], [], []
    for t in range(images.diffusion.num_timesteps):
        found = images.predictions(t)
        _check(found, t)
        histograms.append(found.histogram())
        costs.append(decoder.add(found, histograms[-1]))
        errors.append(found.squared_error.mean(1).cpu())
        gains.append(found.eps_gain.mean().cpu())
    prior = images.diffusion.prior_bpd(images.x_start).double().cpu() * math.log(2)
    return Statistics(
        prior,
        torch.stack(errors, 1),
        torch.stack(gains),
        Histogram(*(torch.stack(column) for column in zip(*histograms, strict=True))),
        decoder.widths(),
        {kind: torch.stack([cost[kind] for cost in costs], 1) for kind in costs[0]},
    )


def _check(found: Prediction, t: int) -> None:
    for output in (found.pred_xstart, found.places):
        if output is not None and not bool(output.isfinite().all()):
            raise NonFiniteError(f"the network's output at timestep {t} is not finite")
