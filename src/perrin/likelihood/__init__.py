"""Likelihoods: the variational bound with its error and by noise level, and the probability-flow ODE."""

from perrin.likelihood.bands import NoiseBands
from perrin.likelihood.bound import PILOT_IMAGES, Bound, bound, mean_and_error, term_probabilities
from perrin.likelihood.dequantization import Dequantization, TruncatedNormal, Uniform
from perrin.likelihood.flow import Exact, Hutchinson
from perrin.likelihood.ode import OdeLikelihood, ode
from perrin.likelihood.solvers import Adaptive, Heun

__all__ = [
    "PILOT_IMAGES",
    "Adaptive",
    "Bound",
    "Dequantization",
    "Exact",
    "Heun",
    "Hutchinson",
    "NoiseBands",
    "OdeLikelihood",
    "TruncatedNormal",
    "Uniform",
    "bound",
    "mean_and_error",
    "ode",
    "term_probabilities",
]
