"""Arrays from .npy and .npz files, MNIST's idx files, and stated levels."""

import gzip
import struct

import numpy as np
import pytest
import torch

from perrin.data import load
from perrin.errors import ArgumentError, DataError

RNG = np.random.default_rng(0)


def saved(tmp_path, values, name="x.npy"):
    path = tmp_path / name
    np.save(path, values)
    return path


def idx(values):
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 6, 7), (1, 6, 7)),
        ((5, 6, 7, 1), (1, 6, 7)),
        ((5, 6, 7, 4), (4, 6, 7)),
        ((5, 2, 6, 7), (2, 6, 7)),
        ((5, 3), (3,)),
        ((5, 1), (1,)),
    ],
)
def test_the_shape_tells_where_the_channels_are(tmp_path, shape, expected):
    values = RNG.integers(0, 256, shape).astype(np.uint8)
    dataset = load(saved(tmp_path, values))
    assert dataset.facts.shape == expected
    assert dataset.facts.levels == 256
    assert dataset.labels is None
    assert list(dataset.names) == ["0", "1", "2", "3", "4"]
    channels_first = np.moveaxis(values, 3, 1) if len(shape) == 4 and shape[1] > 4 else values
    x, _ = dataset.batch([3, 1], "cpu")
    expected_x = torch.from_numpy(channels_first[[3, 1]].reshape(2, *expected).copy()) / 127.5 - 1
    torch.testing.assert_close(x, expected_x)
    assert x.is_contiguous()


@pytest.mark.parametrize(
    ("values", "dtype", "levels"),
    [
        (np.array([[False, True]]), np.uint8, 2),
        (np.array([[0, 255]], np.uint8), np.uint8, 256),
        (np.array([[0, 255]], np.uint16), np.uint16, 65536),
        (np.array([[0, 65535]], ">u2"), np.uint16, 65536),
        (np.array([[0, 255]], np.int64), np.uint8, 256),
        (np.array([[0, 256]], np.int32), np.uint16, 65536),
        (np.array([[0, 127]], np.int8), np.uint8, 256),
        (np.array([[-1, 0.5]], np.float32), np.float32, None),
        (np.array([[-1, 0.5]], ">f8"), np.float32, None),
    ],
)
def test_the_type_tells_the_levels(tmp_path, values, dtype, levels):
    dataset = load(saved(tmp_path, values))
    assert (dataset.values.dtype, dataset.facts.levels) == (dtype, levels)
    assert dataset.values.dtype.isnative
    np.testing.assert_array_equal(dataset.values, values)
    top = values.max() if levels is None else 2 * int(values.max()) / (levels - 1) - 1
    torch.testing.assert_close(dataset.batch([0], "cpu")[0].max(), torch.tensor(float(top)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_an_npy_file_is_memory_mapped(tmp_path, dtype):
    assert isinstance(load(saved(tmp_path, np.zeros((4, 8, 8, 3), dtype))).values, np.memmap)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(5), r"x.npy: expected vectors .* got \(5,\)"),
        (np.zeros((0, 8, 8), np.uint8), r"x.npy: expected .* got \(0, 8, 8\)"),
        (np.zeros((2, 1, 1, 8, 8)), r"x.npy: expected .* got \(2, 1, 1, 8, 8\)"),
        (np.zeros((2, 3, 8, 4), np.uint8), r"shape \(2, 3, 8, 4\) could be \(N, C, H, W\) or .*; save tiny"),
        (np.zeros((2, 5, 8, 8), np.uint8), r"1 to 4 channels on axis 1 or 3, got shape \(2, 5, 8, 8\)"),
        (np.array([[0.0, 255.0]]), r"floats must lie in \[-1, 1\], got 0 to 255; scale"),
        (np.array([[0, 0.5], [0.1, np.nan]]), r"x.npy: nan at index \(1, 1\)"),
        (np.array([[-np.inf]]), r"x.npy: -inf at index \(0, 0\)"),
        (np.array([[-1, 3]]), r"whole numbers must lie in 0..65535, got -1 to 3"),
        (np.array([[0, 65536]]), r"whole numbers must lie in 0..65535, got 0 to 65536"),
        (np.array([[1j]]), "whole numbers or floats, got complex128"),
        (np.array([["a"]]), "whole numbers or floats, got <U1"),
        (np.array([[{}]]), "holds pickled Python objects"),
    ],
)
def test_an_array_that_cannot_be_used_is_refused(tmp_path, values, message):
    with pytest.raises(DataError, match=message) as caught:
        load(saved(tmp_path, values))
    assert "\n" not in str(caught.value)


def test_a_faulty_float_is_found_in_any_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("perrin.data.arrays._CHUNK_VALUES", 6)
    values = np.zeros((10, 3), np.float32)
    values[7, 2] = np.inf
    with pytest.raises(DataError, match=r"inf at index \(7, 2\)"):
        load(saved(tmp_path, values))
    values[7, 2] = 2
    with pytest.raises(DataError, match="got 0 to 2"):
        load(saved(tmp_path, values))


@pytest.mark.parametrize("keep", [3, 9, 60, 200])
@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_an_array_file_cut_short_is_refused(tmp_path, name, keep):
    path = tmp_path / name
    np.savez(path, x=np.zeros((4, 8, 8))) if name == "x.npz" else np.save(path, np.zeros((4, 8, 8)))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=f"{name}: (damaged array file|not a data set)"):
        load(path)


@pytest.mark.parametrize("key", ["images", "x", "arr_0", "data", "anything"])
@pytest.mark.parametrize("labels", ["labels", "y", None])
def test_npz_keys(tmp_path, key, labels):
    images = RNG.integers(0, 256, (3, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", **{key: images}, **({labels: [2, 0, 1]} if labels else {}))
    dataset = load(tmp_path / "x.npz")
    np.testing.assert_array_equal(dataset.values[:, 0], images)
    if labels is None:
        assert (dataset.labels, dataset.facts.class_names) == (None, None)
    else:
        assert dataset.labels is not None
        assert dataset.labels.dtype == np.int64
        assert dataset.labels.tolist() == [2, 0, 1]
        assert dataset.facts.class_names == ("0", "1", "2")


def test_npz_names_of_examples_and_classes(tmp_path):
    words = {"names": ["a/1.png", "b/2.png", "b/3.png"], "class_names": ["a", "b", "c"]}
    np.savez(tmp_path / "x.npz", pixels=np.zeros((3, 8, 8), np.uint8), labels=[0, 1, 1], **words)
    dataset = load(tmp_path / "x.npz")
    assert list(dataset.names) == words["names"]
    assert dataset.facts.class_names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"names": ["a", "b"]}, r"names must be 3 strings, got <U1 of shape \(2,\)"),
        ({"names": [1, 2, 3]}, r"names must be 3 strings, got int64 of shape \(3,\)"),
        ({"names": "abc"}, r"names must be 3 strings, got <U3 of shape \(\)"),
        ({"class_names": ["a"]}, r"class_names must be at least 2 strings, got <U1 of shape \(1,\)"),
    ],
)
def test_npz_words_that_do_not_fit_are_refused(tmp_path, words, message):
    np.savez(tmp_path / "x.npz", images=np.zeros((3, 8, 8), np.uint8), labels=[0, 1, 1], **words)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"a": np.zeros((2, 2)), "b": np.zeros((2, 2))},
            "expected one array or one named images, .*found a, b",
        ),
        ({"labels": np.zeros(2)}, "found labels"),
        ({}, "found none"),
        (
            {"x": np.zeros((2, 2)), "y": np.arange(3)},
            r"expected 2 whole numbers as labels, got int64 of shape \(3,",
        ),
        ({"x": np.zeros((2, 2)), "y": np.zeros(2)}, "expected 2 whole numbers as labels, got float64"),
        ({"x": np.zeros((2, 2)), "y": np.array([0, -1])}, "labels must lie in 0..65535, got -1 to 0"),
        ({"x": np.zeros((2, 2)), "y": np.array([0, 65536])}, "labels must lie in 0..65535, got 0 to 65536"),
        ({"x": np.array([[{}]])}, "holds pickled Python objects"),
    ],
)
def test_an_npz_file_that_cannot_be_used_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "x.npz")


def test_stated_levels_make_a_value_a_level_index(tmp_path):
    path = saved(tmp_path, np.array([[0, 8, 16]], np.uint8))
    dataset = load(path, levels=17)
    assert dataset.facts.levels == 17
    assert dataset.batch([0], "cpu")[0].tolist() == [[-1, 0, 1]]
    assert load(path, levels=65536).facts.levels == 65536
    with pytest.raises(DataError, match=r"x.npy: values must lie in 0..15 for 16 levels, the largest is 16"):
        load(path, levels=16)


@pytest.mark.parametrize("levels", [1, 0, -3, 65537])
def test_levels_out_of_range_are_refused(levels):
    with pytest.raises(ArgumentError, match=f"levels must be a whole number from 2 to 65536, got {levels}"):
        load("digits", levels=levels)


def test_floats_have_no_levels(tmp_path):
    with pytest.raises(DataError, match="continuous floats, so levels cannot be stated"):
        load(saved(tmp_path, np.zeros((2, 2))), levels=256)


def test_a_path_that_is_not_there_is_named_with_what_is_accepted(tmp_path):
    with pytest.raises(DataError, match=r"nothing/here: no such file or folder; expected `digits`, a folder"):
        load(tmp_path / "nothing" / "here")


@pytest.mark.parametrize("content", [b"", b"hello"])
def test_a_file_that_is_no_data_set_is_refused(tmp_path, content):
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"notes.txt: not a data set .*expected `digits`, a folder"):
        load(tmp_path / "notes.txt")


def test_a_folder_named_digits_is_reached_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert len(load("digits")) == 1797
    with pytest.raises(DataError, match="no images in this folder"):
        load("./digits")


def test_mnist_as_published(real_data):
    dataset = load(real_data / "mnist" / "t10k-images-idx3-ubyte.gz")
    assert dataset.facts.shape == (1, 28, 28)
    assert (len(dataset), dataset.facts.levels) == (10_000, 256)
    assert round(dataset.values.mean() / 255, 4) == 0.1325
    assert dataset.labels is not None
    assert dataset.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert dataset.facts.class_names == tuple("0123456789")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("label_suffix", ["", ".gz", None])
def test_idx_files_plain_or_compressed_with_labels_beside(tmp_path, suffix, label_suffix):
    images = RNG.integers(0, 256, (3, 5, 6)).astype(np.uint8)
    labels = np.array([1, 0, 1], np.uint8)
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(gzip.compress(idx(images)) if suffix else idx(images))
    if label_suffix is not None:
        beside = tmp_path / f"train-labels-idx1-ubyte{label_suffix}"
        beside.write_bytes(gzip.compress(idx(labels)) if label_suffix else idx(labels))
    dataset = load(path)
    np.testing.assert_array_equal(dataset.values[:, 0], images)
    assert (None if dataset.labels is None else dataset.labels.tolist()) == (
        None if label_suffix is None else [1, 0, 1]
    )


IMAGES = idx(np.zeros((3, 5, 6), np.uint8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (IMAGES[:-1], r"the header states shape \(3, 5, 6\), but 89 values follow"),
        (IMAGES + b"\0", r"the header states shape \(3, 5, 6\), but 91 values follow"),
        (IMAGES[:10], "cut short within the header"),
        (b"\0\0\x0d" + IMAGES[3:], "expected an idx file of unsigned bytes, got the header 00 00 0d 03"),
        (b"\0\0", "expected an idx file of unsigned bytes, got the header 00 00"),
        (gzip.compress(IMAGES)[:-9], "damaged gzip file"),
        (gzip.compress(b"hello"), "expected an idx file"),
        (idx(np.zeros(4, np.uint8)), "holds 4 labels, not images; give the images-idx3 file"),
    ],
)
def test_a_damaged_idx_file_is_refused(tmp_path, content, message):
    (tmp_path / "some-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match="some-images-idx3-ubyte: " + message):
        load(tmp_path / "some-images-idx3-ubyte")


def test_labels_that_do_not_fit_their_images_are_refused(tmp_path):
    (tmp_path / "a-images-idx3-ubyte").write_bytes(IMAGES)
    (tmp_path / "a-labels-idx1-ubyte").write_bytes(idx(np.zeros(4, np.uint8)))
    with pytest.raises(
        DataError, match=r"a-labels-idx1-ubyte: shape \(4,\) does not fit .*3 images of a-images"
    ):
        load(tmp_path / "a-images-idx3-ubyte")
