"""Images out of level indices: single PNG files and grids that a person can look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from perrin.errors import ArgumentError, ShapeError
from perrin.files import written_aside

ANIMATIONS = (".gif", ".webp")
"""The kinds of files that hold an animation."""

_GAP = 2  # pixels around each tile of a grid
_SMALLEST_TILE = 48  # pixels of a tile's shorter side, so that 8x8 digits can be read


def write_image(path: str | Path, values: np.ndarray, levels: int | None) -> None:
    """Writes one image (C, H, W) of level indices as a PNG, whole or not at all.

    C is 1 (grey), 2 (grey+alpha), 3 (RGB) or 4 (RGBA). 8 bits, the levels spread over 0..255; a single
    channel of more than 256 levels is 16-bit grey, several channels are rounded to 8 bits. ``levels`` None:
    floats in [-1, 1]. Raises `ShapeError` or, for values outside the levels, `ArgumentError`.
    """
    if values.ndim != 3 or 0 in values.shape or len(values) > 4:
        raise ShapeError(f"expected an image (C, H, W) with C from 1 to 4, got {values.shape}")
    _save(Path(path), _displayed(values, levels))


def write_grid(
    path: str | Path,
    values: np.ndarray,
    levels: int | None,
    columns: int | None = None,
    *,
    title: str | None = None,
) -> None:
    """Writes images (N, C, H, W) as one PNG, row by row, in a near-square grid unless ``columns`` says else.

    Depth and errors as in `write_image`. Tiles are magnified by a whole number until their shorter side has
    48 pixels; between and around them, and in empty places, are opaque mid-grey gaps of 2 pixels. ``title`` is kept
    in the file, see `title_of`.
    """
    if values.ndim != 4 or 0 in values.shape or values.shape[1] > 4:
        raise ShapeError(f"expected images (N, C, H, W) with C from 1 to 4, got {values.shape}")
    if columns is None:
        columns = math.ceil(math.sqrt(len(values)))
    if columns < 1:
        raise ArgumentError(f"columns must be at least 1, got {columns}")
    _save(Path(path), _tiled(_displayed(values, levels), columns), title)


def write_animation(
    path: str | Path,
    frames: Sequence[np.ndarray],
    levels: int | None,
    columns: int | None = None,
    *,
    title: str = "",
) -> None:
    """Writes ``frames``, each (N, C, H, W) as in `write_grid`, as a GIF or WebP by the suffix of ``path``.

    8 bits; three seconds in all and one more for the last frame, again and again. Raises `ArgumentError` for another
    suffix.
    """
    path = Path(path)
    if path.suffix.lower() not in ANIMATIONS:
        raise ArgumentError(f"an animation's name must end in {' or '.join(ANIMATIONS)}, got {path.name}")
    columns = columns or math.ceil(math.sqrt(len(frames[0])))
    pictures = [_picture(_tiled(_eight_bits(_displayed(frame, levels)), columns)) for frame in frames]
    pause = max(3000 // len(pictures), 20)
    durations = [pause] * (len(pictures) - 1) + [pause + 1000]
    with written_aside(path) as aside:
        pictures[0].save(
            aside,
            format=path.suffix[1:].upper(),
            save_all=True,
            append_images=pictures[1:],
            duration=durations,
            loop=0,
            lossless=True,  # of WebP, which else smooths
            comment=title.encode(),  # of GIF
            xmp=title.encode(),  # of WebP
        )


def title_of(path: Path) -> str | None:
    """The title that `write_grid` or `write_animation` left in the picture at ``path``; None where there is none."""
    try:
        with Image.open(path) as image:
            found = [image.info.get(key) for key in ("Title", "comment", "xmp")]
    except OSError:
        return None
    texts = [
        value.decode(errors="replace") if isinstance(value, bytes) else value for value in found if value
    ]
    return texts[0] if texts else None


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)


def _displayed(values: np.ndarray, levels: int | None) -> np.ndarray:
    """``values`` (..., C, H, W) on the scale of the PNG: uint8, or uint16 for one channel of many levels."""
    low, high = (-1, 1) if levels is None else (0, levels - 1)
    if not (values.min() >= low and values.max() <= high):
        raise ArgumentError(
            f"image values must lie in {low}..{high} (levels={levels}), got {values.min()} to {values.max()}"
        )
    wide = levels is not None and levels > 256 and values.shape[-3] == 1
    full = 65535 if wide else 255
    scaled = (values.astype(np.float64) - low) * (full / (high - low))
    return np.rint(scaled).astype(np.uint16 if wide else np.uint8)


def _tiled(pixels: np.ndarray, columns: int) -> np.ndarray:
    """The grid (C, H, W) of the tiles ``pixels`` (N, C, H, W)."""
    n, channels, height, width = pixels.shape
    scale = math.ceil(_SMALLEST_TILE / min(height, width))
    step_y, step_x = height * scale + _GAP, width * scale + _GAP
    top = np.iinfo(pixels.dtype).max
    shape = (channels, math.ceil(n / columns) * step_y + _GAP, columns * step_x + _GAP)
    grid = np.full(shape, top // 2 + 1, pixels.dtype)
    if channels in (2, 4):
        grid[-1] = top
    for index, tile in enumerate(pixels.repeat(scale, axis=2).repeat(scale, axis=3)):
        y, x = index // columns * step_y + _GAP, index % columns * step_x + _GAP
        grid[:, y : y + height * scale, x : x + width * scale] = tile
    return grid


def _save(path: Path, pixels: np.ndarray, title: str | None = None) -> None:
    """Writes ``pixels`` (C, H, W) as a PNG."""
    kept = PngInfo()
    if title is not None:
        kept.add_text("Title", title)
    with written_aside(path) as aside:
        _picture(pixels).save(aside, format="PNG", pnginfo=kept)


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2)))
