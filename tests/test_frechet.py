"""The Fréchet distance against its closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from perrin.errors import ArgumentError, ShapeError
from perrin.evaluation.frechet import Moments, frechet_distance, moments


def draw(count: int, features: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, features)) @ rng.normal(size=(features, features)) + rng.normal(
        size=features
    )


def test_moments_are_those_of_the_rows() -> None:
    features = draw(50, 3, 0).astype(np.float32)
    found = moments(features)
    np.testing.assert_allclose(found.mean, features.astype(np.float64).mean(0))
    np.testing.assert_allclose(found.covariance, np.cov(features.astype(np.float64).T))
    assert found.n == 50
    assert found.mean.dtype == np.float64


def test_of_diagonal_gaussians_it_is_the_distance_of_means_and_deviations() -> None:
    first = Moments(np.array([0.0, 1.0]), np.diag([4.0, 1.0]), 9)
    second = Moments(np.array([3.0, 1.0]), np.diag([1.0, 9.0]), 9)
    assert frechet_distance(first, second) == pytest.approx(3**2 + (2 - 1) ** 2 + (1 - 3) ** 2)


@pytest.mark.parametrize("features", [1, 2, 7])
def test_it_is_that_of_the_matrix_square_root(features: int) -> None:
    first, second = (moments(draw(60, features, seed)) for seed in (1, 2))
    root = np.atleast_2d(sqrtm(first.covariance @ second.covariance)).real
    expected = ((first.mean - second.mean) ** 2).sum()
    expected += np.trace(first.covariance + second.covariance - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_it_is_a_symmetric_distance(seed: int, features: int) -> None:
    first, second = (moments(draw(20, features, seed + i)) for i in (0, 1))
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9 * (1 + np.trace(first.covariance)))
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-7)


def test_fewer_rows_than_features_still_have_a_distance() -> None:
    first, second = (moments(draw(5, 12, seed)) for seed in (1, 2))
    assert np.isfinite(frechet_distance(first, second))


def test_wrong_features_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(N, F\) with N at least 2, got \(1, 3\)"):
        moments(np.zeros((1, 3)))
    with pytest.raises(ArgumentError, match="finite"):
        moments(np.array([[0.0], [np.nan]]))
    with pytest.raises(ShapeError, match="same number of features, got 2 and 3"):
        frechet_distance(moments(draw(9, 2, 0)), moments(draw(9, 3, 0)))
