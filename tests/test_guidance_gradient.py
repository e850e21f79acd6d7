"""The gradient of a classifier of noisy examples."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from perrin.errors import ArgumentError, ShapeError
from perrin.guidance import classifier, classifier_gradient
from two_classes import Both, Guided, Posterior, T, Y, chain, noisy

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def test_the_gradient_is_that_of_the_log_posterior_and_rows_are_independent() -> None:
    diffusion, x = chain(), noisy(20)
    times = torch.tensor([0, 7, 20, T - 1])
    with torch.no_grad():
        found = classifier_gradient(Posterior(diffusion), 2.0)(x, times, y=Y)
    alpha, sigma = diffusion.level(times, x)
    expected = 2 / sigma * (Both().eps(x, alpha, sigma) - Guided(Y).eps(x, alpha, sigma))
    assert_close(found, expected, **EXACT)
    assert not found.requires_grad
    for i in range(4):
        row = slice(i, i + 1)
        alone = classifier_gradient(Posterior(diffusion), 2.0)(x[row], times[row], y=Y[row])
        assert_close(found[row], alone, **EXACT)


def test_rows_without_a_class_are_not_guided() -> None:
    diffusion, x, t = chain(), noisy(20), torch.full((4,), 20)
    gradient = classifier_gradient(Posterior(diffusion))
    some, all_told = gradient(x, t, y=torch.tensor([0, -1, 1, -1])), gradient(x, t, y=Y)
    assert bool((some[[1, 3]] == 0).all())
    assert torch.equal(some[[0, 2]], all_told[[0, 2]])


def test_the_classes_of_the_gradient_come_before_those_of_the_network() -> None:
    diffusion, x, t = chain(), noisy(20), torch.full((4,), 20)
    own = classifier_gradient(Posterior(diffusion), y=Y)
    told = classifier_gradient(Posterior(diffusion))
    assert torch.equal(own(x, t, y=1 - Y, text="x"), told(x, t, y=Y))


def test_a_gradient_leaves_the_networks_parameters_alone() -> None:
    network = nn.Linear(3, 2).double()
    classifier_gradient(lambda x, t: network(x), y=Y)(noisy(20), torch.full((4,), 20))
    assert network.weight.grad is None


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (None, "needs the classes y"),
        (Y[:2], r"y must be 4 integers, one class per example, got torch.int64 \(2,\)"),
        (Y.double(), "y must be 4 integers, one class per example, got torch.float64"),
        (Y + 1, "y must hold classes from 0 to 1, or -1, got 1 to 2"),
        (Y - 2, "y must hold classes from 0 to 1, or -1, got -2 to -1"),
    ],
)
def test_classes_that_do_not_fit_are_refused(y: Tensor | None, message: str) -> None:
    diffusion = chain()
    with pytest.raises((ArgumentError, ShapeError), match=message):
        classifier_gradient(Posterior(diffusion))(noisy(20), torch.full((4,), 20), y=y)


def test_classes_beside_a_gradient_of_ones_own_are_refused() -> None:
    with pytest.raises(ArgumentError, match="y must be None"):
        classifier(lambda x, t: x, y=Y)
