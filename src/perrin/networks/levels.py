"""The levels of a U-Net: what it does at one resolution on the way down and on the way up."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from perrin.networks.attention import SelfAttention
from perrin.networks.layers import ResidualBlock


class Block(nn.Module):
    """A residual block, then self-attention where there are heads."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        *,
        num_heads: int,
        dropout: float,
        checkpoint: bool,
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.residual = ResidualBlock(in_channels, out_channels, embedding, dropout=dropout)
        self.attention = SelfAttention(out_channels, num_heads) if num_heads else nn.Identity()

    def forward(self, h: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, C, H, W), beside it the channels of ``skip``, to (B, C', H, W).

        With ``checkpoint`` the activations within are computed again in the backward pass instead of stored.
        """
        if self.checkpoint and torch.is_grad_enabled():
            again: Tensor = recompute(self._run, h, embedding, skip, use_reentrant=False)
            return again
        return self._run(h, embedding, skip)

    def _run(self, h: Tensor, embedding: Tensor, skip: Tensor | None) -> Tensor:
        if skip is not None:
            h = torch.cat([h, skip], dim=1)
        out: Tensor = self.attention(self.residual(h, embedding))
        return out


MakeBlock = Callable[[int, int], Block]


class DownLevel(nn.Module):
    """An entry to the level, then a block from each of ``widths`` to the next."""

    def __init__(self, entry: nn.Module, widths: Sequence[int], block: MakeBlock) -> None:
        super().__init__()
        self.entry = entry
        self.blocks = nn.ModuleList(block(width, wider) for width, wider in pairwise(widths))

    def forward(self, h: Tensor, embedding: Tensor) -> list[Tensor]:
        """What the entry and each block gave, in that order."""
        outputs = [self.entry(h)]
        for block in self.blocks:
            outputs.append(block(outputs[-1], embedding))
        return outputs


class UpLevel(nn.Module):
    """A block from each of ``widths`` to the next beside an output of the level's way down, then an exit."""

    def __init__(
        self, widths: Sequence[int], skips: Sequence[int], exit: nn.Module, block: MakeBlock
    ) -> None:
        super().__init__()
        pairs = zip(pairwise(widths), skips, strict=True)
        self.blocks = nn.ModuleList(block(width + skip, next_width) for (width, next_width), skip in pairs)
        self.exit = exit

    def forward(self, h: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        """``skips`` are the outputs of `DownLevel`, taken from the last to the first."""
        for block, skip in zip(self.blocks, reversed(skips), strict=True):
            h = block(h, embedding, skip)
        out: Tensor = self.exit(h)
        return out
