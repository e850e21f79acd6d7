"""Data whose best denoiser is known in closed form, as networks: what samplers and likelihoods are held against."""

from perrin.oracles.correlated import CorrelatedData
from perrin.oracles.data import Data, GaussianData, MixtureData, normal
from perrin.oracles.networks import OptimalVariance, Oracle, arbitrary

__all__ = [
    "CorrelatedData",
    "Data",
    "GaussianData",
    "MixtureData",
    "OptimalVariance",
    "Oracle",
    "arbitrary",
    "normal",
]
