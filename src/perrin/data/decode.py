"""One image file as level indices, with every bit it holds and the number of levels it states."""

from __future__ import annotations

import struct
import sys
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError

from perrin.data.levels import MAX_LEVELS, level_dtype
from perrin.errors import DataError

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".pbm", ".pgm", ".ppm", ".pnm"),
)
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# What Pillow's decoders raise on damaged files.
_UNREADABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)

_CHANNELS = {1: "grey", 2: "grey+alpha", 3: "RGB", 4: "RGBA"}
_BITS_PER_SAMPLE = 258  # TIFF tag

# Pillow keeps one byte of 16-bit colour. The layout on the left picks the high byte of each value, the one
# on the right, meant for the other byte order, the low byte: read twice, nothing is lost.
_NATIVE_OTHER = "16B" if sys.byteorder == "little" else "16L"
_LOW_BYTES = {
    f"{mode};{high}": f"{mode};{low}"
    for mode in ("RGB", "RGBA")
    for high, low in (("16B", "16L"), ("16L", "16B"), ("16N", _NATIVE_OTHER))
}
# 16-bit grey+alpha is opened as RGBA: read as four plain bytes, these are the two values.
_GREY_ALPHA = "LA;16B"


class Picture(NamedTuple):
    """A decoded image."""

    pixels: np.ndarray
    """(C, H, W) level indices, uint8 or uint16."""
    levels: int
    """Number of levels the file states: 2, 4, 16, 256 or 65536, or a PNM file's own maximum + 1."""

    @property
    def kind(self) -> str:
        """The colour mode and depth in words."""
        return f"{_CHANNELS[len(self.pixels)]} with {self.levels} levels"


def decode(path: Path) -> Picture:
    """The image in ``path``, turned upright as its EXIF orientation says.

    Grey, grey+alpha, RGB and RGBA are kept as they are, a palette becomes RGB or RGBA. Raises `DataError` for
    a damaged file, several frames, another colour space, or a depth that Pillow would silently reduce.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=_FORMATS) as image:
            return _picture(path, image)  # Pillow warns of faulty metadata; faulty pixels raise
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{path}: not an image of a known format, or its header is damaged") from None
    except _UNREADABLE as error:
        raise DataError(f"{path}: damaged image ({' '.join(str(error).split())})") from error


def _picture(path: Path, image: Image.Image) -> Picture:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO: a camera's JPEG with previews behind it
        raise DataError(f"{path}: holds {frames} frames, expected a single image")
    raw, maximum = _layout(image)
    mode, levels = image.mode, _levels(image.mode, raw, maximum)
    if raw in _LOW_BYTES or raw == _GREY_ALPHA:
        pixels = _colour16(path, image, raw)
    elif mode in ("P", "PA"):
        pixels = _upright(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    elif _is_whole(image, raw, maximum):
        pixels = _upright(image)
    else:
        raise DataError(
            f"{path}: {_depth(image, raw, maximum)}-bit {mode} is not read without loss; expected grey, "
            "grey+alpha, RGB or RGBA of 8 or 16 bits (or give an .npy file)"
        )
    pixels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)
    return Picture(_indices(pixels, levels, mode), levels)


def _is_whole(image: Image.Image, raw: str, maximum: int) -> bool:
    """Whether Pillow's pixels hold every bit of the file, in a colour mode that is kept."""
    if image.mode in ("1", "L", "LA", "RGB", "RGBA"):
        return _depth(image, raw, maximum) <= 8
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))


def _layout(image: Image.Image) -> tuple[str, int]:
    """Pillow's name for the layout of the bytes in the file, and the largest value of a PNM file (else 0)."""
    tiles = getattr(image, "tile", None)
    args = tiles[0][3] if tiles else image.mode
    if not isinstance(args, tuple):
        return str(args), 0
    maximum = args[1] if image.format == "PPM" and len(args) == 2 else 0
    return str(args[0]), maximum


def _levels(mode: str, raw: str, maximum: int) -> int:
    if maximum:
        return maximum + 1
    if mode == "1":
        return 2
    if mode.startswith("I") or ";16" in raw:
        return MAX_LEVELS
    return {"L;2": 4, "L;4": 16}.get(raw[:3], 256)


def _depth(image: Image.Image, raw: str, maximum: int) -> int:
    """Bits per channel in the file."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return int(max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,))))
    if image.mode in ("I", "F"):
        return 32
    return 16 if ";16" in raw or maximum > 255 else 8


def _indices(pixels: np.ndarray, levels: int, mode: str) -> np.ndarray:
    """Level indices from ``pixels``, which Pillow spreads over 0..255 or 0..65535 for odd depths."""
    full = 65535 if pixels.dtype.itemsize > 1 else 255
    if mode == "1" or levels == full + 1:
        return pixels.astype(level_dtype(levels))
    spread = pixels.astype(np.int64) * (levels - 1)
    indices: np.ndarray = ((spread + full // 2) // full).astype(level_dtype(levels))
    return indices


def _upright(image: Image.Image) -> np.ndarray:
    ImageOps.exif_transpose(image, in_place=True)
    return np.asarray(image)


def _colour16(path: Path, image: Image.Image, raw: str) -> np.ndarray:
    """(H, W, C) uint16 from a 16-bit colour file."""
    if raw == _GREY_ALPHA:
        _relabel(image, "RGBA")
        return _upright(image).view(">u2")
    high = _upright(image)
    with Image.open(path, formats=_FORMATS) as again:
        _relabel(again, _LOW_BYTES[raw])
        pixels: np.ndarray = high.astype(np.uint16) << 8 | _upright(again)
    return pixels


def _relabel(image: Image.Image, raw: str) -> None:
    """Makes Pillow unpack the bytes of the file as the layout ``raw``."""
    assert isinstance(image, ImageFile.ImageFile)
    for index, tile in enumerate(image.tile):
        args = (raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw
        image.tile[index] = tile._replace(args=args)
