"""The encoder that classifies noisy images."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from perrin.errors import ArgumentError, ShapeError
from perrin.networks import Encoder

TIMES = torch.tensor([3, 500])


def small(
    size: int | tuple[int, int] = 8, in_channels: int = 1, channels: int = 8, **options: Any
) -> Encoder:
    torch.manual_seed(0)
    settings = {"num_classes": 3, "channel_mult": (1, 2), "num_res_blocks": 1, "num_heads": 2}
    return Encoder(size, in_channels, channels, **settings | options)


def awake(network: Encoder) -> Encoder:
    """The network with noise on every parameter, so that what starts at zero takes part."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (6, 10)])
def test_it_gives_logits_and_features(in_channels: int, size: tuple[int, int]) -> None:
    network = awake(small(size, in_channels, num_classes=5))
    x = torch.randn(2, in_channels, *size)
    assert network(x, TIMES).shape == (2, 5)
    assert network.features(x, TIMES).shape == (2, 16)
    assert_close(network(x, TIMES), network.head(network.features(x, TIMES)))


@pytest.mark.parametrize("size", [(28, 28), (27, 31), (32, 48)])
def test_the_default_levels_suit_the_size(size: tuple[int, int]) -> None:
    network = Encoder(size, 1, 8, num_classes=2)
    assert network(torch.randn(1, 1, *size), TIMES[:1]).shape == (1, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"channel_mult": (3, 1, 2)},
        {"num_res_blocks": 2},
        {"attention_levels": ()},
        {"attention_levels": (0, 1)},
        {"num_heads": 4},
        {"patch": 2},
    ],
)
def test_every_option_changes_the_network(options: dict[str, Any]) -> None:
    x = torch.randn(2, 1, 8, 8)
    one, other = awake(small(attention_levels=(1,))), awake(small(**{"attention_levels": (1,), **options}))
    assert not torch.allclose(one.features(x, TIMES).mean(), other.features(x, TIMES).mean(), atol=1e-5)
    other(x, TIMES).sum().backward()
    assert all(parameter.grad is not None for parameter in other.parameters())


def test_dropout_is_of_training_alone() -> None:
    network, x = awake(small(dropout=0.5)), torch.randn(2, 1, 8, 8)
    assert not torch.equal(network(x, TIMES), network(x, TIMES))
    network.eval()
    assert torch.equal(network(x, TIMES), network(x, TIMES))


def test_one_network_takes_every_size_that_its_levels_divide() -> None:
    network = awake(small(8))
    assert network(torch.randn(2, 1, 12, 6), TIMES).shape == (2, 3)


def test_before_training_all_classes_are_as_likely() -> None:
    network = small()
    assert torch.equal(network(torch.randn(2, 1, 8, 8), TIMES), torch.zeros(2, 3))
    assert bool(network.features(torch.randn(2, 1, 8, 8), TIMES).std() > 0)


def test_it_is_told_the_time_also_a_fractional_one() -> None:
    network, x = awake(small()), torch.randn(1, 1, 8, 8).expand(3, 1, 8, 8)
    one, between, other = network(x, torch.tensor([3.0, 3.5, 4.0]))
    assert not torch.allclose(one, other, atol=1e-6)
    assert not torch.allclose(one, between, atol=1e-6)


def test_rows_are_independent_and_keep_the_precision_of_x() -> None:
    network = awake(small()).eval()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    together = network(x, TIMES)
    assert together.dtype == network.features(x, TIMES).dtype == torch.float64
    assert_close(together[1:], network(x[1:], TIMES[1:]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"num_res_blocks": 0}, "num_res_blocks must be at least 1, got 0"),
        ({"num_heads": 3}, "num_heads must divide the 8 channels"),
        ({"attention_levels": (2,)}, "attention_levels must lie in 0 to 1"),
        ({"size": 7}, "height and width must be multiples of 2"),
        ({"size": 8, "patch": 3}, "height and width must be multiples of 3"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ArgumentError, ShapeError), match=message):
        small(**options)


@pytest.mark.parametrize(
    ("x", "t", "message"),
    [
        (torch.zeros(2, 3, 8, 8), TIMES, r"x must have shape \(B, 1, H, W\)"),
        (torch.zeros(2, 1, 8, 7), TIMES, "height and width must be multiples of 2"),
        (torch.zeros(2, 1, 8, 8), TIMES[:1], r"t must have shape \(2,\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), TIMES, "x must be floating-point values"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x: torch.Tensor, t: torch.Tensor, message: str) -> None:
    with pytest.raises((ArgumentError, ShapeError), match=message):
        small()(x, t)
