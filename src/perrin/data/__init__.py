"""Data sets: reading, level indices, resumable order, and writing images."""

from perrin.data.dataset import Dataset, Facts, batch_indices, split, spread
from perrin.data.images import write_animation, write_grid, write_image
from perrin.data.levels import to_levels, to_unit
from perrin.data.load import load

__all__ = [
    "Dataset",
    "Facts",
    "batch_indices",
    "load",
    "split",
    "spread",
    "to_levels",
    "to_unit",
    "write_animation",
    "write_grid",
    "write_image",
]
