"""Which levels a U-Net has: its widths and where it attends, chosen by the size of the images."""

from collections.abc import Sequence
from typing import NamedTuple

from perrin.errors import ArgumentError
from perrin.networks.checks import require_divisible, require_positive


class LevelPlan(NamedTuple):
    """One level: its width in multiples of the first, and whether its blocks attend."""

    mult: int
    attention: bool


def level_plan(
    image_size: int | tuple[int, int],
    channel_mult: Sequence[int] | None,
    attention_levels: Sequence[int] | None,
    patch: int = 1,
) -> list[LevelPlan]:
    """The levels from one position per ``patch`` x ``patch`` pixels on, those asked for or, where None, those
    that suit the number of positions.

    Raises `ArgumentError` for values out of range, `ShapeError` for a size that the levels do not divide.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    require_positive(image_size=min(size), patch=patch)
    require_divisible(size, 1, patch)
    positions = (size[0] // patch, size[1] // patch)
    mult = default_channel_mult(positions) if channel_mult is None else tuple(channel_mult)
    require_positive(channel_mult=min(mult, default=0))
    levels = range(len(mult))
    require_divisible(size, len(levels), patch)
    default = default_attention_levels(positions, len(levels))
    attended = default if attention_levels is None else attention_levels
    if not set(attended) <= set(levels):
        raise ArgumentError(f"attention_levels must lie in 0 to {levels[-1]}, got {tuple(attended)}")
    return [LevelPlan(mult[level], level in attended) for level in levels]


def default_channel_mult(size: tuple[int, int]) -> tuple[int, ...]:
    """The multiples of ADM by size (H, W), cut to the levels that divide it and leave sides of 4 pixels."""
    side = min(size)
    family = {32: (1, 2, 2, 2), 64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4)}
    mult = next((family[largest] for largest in family if side <= largest), (1, 1, 2, 2, 4, 4))
    levels = 1
    while levels < len(mult) and side >= 4 * 2**levels and all(length % 2**levels == 0 for length in size):
        levels += 1
    return mult[:levels]


def default_attention_levels(size: tuple[int, int], levels: int) -> tuple[int, ...]:
    """The levels of at most 16 x 16 pixels, where attention is cheap."""
    return tuple(level for level in range(levels) if (size[0] >> level) * (size[1] >> level) <= 256)
