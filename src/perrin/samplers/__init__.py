"""Samplers: one loop, one step rule per file."""

from perrin.samplers.base import Sample, SampleNoise, Sampler
from perrin.samplers.ddim import RoundTrip, SamplerDDIM
from perrin.samplers.ddpm import SamplerDDPM

__all__ = ["RoundTrip", "Sample", "SampleNoise", "Sampler", "SamplerDDIM", "SamplerDDPM"]
