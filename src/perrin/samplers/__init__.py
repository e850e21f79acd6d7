"""Samplers: one loop, one step rule per file."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from perrin.samplers.base import Memory, Sample, SampleNoise, Sampler, Stepped, Visit
from perrin.samplers.bdia import BDIAState, SamplerBDIA
from perrin.samplers.ddim import RoundTrip, SamplerDDIM
from perrin.samplers.ddpm import SamplerDDPM
from perrin.samplers.deis import SamplerDEIS
from perrin.samplers.dpm import SamplerDPM
from perrin.samplers.grids import Grid, GridName, grid_times
from perrin.samplers.heun import SamplerHeun
from perrin.samplers.inversion import FixedPoint, Inversion
from perrin.samplers.unipc import SamplerUniPC

__all__ = [
    "SAMPLERS",
    "BDIAState",
    "FixedPoint",
    "Grid",
    "GridName",
    "Inversion",
    "Memory",
    "RoundTrip",
    "Sample",
    "SampleNoise",
    "Sampler",
    "SamplerBDIA",
    "SamplerDDIM",
    "SamplerDDPM",
    "SamplerDEIS",
    "SamplerDPM",
    "SamplerHeun",
    "SamplerUniPC",
    "Stepped",
    "Visit",
    "grid_times",
]

SAMPLERS: Mapping[str, Callable[..., Sampler]] = MappingProxyType(
    {
        "ddpm": SamplerDDPM,
        "ddim": SamplerDDIM,
        "heun": SamplerHeun,
        "dpm-2m": SamplerDPM,
        "dpm-2s": partial(SamplerDPM, solver="2s"),
        "dpm-3m": partial(SamplerDPM, solver="3m"),
        "dpm-2m-sde": partial(SamplerDPM, solver="2m-sde"),
        "unipc-2": SamplerUniPC,
        "unipc-3": partial(SamplerUniPC, order=3),
        "deis": SamplerDEIS,
        "bdia": SamplerBDIA,
    }
)
"""Every sampler by the name that the command line knows: called with (diffusion, steps), and grid if another."""
