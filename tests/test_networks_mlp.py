"""The perceptron for vectors."""

import pytest
import torch
from torch.testing import assert_close

from perrin.errors import ArgumentError, ShapeError
from perrin.networks import MLP

TIMES = torch.tensor([3, 500, 20])


def awake(network: MLP) -> MLP:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("dim", [1, 2, 7])
@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize(("width", "depth"), [(16, 1), (5, 2)])
def test_output_has_the_shape_of_the_input_and_starts_at_zero(
    dim: int, learn_sigma: bool, width: int, depth: int
) -> None:
    network = MLP(dim, width=width, depth=depth, learn_sigma=learn_sigma)
    assert len(network.blocks) == depth
    out = network(torch.randn(3, dim), TIMES)
    assert out.shape == (3, dim * (1 + learn_sigma))
    assert (out == 0).all()
    assert awake(network)(torch.randn(3, dim), TIMES).std() > 0


def test_the_output_can_have_another_length() -> None:
    assert awake(MLP(6, width=8, out_dim=4))(torch.randn(3, 6), TIMES).shape == (3, 4)


def test_time_class_and_fourier_features_change_the_output() -> None:
    x, y = torch.randn(3, 2), torch.tensor([0, 2, 1])
    network = awake(MLP(2, width=32, num_classes=3))
    assert network.num_classes == 3
    out = network(x, TIMES, y)
    assert not torch.allclose(out, network(x, TIMES + 0.5, y), atol=1e-4)
    assert not torch.allclose(out, network(x, TIMES, y.flip(0)), atol=1e-4)
    fine, coarse = awake(MLP(2, width=32, fourier=(6,))), awake(MLP(2, width=32))
    step = 1 / 128  # half a turn at n = 6
    assert (fine(x + step, TIMES) - fine(x, TIMES)).norm() > 5 * (
        coarse(x + step, TIMES) - coarse(x, TIMES)
    ).norm()


def test_every_parameter_learns() -> None:
    network = MLP(2, width=16, depth=2, num_classes=3, fourier=(0,))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    x, y, target = torch.randn(3, 2), torch.tensor([0, 2, 1]), torch.randn(3, 2)
    for _ in range(4):  # what starts at zero wakes up layer by layer
        optimizer.zero_grad()
        (network(x, TIMES, y) - target).square().mean().backward()
        optimizer.step()
    asleep = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert asleep == []


def test_half_precision_weights_take_and_return_float32() -> None:
    network, x = awake(MLP(2, width=32, depth=2)), torch.randn(3, 2)
    expected = network(x, TIMES)
    out = network.bfloat16()(x, TIMES)
    assert out.dtype == torch.float32
    assert_close(out, expected, atol=0.1 * expected.std().item(), rtol=0.1)


def test_dropout_acts_in_training_only() -> None:
    network, x = awake(MLP(2, width=32, dropout=0.5)), torch.randn(3, 2)
    assert not torch.equal(network(x, TIMES), network(x, TIMES))
    network.eval()
    assert torch.equal(network(x, TIMES), network(x, TIMES))


def test_inputs_and_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"x must have shape \(B, 2\), got \(3, 2, 1\)"):
        MLP(2)(torch.zeros(3, 2, 1), TIMES)
    with pytest.raises(ArgumentError, match="y must be None"):
        MLP(2)(torch.zeros(3, 2), TIMES, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ArgumentError, match="depth must be at least 1, got 0"):
        MLP(2, depth=0)
    with pytest.raises(ArgumentError, match=r"dropout must lie in \[0, 1\), got -0.1"):
        MLP(2, dropout=-0.1)
