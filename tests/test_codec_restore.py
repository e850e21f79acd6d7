"""Where decompressed data go."""

from pathlib import Path

import numpy as np
import pytest

from perrin.codec import Header, dataset_of
from perrin.codec.restore import check_target, write
from perrin.data import load
from perrin.errors import ArgumentError, DataError


def header_of(*names: str, shape=(2, 1, 5, 5), levels=256, dtype="uint8") -> Header:
    return Header(
        model="0" * 32,
        weights="model",
        step=1,
        steps=1,
        calibrated=False,
        shape=shape,
        levels=levels,
        dtype=dtype,
        content="0" * 32,
        checks=("0" * 16,),
        names=names,
    )


@pytest.mark.parametrize(
    "name", ["../a.png", "/a.png", "x/../../a.png", "", "x//a.png", "..\\a.png", "C:a.png"]
)
def test_names_that_lead_out_of_the_folder_are_refused(name, tmp_path):
    with pytest.raises(DataError, match="no path within a folder"):
        check_target(tmp_path / "out", header_of(name, "b.png"))


def test_two_examples_of_one_name_are_refused(tmp_path):
    with pytest.raises(DataError, match="two examples one name"):
        check_target(tmp_path / "out", header_of("a.png", "a.png"))


def test_names_that_differ_in_their_ending_keep_it(tmp_path):
    header = header_of("a.jpg", "a.png")
    values = np.arange(50, dtype=np.uint8).reshape(header.shape)
    write(tmp_path / "out", dataset_of(header, values), header)
    found = load(tmp_path / "out")
    assert found.names == ["a.jpg.png", "a.png.png"]
    np.testing.assert_array_equal(found.values, values)


def test_16_bit_pictures_come_back(tmp_path):
    header = header_of(levels=65536, dtype="uint16")
    values = np.random.default_rng(0).integers(0, 65536, header.shape, np.uint16)
    check_target(tmp_path / "out", header)
    write(tmp_path / "out", dataset_of(header, values), header)
    np.testing.assert_array_equal(load(tmp_path / "out").values, values)


@pytest.mark.parametrize(
    ("shape", "levels"),
    [((2, 1, 5, 5), 17), ((2, 3, 5, 5), 65536), ((2, 5, 5, 5), 256), ((2, 5), 256)],
)
def test_what_png_cannot_keep_is_refused(shape, levels, tmp_path):
    with pytest.raises(ArgumentError, match="PNG files keep"):
        check_target(tmp_path / "out", header_of(shape=shape, levels=levels, dtype="uint16"))


def test_a_failed_write_leaves_nothing(tmp_path):
    header = header_of(shape=(2, 1, 5, 5))
    values = np.full((2, 1, 5, 5), 300, np.uint16)  # beyond the levels, which the second check finds
    with pytest.raises(ArgumentError, match="must lie in"):
        write(Path(tmp_path / "out"), dataset_of(header, values), header)
    assert list(tmp_path.iterdir()) == []
