"""Likelihoods: the variational bound with its error, and by noise level."""

from perrin.likelihood.bands import NoiseBands
from perrin.likelihood.bound import PILOT_IMAGES, Bound, bound, mean_and_error, term_probabilities

__all__ = ["PILOT_IMAGES", "Bound", "NoiseBands", "bound", "mean_and_error", "term_probabilities"]
