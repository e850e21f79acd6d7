"""Editing: interpolation, inpainting and variation of data, with any sampler and guidance."""

from perrin.editing.inpainting import inpaint, inpainting_moves
from perrin.editing.interpolation import interpolate, interpolate_data, interpolate_seeds, slerp
from perrin.editing.options import SamplingOptions
from perrin.editing.variation import begun_at, time_of_strength, vary

__all__ = [
    "SamplingOptions",
    "begun_at",
    "inpaint",
    "inpainting_moves",
    "interpolate",
    "interpolate_data",
    "interpolate_seeds",
    "slerp",
    "time_of_strength",
    "vary",
]
