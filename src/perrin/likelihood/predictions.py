"""What a network says of one draw of x_t of each image, with what the bound needs to know of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perrin.diffusion import GaussianDiffusion
from perrin.gaussian import gaussian_log_likelihood
from perrin.randomness import generator_for, normal_rows
from perrin.reverse import Model
from perrin.variance import VARIANCES

EDGES = torch.tensor(
    [
        *(i / 16 for i in range(-8, 1)),
        *(2 ** (i / 4) for i in range(-20, -8)),  # from STATE_FLOOR on, below which the variance is the same
        *(i / 32 for i in range(8, 49)),
    ],
    dtype=torch.float64,
)
"""Between these places lie the bins, and one on either side: fine in the logarithm, for variances follow it."""


class Histogram(NamedTuple):
    """Squared errors by the place of the network's variance output, (bins,) each; one bin where it has none."""

    shares: Tensor
    """Of the dimensions; they sum to 1."""
    errors: Tensor
    """Mean squared error."""
    places: Tensor
    """Mean place."""


class Prediction(NamedTuple):
    """At one timestep, for N images of D dimensions."""

    x_start: Tensor
    """(N, D): the data."""
    pred_xstart: Tensor
    """(N, D): what the network takes them for, clipped to [-1, 1]."""
    places: Tensor | None
    """(N, D): where the network's log-variance lies between the posterior's (0) and log beta (1)."""
    eps_gain: Tensor
    """(N,): mean of eps^2 less that of the network's."""

    @property
    def squared_error(self) -> Tensor:
        """(N, D), float64."""
        return (self.pred_xstart - self.x_start).double().square()

    def decoder_nats(self, log_variance: Tensor, levels: int | None) -> Tensor:
        """-log p(x_0 | x_t) / D of each image, (N,) float64 on the CPU, ``log_variance`` broadcasting to (N, D)."""
        log_scales = (log_variance / 2).to(self.pred_xstart.device)
        means = self.pred_xstart.double()
        log_p = gaussian_log_likelihood(self.x_start, means=means, log_scales=log_scales, levels=levels)
        return -log_p.mean(1).cpu()

    def histogram(self) -> Histogram:
        """The squared errors by place, float64 on the CPU."""
        errors = self.squared_error.flatten().cpu()
        if self.places is None:
            one = torch.ones(1, dtype=torch.float64)
            return Histogram(one, errors.mean()[None], one)
        places = self.places.double().flatten().cpu()
        bins = torch.bucketize(places, EDGES, right=True)
        empty = torch.zeros(len(EDGES) + 1, dtype=torch.float64)
        counts = empty.index_add(0, bins, torch.ones_like(errors))
        sums = (empty.index_add(0, bins, values) for values in (errors, places))
        return Histogram(counts / len(errors), *(total / counts.clamp(min=1) for total in sums))


@dataclass(frozen=True, eq=False)
class Images:
    """N images and the network that is asked about them."""

    diffusion: GaussianDiffusion
    model: Model
    x_start: Tensor
    indices: Sequence[int]
    """Their places in the data set, on which their noise depends."""
    seed: int
    batch_size: int
    """Images of one network call."""
    model_kwargs: Mapping[str, Any]
    """Tensors hold a row for each image."""

    def predictions(self, t: int) -> Prediction:
        """What the network says of one draw of x_t of each image, with the noise that `bound` takes."""
        parts = list(self._parts(t))
        places = [part.places for part in parts if part.places is not None]
        return Prediction(
            torch.cat([part.x_start for part in parts]),
            torch.cat([part.pred_xstart for part in parts]),
            torch.cat(places) if places else None,
            torch.cat([part.eps_gain for part in parts]),
        )

    def _parts(self, t: int) -> Iterator[Prediction]:
        for begin in range(0, len(self.x_start), self.batch_size):
            rows = slice(begin, begin + self.batch_size)
            x_start = self.x_start[rows]
            noise = self._noise(rows, t)
            x_t = self.diffusion.q_sample(x_start, t, noise)
            output = self.diffusion.output(self.model, x_t, t, self._told(rows))
            denoised = self.diffusion.read(output, x_t, t, clip_denoised=True)
            gain = (noise.double().square() - denoised.eps.double().square()).flatten(1).mean(1)
            places = places_of(self.diffusion, denoised.extra, t)
            yield Prediction(x_start.flatten(1), denoised.x_start.flatten(1), places, gain)

    def _noise(self, rows: slice, t: int) -> Tensor:
        device, time = self.x_start.device, int(self.diffusion.floats["timestep_map"][t])
        keys = (("bound", int(self.seed), int(index), time) for index in self.indices[rows])
        return normal_rows(self.x_start[rows], (generator_for(device, *key) for key in keys))

    def _told(self, rows: slice) -> dict[str, Any]:
        return {
            name: value[rows]
            if isinstance(value, Tensor) and value.shape[:1] == self.x_start.shape[:1]
            else value
            for name, value in self.model_kwargs.items()
        }


def place_range(diffusion: GaussianDiffusion) -> tuple[Tensor, Tensor] | None:
    """(low, span), each (T,) float64: the network's variance output at place 0, and how far place 1 is above it.

    None where the network has no variance.
    """

    def table(name: str) -> Tensor:
        return torch.tensor(diffusion.floats[name], dtype=torch.float64)

    ends = VARIANCES[diffusion.model_var_type].ends(table)
    if ends is None:
        return None
    low, high = (torch.as_tensor(end, dtype=torch.float64).expand(diffusion.num_timesteps) for end in ends)
    return low, torch.where(high > low, high - low, 1.0)  # equal in a chain of one step


def places_of(diffusion: GaussianDiffusion, extra: Tensor | None, t: int) -> Tensor | None:
    """The places (B, D) of the network's variance output ``extra`` (B, ...) at ``t``; None where it has none."""
    ends = place_range(diffusion)
    if ends is None or extra is None:
        return None
    low, span = (float(end[t]) for end in ends)
    return (extra.flatten(1) - low) / span
