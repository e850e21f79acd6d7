"""Normalization, the residual block and attention."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from perrin.errors import ArgumentError
from perrin.networks.attention import SelfAttention
from perrin.networks.layers import GroupNorm, ResidualBlock, Upsample, group_count


def randomize(module: nn.Module) -> None:
    """Fills every parameter, so that what starts at zero takes part."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (2, 1), (5, 1), (12, 3), (32, 8), (37, 1), (96, 24), (128, 32), (192, 32), (250, 25)],
)
def test_groups_divide_any_number_of_channels(channels: int, groups: int) -> None:
    assert group_count(channels) == groups


def test_group_norm_is_computed_in_float32_for_half_precision() -> None:
    norm = GroupNorm(8)
    x = torch.randn(2, 8, 4, 4) + 30
    expected = F.group_norm(x.bfloat16().float(), 2)
    out = norm.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert_close(out, expected.bfloat16(), atol=0, rtol=0)


def test_group_norm_of_channels_last_without_gradient_trains() -> None:
    norm = GroupNorm(8)
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    (norm(x) * x).sum().backward()
    assert norm.weight.grad is not None
    assert_close(norm.weight.grad, (F.group_norm(x, 2) * x).sum((0, 2, 3)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("out_channels", [8, 12])
def test_residual_block_is_the_formula(out_channels: int) -> None:
    block = ResidualBlock(8, out_channels, 6, dropout=0.0)
    randomize(block)
    x, embedding = torch.randn(2, 8, 4, 6), torch.randn(2, 6)
    scale, shift = block.scale_shift(embedding)[:, :, None, None].split(out_channels, dim=1)
    h = F.group_norm(x, 2, block.norm_in.weight, block.norm_in.bias)
    h = block.map_in(F.silu(h))
    h = F.group_norm(h, out_channels // 4, block.norm_out.weight, block.norm_out.bias) * (1 + scale) + shift
    assert_close(block(x, embedding), block.shortcut(x) + block.map_out(F.silu(h)))


def test_residual_block_starts_as_the_identity() -> None:
    x = torch.randn(2, 8, 4, 4)
    assert_close(ResidualBlock(8, 8, 6, dropout=0.0)(x, torch.randn(2, 6)), x, atol=0, rtol=0)


def test_upsample_convolves_nearest_neighbours() -> None:
    upsample = Upsample(2)
    x = torch.randn(1, 2, 3, 5)
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert_close(upsample(x), upsample.conv(repeated))


@pytest.mark.parametrize("num_heads", [1, 2, 8])
def test_attention_is_softmax_attention_over_positions(num_heads: int) -> None:
    attention = SelfAttention(8, num_heads)
    randomize(attention)
    x = torch.randn(3, 8, 2, 5)
    tokens = attention.norm(x).flatten(2).mT
    query, key, value = attention.query_key_value(tokens).split(8, dim=2)
    width = 8 // num_heads
    heads = []
    for head in range(num_heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[..., part] @ key[..., part].mT / width**0.5
        heads.append(scores.softmax(dim=-1) @ value[..., part])
    expected = x + attention.project(torch.cat(heads, dim=2)).mT.unflatten(2, (2, 5))
    assert_close(attention(x), expected)


def test_attention_starts_as_the_identity() -> None:
    x = torch.randn(2, 8, 4, 4)
    assert_close(SelfAttention(8, 2)(x), x, atol=0, rtol=0)


def test_attention_refuses_heads_that_do_not_divide_the_channels() -> None:
    with pytest.raises(
        ArgumentError, match="num_heads must divide the 10 channels of an attention layer, got 4"
    ):
        SelfAttention(10, 4)
