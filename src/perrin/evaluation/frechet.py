"""The Fréchet distance of two sets of features (arXiv:1706.08500), whatever network the features are of.

With features of the Inception network it is called FID; with those of any other it must be named after that.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from perrin.errors import ArgumentError, ShapeError


class Moments(NamedTuple):
    """Mean (F,) and covariance (F, F) of the features of ``n`` examples, float64."""

    mean: np.ndarray
    covariance: np.ndarray
    n: int


def moments(features: np.ndarray) -> Moments:
    """The moments of ``features`` (N, F).

    Raises `ShapeError` unless there are at least two rows, `ArgumentError` for values that are not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ShapeError(f"features must be (N, F) with N at least 2, got {features.shape}")
    if not np.isfinite(features).all():
        raise ArgumentError("features must be finite, got NaN or infinity")
    values = features.astype(np.float64)
    covariance = np.atleast_2d(np.cov(values, rowvar=False))
    return Moments(values.mean(axis=0), covariance, len(values))


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2)), at least 0 (arXiv:1706.08500 eq. 6).

    Both roots are of symmetric matrices, by their eigenvalues, so nothing imaginary has to be dropped. The distance
    is biased upwards for few examples: compare at equal counts, and with the distance of two sets of real data.
    Raises `ShapeError` where the numbers of features differ.
    """
    if first.mean.shape != second.mean.shape:
        raise ShapeError(
            f"both sets need the same number of features, got {len(first.mean)} and {len(second.mean)}"
        )
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ second.covariance @ root)
    overlap = np.sqrt(product.clip(min=0)).sum()
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return max(float(((first.mean - second.mean) ** 2).sum() + traces - 2 * overlap), 0.0)
