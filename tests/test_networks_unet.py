"""The U-Net, whole."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from perrin.config import UNetConfig
from perrin.errors import ArgumentError, ShapeError
from perrin.networks import UNet
from perrin.networks.plan import default_attention_levels, default_channel_mult

TIMES = torch.tensor([3, 500])


def small(
    size: int | tuple[int, int] = 8, in_channels: int = 1, channels: int = 8, **options: object
) -> UNet:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"channel_mult": (1, 2), "num_res_blocks": 1, "num_heads": 2}
    return UNet(size, in_channels, channels, **settings | options)


def awake(network: UNet) -> UNet:
    """The network with noise on every parameter, so that what starts at zero takes part."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("in_channels", [1, 2, 5])
@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (6, 10)])
def test_output_has_the_shape_of_the_input(
    in_channels: int, learn_sigma: bool, size: tuple[int, int]
) -> None:
    network = small(size, in_channels, learn_sigma=learn_sigma)
    out = network(torch.randn(2, in_channels, *size), TIMES)
    assert out.shape == (2, in_channels * (1 + learn_sigma), *size)


@pytest.mark.parametrize(
    ("channels", "channel_mult", "num_heads"),
    [(1, (1,), 1), (5, (3, 1, 2), 5), (6, (1, 1), 3), (4, (2, 3), 4)],
)
def test_every_width_and_number_of_levels_works(
    channels: int, channel_mult: tuple[int, ...], num_heads: int
) -> None:
    network = awake(small(8, 2, channels, channel_mult=channel_mult, num_heads=num_heads, num_res_blocks=2))
    out = network(torch.randn(2, 2, 8, 8), TIMES)
    assert out.shape == (2, 2, 8, 8)
    assert out.std() > 0


def test_one_network_takes_every_size_that_its_levels_divide() -> None:
    network = small(8)
    assert network(torch.randn(2, 1, 10, 4), TIMES).shape == (2, 1, 10, 4)


def test_defaults_suit_the_size() -> None:
    assert default_channel_mult((32, 32)) == (1, 2, 2, 2)
    assert default_channel_mult((64, 96)) == (1, 2, 3, 4)
    assert default_channel_mult((128, 128)) == (1, 1, 2, 3, 4)
    assert default_channel_mult((256, 256)) == (1, 1, 2, 2, 4, 4)
    assert default_channel_mult((28, 28)) == (1, 2, 2)
    assert default_channel_mult((8, 8)) == (1, 2)
    assert default_channel_mult((25, 32)) == (1,)
    assert default_attention_levels((32, 32), 4) == (1, 2, 3)
    assert default_attention_levels((64, 16), 3) == (1, 2)


def test_the_first_network_of_the_readme_works() -> None:
    network = UNet(image_size=32, channels=128)
    with torch.no_grad():
        assert network(torch.randn(1, 3, 32, 32), torch.tensor([7])).shape == (1, 3, 32, 32)


def test_its_options_are_those_of_the_configuration() -> None:
    config = UNetConfig(channels=8, num_res_blocks=1)
    options = {key: value for key, value in vars(config).items() if key in UNetConfig.__dataclass_fields__}
    del options["kind"], options["level_basis"]
    network = UNet(8, 1, **options)
    assert network(torch.randn(2, 1, 8, 8), TIMES).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(("patch", "size"), [(2, (8, 12)), (3, (6, 12)), (4, (8, 16))])
def test_patches_keep_the_shape_of_the_image(patch: int, size: tuple[int, int]) -> None:
    network = awake(small(size, 2, patch=patch, learn_sigma=True, num_classes=3, fourier=(1,)))
    x, y = torch.randn(2, 2, *size), torch.tensor([0, 2])
    assert network(x, TIMES, y).shape == (2, 4, *size)
    assert network(x.double(), TIMES, y).dtype == torch.float64


def test_each_pixel_of_a_patch_counts_and_is_answered_in_its_place() -> None:
    network = awake(small(8, patch=2, channel_mult=(1,), attention_levels=()))
    network.middle[0].attention = torch.nn.Identity()
    x = torch.randn(1, 1, 16, 16, requires_grad=True)
    t = torch.tensor([3])
    for row, column in [(0, 0), (0, 1), (1, 0), (15, 15)]:
        (slope,) = torch.autograd.grad(network(x, t)[0, 0, row, column], x)
        strongest = slope[0, 0].abs()
        assert (strongest[row // 2 * 2 : row // 2 * 2 + 2, column // 2 * 2 : column // 2 * 2 + 2] > 0).all()


def test_the_levels_of_a_network_of_patches_suit_their_number() -> None:
    network = UNet(32, 1, 8, patch=2)
    assert network.levels == 3
    with pytest.raises(ShapeError, match=r"multiples of 8 for 3 levels of patches of 2, got 12 x 8"):
        network(torch.randn(1, 1, 12, 8), torch.tensor([1]))
    with pytest.raises(ShapeError, match=r"multiples of 3 for 1 levels of patches of 3, got 8 x 8"):
        small(8, patch=3)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_the_skip_adds_the_input_to_the_mean_alone(learn_sigma: bool) -> None:
    plain = awake(small(8, 2, learn_sigma=learn_sigma))
    skipping = awake(small(8, 2, learn_sigma=learn_sigma, input_skip=True))
    x = torch.randn(2, 2, 8, 8)
    difference = skipping(x, TIMES) - plain(x, TIMES)
    assert_close(difference[:, :2], x, atol=1e-5, rtol=0)
    assert (difference[:, 2:] == 0).all()


def test_the_output_can_have_other_channels() -> None:
    network = awake(small(8, 3, out_channels=5, patch=2))
    assert network(torch.randn(2, 3, 8, 8), TIMES).shape == (2, 5, 8, 8)


def test_the_same_seed_makes_the_same_network_of_patches() -> None:
    x = torch.randn(2, 1, 8, 8)
    one, other = (awake(small(8, patch=2, input_skip=True))(x, TIMES) for _ in range(2))
    assert torch.equal(one, other)


def test_mean_and_variance_start_at_zero() -> None:
    out = small(learn_sigma=True, num_classes=3)(torch.randn(2, 1, 8, 8), TIMES, torch.tensor([0, 2]))
    assert (out == 0).all()


def test_every_parameter_learns() -> None:
    network = small(num_classes=3, learn_sigma=True, fourier=(1,), attention_levels=(0,))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    x, y, target = torch.randn(2, 1, 8, 8), torch.tensor([0, 2]), torch.randn(2, 2, 8, 8)
    for _ in range(4):  # what starts at zero wakes up layer by layer
        optimizer.zero_grad()
        (network(x, TIMES, y) - target).square().mean().backward()
        optimizer.step()
    asleep = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert asleep == []


def test_attention_stands_on_the_levels_asked_for_and_in_the_middle() -> None:
    network = small(channel_mult=(1, 1, 2), attention_levels=(1,))
    attended = {
        name.rsplit(".", 2)[0] for name, _ in network.named_modules() if name.endswith("attention.norm")
    }
    assert attended == {"down.1.blocks.0", "middle.0", "up.1.blocks.0", "up.1.blocks.1"}


def test_time_class_and_fourier_features_change_the_output() -> None:
    x, y = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    network = awake(small(num_classes=3))
    out = network(x, TIMES, y)
    assert not torch.allclose(out, network(x, TIMES + 0.5, y), atol=1e-4)
    assert not torch.allclose(out, network(x, TIMES, y.flip(0)), atol=1e-4)
    assert small(num_classes=3).num_classes == 3
    fine = awake(small(fourier=(6,)))
    coarse = awake(small())
    step = 1 / 128  # half a turn at n = 6
    assert (fine(x + step, TIMES) - fine(x, TIMES)).norm() > 5 * (
        coarse(x + step, TIMES) - coarse(x, TIMES)
    ).norm()


def gradients(network: UNet, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)  # of the dropout
    out = network(x, TIMES)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *network.parameters()])]


def test_checkpointing_changes_no_gradient_and_stores_less() -> None:
    network = awake(small(dropout=0.3, attention_levels=(0, 1)))
    saving = awake(small(dropout=0.3, attention_levels=(0, 1), checkpoint=True))
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    for one, other in zip(gradients(network, x), gradients(saving, x), strict=True):
        assert_close(one, other, atol=0, rtol=0)
    assert stored(saving, x) < 0.5 * stored(network, x)


def stored(network: UNet, x: Tensor) -> int:
    """Number of values kept for the backward pass."""
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out = network(x, TIMES)
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    assert out.requires_grad
    return sum(size for pointer, size in sizes.items() if pointer not in weights)


def test_dropout_acts_in_training_only() -> None:
    network = awake(small(dropout=0.5))
    x = torch.randn(2, 1, 8, 8)
    assert not torch.equal(network(x, TIMES), network(x, TIMES))
    network.eval()
    assert torch.equal(network(x, TIMES), network(x, TIMES))


def test_half_precision_weights_take_and_return_float32() -> None:
    network = awake(small(fourier=(2,)))
    x = torch.randn(2, 1, 8, 8)
    expected = network(x, TIMES)
    out = copy.deepcopy(network).bfloat16()(x, TIMES)
    assert out.dtype == torch.float32
    assert_close(out, expected, atol=0.1 * expected.std().item(), rtol=0.1)


def test_fourier_features_see_what_half_precision_weights_round_away() -> None:
    network = awake(small(fourier=(6,))).bfloat16()
    x = torch.full((2, 1, 8, 8), 0.75)
    nudged = x + 2**-10
    assert torch.equal(x.bfloat16(), nudged.bfloat16())
    assert not torch.equal(network(x, TIMES), network(nudged, TIMES))


def test_output_has_the_precision_of_the_input() -> None:
    network = awake(small())
    assert network(torch.randn(2, 1, 8, 8, dtype=torch.float64), TIMES).dtype == torch.float64
    assert network(torch.randn(2, 1, 8, 8, dtype=torch.float16), TIMES).dtype == torch.float16


def test_bf16_autocast_trains() -> None:
    network = awake(small(attention_levels=(0,)))
    x = torch.randn(2, 1, 8, 8)
    expected = network(x, TIMES)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x, TIMES)
    assert out.dtype == torch.float32
    assert_close(out, expected, atol=0.1 * expected.std().item(), rtol=0.1)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_each_example_is_treated_alone() -> None:
    network = awake(small(attention_levels=(0, 1)))
    x = torch.randn(2, 1, 8, 8)
    assert_close(network(x, TIMES)[1:], network(x[1:], TIMES[1:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "levels", "nearest"),
    [((30, 28), 3, "28 x 28 or 32 x 28"), ((3, 9), 2, "2 x 8 or 4 x 10"), ((1, 4), 3, "4 x 4")],
)
def test_sizes_that_do_not_divide_are_refused_with_those_that_do(
    size: tuple[int, int], levels: int, nearest: str
) -> None:
    message = f"multiples of {2 ** (levels - 1)} for {levels} levels, got {size[0]} x {size[1]}.*: {nearest}$"
    mult = (1,) * levels
    with pytest.raises(ShapeError, match=message):
        small(size, channel_mult=mult)
    with pytest.raises(ShapeError, match=message):
        small(8, channel_mult=mult)(torch.randn(2, 1, *size), TIMES)


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (torch.zeros(2, 3, 8, 8), ShapeError, r"x must have shape \(B, 1, H, W\), got \(2, 3, 8, 8\)"),
        (torch.zeros(2, 8, 8), ShapeError, r"x must have shape \(B, 1, H, W\), got \(2, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), ArgumentError, "floating-point.*got torch.uint8"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x: Tensor, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        small()(x, TIMES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_levels": (0, 2)}, r"attention_levels must lie in 0 to 1, got \(0, 2\)"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"num_res_blocks": 0}, "num_res_blocks must be at least 1, got 0"),
        ({"channel_mult": ()}, "channel_mult must be at least 1"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"num_heads": 3}, "num_heads must divide the 16 channels"),
        ({"patch": 0}, "patch must be at least 1, got 0"),
        ({"out_channels": 0}, "out_channels must be at least 1, got 0"),
        ({"out_channels": 3, "input_skip": True}, "input_skip needs 1 output channels or twice that, got 3"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        small(8, **options)


def test_a_frozen_entry_trains_on_channels_last_input() -> None:
    network = awake(small())
    network.get_submodule("down.0.entry").requires_grad_(False)
    x = torch.randn(2, 1, 8, 8)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's overloads
    network(x.to(memory_format=torch.channels_last), TIMES).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


def test_compiles_without_graph_breaks() -> None:
    network = awake(small(num_classes=3, fourier=(1,)))
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    x, y = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    assert_close(compiled(x, TIMES, y), network(x, TIMES, y))
