"""Likelihoods: the variational bound with its error."""

from perrin.likelihood.bound import Bound, bound, mean_and_error

__all__ = ["Bound", "bound", "mean_and_error"]
