"""Writing single images and grids."""

import numpy as np
import pytest
from PIL import Image

from perrin.data import load, write_grid, write_image
from perrin.errors import ArgumentError, ShapeError

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_8_bit_images_are_written_as_they_are(tmp_path, channels):
    values = RNG.integers(0, 256, (channels, 5, 7)).astype(np.uint8)
    write_image(tmp_path / "made" / "a.png", values, 256)
    np.testing.assert_array_equal(load(tmp_path / "made").values[0], values)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["a.png"]


def test_few_levels_are_spread_over_8_bits(tmp_path):
    write_image(tmp_path / "a.png", np.array([[[0, 8, 15, 16]]], np.uint8), 17)
    assert np.asarray(Image.open(tmp_path / "a.png")).tolist() == [[0, 128, 239, 255]]


def test_many_levels_of_grey_are_written_with_16_bits(tmp_path):
    write_image(tmp_path / "a.png", np.array([[[0, 1, 65535]]], np.uint16), 65536)
    image = Image.open(tmp_path / "a.png")
    assert image.mode == "I;16"
    assert np.asarray(image).tolist() == [[0, 1, 65535]]
    write_image(tmp_path / "a.png", np.array([[[0, 1000]]], np.uint16), 1001)
    assert np.asarray(Image.open(tmp_path / "a.png")).tolist() == [[0, 65535]]


def test_many_levels_of_colour_are_rounded_to_8_bits(tmp_path):
    write_image(tmp_path / "a.png", np.array([0, 32768, 65535], np.uint16).reshape(3, 1, 1), 65536)
    assert np.asarray(Image.open(tmp_path / "a.png")).tolist() == [[[0, 128, 255]]]


def test_continuous_values_are_written_with_8_bits(tmp_path):
    write_image(tmp_path / "a.png", np.array([[[-1, 0.5, 1]]], np.float32), None)
    assert np.asarray(Image.open(tmp_path / "a.png")).tolist() == [[0, 191, 255]]


@pytest.mark.parametrize(
    ("values", "levels", "message"),
    [
        (np.full((1, 2, 2), 17), 17, r"must lie in 0..16 \(levels=17\), got 17 to 17"),
        (np.full((1, 2, 2), -1), 17, "got -1 to -1"),
        (np.full((1, 2, 2), 1.5), None, r"must lie in -1..1 \(levels=None\), got 1.5 to 1.5"),
        (np.full((1, 2, 2), np.nan), None, "got nan to nan"),
    ],
)
def test_values_outside_the_levels_are_refused(tmp_path, values, levels, message):
    with pytest.raises(ArgumentError, match=message):
        write_image(tmp_path / "a.png", values, levels)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(8, 8), (5, 8, 8), (1, 1, 8, 8), (3, 0, 8)])
def test_write_image_refuses_what_is_not_an_image(tmp_path, shape):
    with pytest.raises(ShapeError, match=r"expected an image \(C, H, W\)"):
        write_image(tmp_path / "a.png", np.zeros(shape, np.uint8), 256)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 8, 8), (0, 1, 8, 8)])
def test_write_grid_refuses_what_are_not_images(tmp_path, shape):
    with pytest.raises(ShapeError, match=r"expected images \(N, C, H, W\)"):
        write_grid(tmp_path / "a.png", np.zeros(shape, np.uint8), 256)


def test_a_grid_needs_a_column(tmp_path):
    with pytest.raises(ArgumentError, match="columns must be at least 1, got 0"):
        write_grid(tmp_path / "a.png", np.zeros((1, 1, 8, 8), np.uint8), 256, 0)


def test_tiny_images_are_magnified_into_a_grid(tmp_path):
    digits = load("digits").values[:5]
    write_grid(tmp_path / "a.png", digits, 17)
    grid = np.asarray(Image.open(tmp_path / "a.png"))
    assert grid.shape == (2 * 50 + 2, 3 * 50 + 2)  # 8 px x 6, gaps of 2, 3 columns
    for index, digit in enumerate(digits):
        y, x = 2 + 50 * (index // 3), 2 + 50 * (index % 3)
        tile = grid[y : y + 48, x : x + 48]
        shown = np.rint(digit[0] * (255 / 16)).astype(np.uint8)
        np.testing.assert_array_equal(tile, np.kron(shown, np.ones((6, 6), np.uint8)))
    gaps = grid.copy()
    for index in range(5):
        y, x = 2 + 50 * (index // 3), 2 + 50 * (index % 3)
        gaps[y : y + 48, x : x + 48] = 128
    np.testing.assert_array_equal(gaps, 128)


@pytest.mark.parametrize(
    ("columns", "size"), [(None, (2 * 50 + 2, 2 * 52 + 2)), (4, (52, 4 * 52 + 2)), (1, (202, 54))]
)
def test_columns_and_tiles_that_are_large_enough(tmp_path, columns, size):
    write_grid(tmp_path / "a.png", np.zeros((4, 3, 48, 50), np.uint8), 256, columns)
    assert np.asarray(Image.open(tmp_path / "a.png")).shape == (*size, 3)


@pytest.mark.parametrize(("channels", "gap"), [(2, [128, 255]), (4, [128, 128, 128, 255])])
def test_gaps_of_transparent_images_are_opaque(tmp_path, channels, gap):
    write_grid(tmp_path / "a.png", np.zeros((1, channels, 48, 48), np.uint8), 256)
    grid = np.asarray(Image.open(tmp_path / "a.png"))
    assert grid[0, 0].tolist() == gap
    np.testing.assert_array_equal(grid[2:34, 2:34], 0)


def test_a_grid_of_16_bit_grey(tmp_path):
    write_grid(tmp_path / "a.png", np.full((1, 1, 48, 48), 65535, np.uint16), 65536)
    grid = np.asarray(Image.open(tmp_path / "a.png"))
    assert (grid[0, 0], grid[2, 2]) == (32768, 65535)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", np.zeros((1, 2, 2), np.uint8), 256)
    old = (tmp_path / "a.png").read_bytes()

    def fail(self, path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_image(tmp_path / "a.png", np.ones((1, 2, 2), np.uint8), 256)
    assert (tmp_path / "a.png").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
