"""The pieces that networks are made of: normalization, the residual block, and changes of resolution."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_GROUPS = 32
MIN_GROUP_CHANNELS = 4

Layer = TypeVar("Layer", bound=nn.Module)
MakeLayer = Callable[[int, int], nn.Module]


def zeroed(layer: Layer) -> Layer:
    """The layer with zero weights, so that the branch it ends adds nothing before training."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the height and width, or divides them by ``stride``."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)


def group_count(channels: int) -> int:
    """The most groups, up to 32, that divide ``channels`` and hold at least 4 each; else 1.

    The 32 groups of Improved DDPM for its own widths, multiples of 128 or more. Groups of a single channel, as
    32 groups would be at width 32, erase the mean of each channel.
    """
    most = max(1, min(MAX_GROUPS, channels // MIN_GROUP_CHANNELS))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


class GroupNorm(nn.GroupNorm):
    """Group normalization of (B, C, ...) for any C, computed in float32 or better."""

    def __init__(self, channels: int) -> None:
        super().__init__(group_count(channels), channels)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        h = x.to(dtype)
        if torch.is_grad_enabled() and not h.requires_grad:
            # On the CPU torch 2.13 crashes in the backward pass of a channels_last input without a gradient.
            h = h.contiguous()
        h = F.group_norm(h, self.num_groups, self.weight.to(dtype), self.bias.to(dtype), self.eps)
        return h.to(x.dtype)


class ResidualBlock(nn.Module):
    """``x + map(silu(norm(map(silu(norm(x)))) (1 + scale) + shift))``; scale, shift linear in the embedding.

    The maps are 3x3 convolutions for images and, with ``layer=nn.Linear``, linear for vectors; the last one
    starts at zero. Where an image's width changes, x passes through a 1x1 convolution.
    Source: Improved DDPM, arXiv:2102.09672 appendix A.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        *,
        dropout: float,
        layer: MakeLayer = conv3x3,
    ) -> None:
        super().__init__()
        self.norm_in = GroupNorm(in_channels)
        self.map_in = layer(in_channels, out_channels)
        self.scale_shift = nn.Linear(embedding, 2 * out_channels)
        self.norm_out = GroupNorm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.map_out = zeroed(layer(out_channels, out_channels))
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, C, ...) to (B, C', ...), given the embedding (B, E)."""
        h = self.map_in(F.silu(self.norm_in(x)))
        scale_shift = self.scale_shift(embedding)  # (B, 2C')
        scale, shift = scale_shift.reshape(*scale_shift.shape, *[1] * (x.ndim - 2)).chunk(2, dim=1)
        h = self.norm_out(h) * (1 + scale) + shift
        h = self.map_out(self.dropout(F.silu(h)))
        out: Tensor = self.shortcut(x) + h
        return out


class Upsample(nn.Module):
    """Twice the height and width: nearest neighbours, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W)."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def add_input(out: Tensor, x: Tensor) -> Tensor:
    """``out`` (B, C or 2C, ...) with ``x`` (B, C, ...) added to its first C channels."""
    channels = x.shape[1]
    return torch.cat([out[:, :channels] + x, out[:, channels:]], dim=1)


def output_layers(channels: int, out_channels: int, *, layer: MakeLayer = conv3x3) -> nn.Sequential:
    """Normalization and the map to the output, which starts at zero."""
    return nn.Sequential(GroupNorm(channels), nn.SiLU(), zeroed(layer(channels, out_channels)))
