"""The classifier of noisy images: the way down of the U-Net (ADM, arXiv:2105.05233 section 4)."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from perrin.networks.checks import require_divisible, require_input, require_positive, require_share
from perrin.networks.embeddings import Conditioning
from perrin.networks.layers import GroupNorm, conv3x3, zeroed
from perrin.networks.levels import Block, DownLevel
from perrin.networks.plan import level_plan


class Encoder(nn.Module):
    """The network (x, t) → logits (B, num_classes), where t is the time that the diffusion's network is told.

    The levels and the middle of a `UNet` with the same arguments; then the mean over the positions and a linear map,
    which starts at zero, where all classes are as likely. ADM pools by attention, whose embedding of the positions
    fits one size only; the mean takes every size that the levels divide.

    image_size: height and width, or one number for both, by which the defaults are chosen.
    in_channels: C of the images.
    channels: width of the first level.
    num_classes: number of logits.
    channel_mult, num_res_blocks, attention_levels, num_heads, dropout, patch: as in `UNet`.

    Raises `ArgumentError` for a value outside its range, `ShapeError` for a size the levels do not divide.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        in_channels: int = 3,
        channels: int = 64,
        *,
        num_classes: int,
        channel_mult: Sequence[int] | None = None,
        num_res_blocks: int = 2,
        attention_levels: Sequence[int] | None = None,
        num_heads: int = 4,
        dropout: float = 0.0,
        patch: int = 1,
    ) -> None:
        super().__init__()
        levels = level_plan(image_size, channel_mult, attention_levels, patch)
        require_positive(in_channels=in_channels, channels=channels, num_res_blocks=num_res_blocks)
        require_positive(num_heads=num_heads, num_classes=num_classes)
        require_share(dropout=dropout)
        self.in_channels, self.levels, self.patch = in_channels, len(levels), patch
        self.num_classes = num_classes
        self.conditioning = Conditioning(channels, 4 * channels, None)
        block = partial(Block, embedding=4 * channels, dropout=dropout, checkpoint=False)
        self.down = nn.ModuleList()
        start, entry = channels, conv3x3(in_channels * patch**2, channels)
        for level in levels:
            width = channels * level.mult
            level_block = partial(block, num_heads=num_heads if level.attention else 0)
            self.down.append(DownLevel(entry, [start, *[width] * num_res_blocks], level_block))
            start, entry = width, conv3x3(width, width, stride=2)
        self.middle = nn.ModuleList(
            [block(start, start, num_heads=num_heads), block(start, start, num_heads=0)]
        )
        self.norm = GroupNorm(start)
        self.head = zeroed(nn.Linear(start, num_classes))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits (B, num_classes) for ``x`` (B, C, H, W) and times ``t`` (B,), in the precision of ``x``.

        Raises `ShapeError` for shapes that do not fit, `ArgumentError` for integer ``x``.
        """
        logits: Tensor = self.head(self._pooled(x, t))
        return logits.to(x.dtype)

    def features(self, x: Tensor, t: Tensor) -> Tensor:
        """The activations (B, F) before the last map, F the width of the last level; arguments as in `forward`."""
        return self._pooled(x, t).to(x.dtype)

    def _pooled(self, x: Tensor, t: Tensor) -> Tensor:
        require_input(x, self.in_channels, ("H", "W"))
        require_divisible(x.shape[2:], self.levels, self.patch)
        embedding = self.conditioning(t, None, len(x))  # (B, 4 channels)
        h = F.pixel_unshuffle(x, self.patch).to(embedding.dtype)  # (B, C p^2, H/p, W/p)
        for level in self.down:
            h = level(h, embedding)[-1]
        for block in self.middle:
            h = block(h, embedding)
        return F.silu(self.norm(h)).mean((2, 3))  # (B, F)
