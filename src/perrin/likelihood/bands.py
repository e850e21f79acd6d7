"""The bound by noise level: bands of log-SNR, over which its KL terms are summed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perrin.diffusion import GaussianDiffusion
from perrin.likelihood.bound import Bound

EDGES = tuple(range(-6, 16, 2))
"""Between two bands, in nats of log(alpha^2 / sigma^2); 13.3 is a third of half a level of 8-bit data."""


@dataclass(frozen=True)
class NoiseBands:
    """Which band each timestep of a chain lies in; those at low noise come first."""

    names: tuple[str, ...]
    """``log-SNR 6 to 8``, ``log-SNR below -6``, ...; bands without timesteps are left out."""
    places: tuple[int, ...]
    """(T,): the number of each timestep's band."""

    @classmethod
    def of(cls, diffusion: GaussianDiffusion) -> NoiseBands:
        """The bands of the chain's timesteps t >= 1, the decoder's t = 0 counting with the first of them."""
        log_snr = [diffusion.level_of_batch(t).log_snr for t in range(diffusion.num_timesteps)]
        cells = [sum(value >= edge for edge in EDGES) for value in log_snr]
        cells[0] = cells[min(1, len(cells) - 1)]
        used = sorted(set(cells), reverse=True)
        return cls(tuple(map(_name, used)), tuple(used.index(cell) for cell in cells))

    def sums(self, found: Bound) -> Tensor:
        """What each band adds to the bound, (B, bands) bits per dimension; together they are ``found.vb``."""
        band = torch.tensor(self.places)[found.times]
        sums = found.terms.new_zeros(len(band), len(self.names))
        return sums.scatter_add(1, band, found.terms * found.weights)


def _name(cell: int) -> str:
    if cell == 0:
        return f"log-SNR below {EDGES[0]}"
    return (
        f"log-SNR above {EDGES[-1]}" if cell == len(EDGES) else f"log-SNR {EDGES[cell - 1]} to {EDGES[cell]}"
    )
