"""The U-Net of Improved DDPM (arXiv:2102.09672) and ADM (arXiv:2105.05233), for any size and channels."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from perrin.errors import ArgumentError
from perrin.networks.checks import require_divisible, require_input, require_positive, require_share
from perrin.networks.embeddings import Conditioning, FourierFeatures
from perrin.networks.layers import Upsample, add_input, conv3x3, output_layers
from perrin.networks.levels import Block, DownLevel, UpLevel
from perrin.networks.plan import LevelPlan, level_plan


class UNet(nn.Module):
    """The network (x, t, y) → (B, C, H, W), or (B, 2C, H, W) with ``learn_sigma``: mean part, then variance.

    Each level after the first halves the image. On the way down it is an entry (a convolution, after the first
    level with stride 2) and ``num_res_blocks`` blocks; on the way up one block more, each beside what the way
    down left in its place, and an exit (upsampling, at full size the output). The output starts at zero.

    image_size: height and width, or one number for both, by which the defaults are chosen; `forward` takes
        every size that the levels divide.
    in_channels: C of the images.
    channels: width of the first level; the embedding of time and class is 4 times as wide.
    channel_mult: width of each level in multiples of ``channels``; by default the family's for the size.
    num_res_blocks: residual blocks per level.
    attention_levels: levels (0 is full size) with self-attention after each block, by default those of at
        most 16 x 16 pixels; the middle always has it.
    num_heads: attention heads; must divide the width of each level with attention and of the last.
    dropout: share of activations dropped in training.
    num_classes: number of classes of a conditional network, whose `forward` then needs ``y``.
    learn_sigma: whether there is a variance part.
    fourier: the n of the input Fourier features, see `FourierFeatures`.
    checkpoint: whether each block's activations are computed again in the backward pass, to save memory.
    patch: the first level has one position per ``patch`` x ``patch`` pixels, whose values are its channels
        (arXiv:1609.05158); 2 takes a quarter of the time.
    out_channels: channels of the output where it is neither C nor 2C.
    input_skip: whether x is added to the mean part, which then starts at x: nearly eps where the noise is
        strong (VDM, arXiv:2107.00630).

    Raises `ArgumentError` for a value outside its range, `ShapeError` for a size the levels do not divide.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        in_channels: int = 3,
        channels: int = 128,
        *,
        channel_mult: Sequence[int] | None = None,
        num_res_blocks: int = 2,
        attention_levels: Sequence[int] | None = None,
        num_heads: int = 4,
        dropout: float = 0.0,
        num_classes: int | None = None,
        learn_sigma: bool = False,
        fourier: Sequence[int] = (),
        checkpoint: bool = False,
        patch: int = 1,
        out_channels: int | None = None,
        input_skip: bool = False,
    ) -> None:
        super().__init__()
        levels = level_plan(image_size, channel_mult, attention_levels, patch)
        require_positive(in_channels=in_channels, channels=channels, num_res_blocks=num_res_blocks)
        require_positive(num_heads=num_heads, num_classes=num_classes, out_channels=out_channels)
        require_share(dropout=dropout)
        if input_skip and out_channels not in (None, in_channels, 2 * in_channels):
            raise ArgumentError(
                f"input_skip needs {in_channels} output channels or twice that, got {out_channels}"
            )
        self.in_channels, self.levels, self.num_classes = in_channels, len(levels), num_classes
        self.patch, self.input_skip = patch, input_skip
        self.features = FourierFeatures(fourier)
        self.conditioning = Conditioning(channels, 4 * channels, num_classes)
        features = self.features.channels(in_channels) * patch**2
        out = (out_channels or in_channels * (2 if learn_sigma else 1)) * patch**2
        block = partial(Block, embedding=4 * channels, dropout=dropout, checkpoint=checkpoint)
        self._add_levels(levels, (channels, features, out), num_res_blocks, num_heads, block=block)

    def _add_levels(
        self,
        levels: Sequence[LevelPlan],
        widths_around: tuple[int, int, int],
        num_res_blocks: int,
        num_heads: int,
        *,
        block: Callable[..., Block],
    ) -> None:
        """The way down, the middle and the way up; around them ``(channels, features, out)``."""
        channels, features, out = widths_around
        widths = [channels * level.mult for level in levels]
        starts = [channels, *widths[:-1]]  # in which each level begins on the way down
        last = widths[-1]
        belows = [*widths[1:], last]  # in which each level begins on the way up
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.middle = nn.ModuleList([block(last, last, num_heads=num_heads), block(last, last, num_heads=0)])
        for i, (level, start, width, below) in enumerate(zip(levels, starts, widths, belows, strict=True)):
            entry = conv3x3(start, start, stride=2) if i else conv3x3(features, start)
            exit = Upsample(width) if i else output_layers(width, out)
            inner = [width] * num_res_blocks
            level_block = partial(block, num_heads=num_heads if level.attention else 0)
            self.down.append(DownLevel(entry, [start, *inner], level_block))
            self.up.insert(0, UpLevel([below, *inner, width], [*inner, start], exit, level_block))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """(B, C or 2C, H, W) for ``x`` (B, C, H, W), times ``t`` (B,) and classes ``y`` (B,) in [0, num_classes).

        In the precision of ``x``, but computed in that of the weights. Raises `ShapeError` for shapes that do not
        fit, `ArgumentError` for integer ``x``, and for ``y`` missing or given to a network without classes.
        """
        require_input(x, self.in_channels, ("H", "W"))
        require_divisible(x.shape[2:], self.levels, self.patch)
        embedding = self.conditioning(t, y, len(x))  # (B, 4 channels)
        h = F.pixel_unshuffle(self.features(x), self.patch).to(embedding.dtype)  # (B, features, H/p, W/p)
        skips = []
        for level in self.down:
            skips.append(level(h, embedding))
            h = skips[-1][-1]
        for block in self.middle:
            h = block(h, embedding)
        for level in self.up:
            h = level(h, embedding, skips.pop())
        out = F.pixel_shuffle(h, self.patch).to(x.dtype)
        return add_input(out, x) if self.input_skip else out
