"""Lossless compression with a diffusion model: data sets to ``.perrin`` files and back."""

from perrin.codec.coder import require
from perrin.codec.container import File, Header, read
from perrin.codec.dataset import Compressed, Recipe, compress, dataset_of, decompress, fits, other_model

__all__ = [
    "Compressed",
    "File",
    "Header",
    "Recipe",
    "compress",
    "dataset_of",
    "decompress",
    "fits",
    "other_model",
    "read",
    "require",
]
