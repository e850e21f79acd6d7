"""The ``.perrin`` file: whatever is changed of it is refused, or what comes back is right."""

import json
import struct
import tracemalloc
import zlib
from dataclasses import replace
from functools import cache
from hashlib import blake2b

import numpy as np
import pytest
import torch
from torch import nn

from perrin import MLP, GaussianDiffusion, ModelVarType
from perrin.codec import File, Recipe, compress, container, decompress, read
from perrin.codec.container import MAGIC, unpack
from perrin.data import Dataset, Facts
from perrin.errors import DataError, PerrinError
from perrin.schedules import log_snr_linear_betas

PREAMBLE = struct.Struct("<8sHIQ")


@cache
def model() -> tuple[GaussianDiffusion, nn.Module]:
    chain = GaussianDiffusion(
        betas=log_snr_linear_betas(3, 6.0, -4.0), model_var_type=ModelVarType.LEARNED_RANGE, levels=17
    )
    torch.manual_seed(0)
    network = MLP(4, width=8, depth=1, learn_sigma=True)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return chain, network


def dataset() -> Dataset:
    values = np.random.default_rng(0).integers(0, 17, (5, 4), np.uint8)
    names = [f"{'ab'[i % 2]}/{i}.png" for i in range(5)]
    return Dataset(values, np.arange(5) % 2, names, Facts((4,), 17, ("a", "b"), 5))


@pytest.fixture(scope="module")
def content() -> bytes:
    return compress(*model(), dataset(), recipe=Recipe("ema-0.9", 7, True)).content


def sealed(header: dict | bytes, payload: bytes) -> bytes:
    """A file with a right hash."""
    packed = zlib.compress(json.dumps(header).encode()) if isinstance(header, dict) else header
    start = PREAMBLE.pack(MAGIC, 1, len(packed), len(payload)) + packed + payload
    return start + blake2b(start, digest_size=16).digest()


def parts(content: bytes) -> tuple[dict, bytes]:
    """The header and the payload."""
    size = PREAMBLE.unpack_from(content)[2]
    middle = PREAMBLE.size + size
    return json.loads(zlib.decompress(content[PREAMBLE.size : middle])), content[middle:-16]


def outcome(content: bytes) -> Dataset | PerrinError:
    try:
        return decompress(*model(), unpack(content, "x.perrin"))
    except PerrinError as error:
        return error


def is_refused(content: bytes) -> bool:
    """Whether ``content`` is refused with one line; otherwise what comes back is asserted to be right."""
    found, expected = outcome(content), dataset()
    if isinstance(found, PerrinError):
        assert len(str(found).splitlines()) == 1
        return True
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert (list(found.names), found.facts) == (list(expected.names), expected.facts)
    return False


def test_a_file_tells_what_the_decoder_needs(content):
    header = unpack(content, "x.perrin").header
    assert (header.weights, header.step, header.steps, header.calibrated) == ("ema-0.9", 7, 3, True)
    assert (header.shape, header.levels, header.dtype) == ((5, 4), 17, "uint8")
    assert (header.labels, header.class_names) == ((0, 1, 0, 1, 0), ("a", "b"))
    assert not is_refused(sealed(*parts(content)))


def test_the_same_data_give_the_same_file(content):
    assert compress(*model(), dataset(), recipe=Recipe("ema-0.9", 7, True)).content == content


def test_flipped_bits_are_refused(content):
    draw = np.random.default_rng(0)
    for place in draw.choice(8 * len(content), 200, replace=False):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        assert is_refused(bytes(flipped))


def test_truncated_files_are_refused(content):
    for size in np.random.default_rng(1).choice(len(content), 100, replace=False):
        assert is_refused(content[:size])


def test_inserted_and_missing_bytes_are_refused(content):
    draw = np.random.default_rng(2)
    for _ in range(50):
        place = int(draw.integers(0, len(content) + 1))
        assert is_refused(content[:place] + draw.bytes(int(draw.integers(1, 9))) + content[place:])
        assert is_refused(content[: place - 1] + content[place + 3 :])


def test_changed_values_under_a_right_hash_are_refused(content):
    header, payload = parts(content)
    draw = np.random.default_rng(3)
    for place in draw.choice(8 * len(payload), 80, replace=False):
        flipped = bytearray(payload)
        flipped[place // 8] ^= 1 << place % 8
        assert is_refused(sealed(header, bytes(flipped)))
    for size in range(3, len(payload), 4):
        assert is_refused(sealed(header, payload[: size - 3]))
        assert is_refused(sealed(header, payload[:size]))
        is_refused(sealed(header, payload[size + 1 :]))  # right where it missed only what no pop had reached
    assert is_refused(sealed(header, payload * 2))


EDITS = [
    *(
        {"shape": shape}
        for shape in ([4, 4], [6, 4], [5, 5], [10**15, 4], [5, 10**15], [5, 1, 2, 2], [5], [0, 4])
    ),
    *({"shape": shape} for shape in ([5, 4, 1], [-5, 4], [5.0, 4], "5,4", [5, 4, 1, 1, 1])),
    *({"levels": levels} for levels in (2, 16, 18, 257, 65536, 65537, 1, 0, "17", None)),
    *({"dtype": dtype} for dtype in ("uint16", "float32", "", 8)),
    *({"model": digest} for digest in ("0" * 32, "", "zz", 7)),
    *({"content": digest} for digest in ("0" * 32, "", None)),
    *({"checks": checks} for checks in ([], ["0" * 16], ["0" * 16] * 2, ["0"] * 10**5, "0" * 16)),
    *({"names": names} for names in (None, [], ["x"] * 5, ["x"] * 4, [1] * 5)),
    *({"labels": labels} for labels in (None, [], [0] * 5, [0] * 4, [9] * 5, [-1] * 5, [10**30] * 5)),
    *({"class_names": names} for names in (None, [], ["a"], ["b", "a"], ["a", "b", "c"])),
    *({"steps": steps} for steps in (0, -1, "3", 1.5)),
    {"calibrated": 1},
    {"step": -1},
    {"weights": None},
    {"unknown": 1},
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: json.dumps(edit)[:40])
def test_a_changed_header_under_a_right_hash_is_refused(content, edit):
    header, payload = parts(content)
    tracemalloc.start()
    try:
        assert is_refused(sealed(header | edit, payload))
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


def test_a_header_that_could_not_be_read_is_not_written(monkeypatch):
    monkeypatch.setattr(container, "MOST_HEADER_BYTES", 100)
    with pytest.raises(DataError, match="of at most 100"):
        compress(*model(), dataset(), recipe=Recipe("ema-0.9", 7))


def test_words_of_other_types_become_plain_ones(content):
    plain = dataset()
    names = [np.str_(name) for name in plain.names]
    other = replace(plain, names=names, facts=replace(plain.facts, class_names=[np.str_("a"), np.str_("b")]))
    assert compress(*model(), other, recipe=Recipe("ema-0.9", 7, True)).content == content


def test_labels_without_class_names_are_refused():
    other = replace(dataset(), facts=replace(dataset().facts, class_names=None))
    with pytest.raises(DataError, match="0 class names do not fit its labels"):
        compress(*model(), other, recipe=Recipe("ema-0.9", 7))


def test_names_that_are_no_utf_8_are_refused():
    bad = b"b\xff.png".decode("utf-8", "surrogateescape")
    names = replace(dataset(), names=[bad, *dataset().names[1:]])
    classes = replace(dataset(), facts=replace(dataset().facts, class_names=("a", bad)))
    for data in (names, classes):
        with pytest.raises(DataError, match=r"the name 'b\\udcff.png' is not UTF-8: rename it"):
            compress(*model(), data, recipe=Recipe("ema-0.9", 7))


@pytest.mark.parametrize("edit", [{"weights": "model"}, {"step": 8}, {"steps": 9}, {"calibrated": False}])
def test_what_only_finds_the_model_does_not_change_what_comes_back(content, edit):
    header, payload = parts(content)
    assert not is_refused(sealed(header | edit, payload))


@pytest.mark.parametrize(
    "name", ["model", "weights", "step", "shape", "levels", "content", "checks", "labels"]
)
def test_a_header_without_a_field_is_refused(content, name):
    header, payload = parts(content)
    del header[name]
    assert is_refused(sealed(header, payload))


def test_a_header_of_something_else_is_refused(content):
    _, payload = parts(content)
    for header in (
        b"",
        b"{}",
        zlib.compress(b"{"),
        zlib.compress(b"[]"),
        zlib.compress(b"{}")[:-1],
        b"\0" * 99,
    ):
        assert is_refused(sealed(header, payload))
    assert is_refused(sealed(zlib.compress(b"{}") + b"more", payload))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda whole: b"", "no .perrin file"),
        (lambda whole: b"\x89PNG\r\n\x1a\n" + whole[8:], "no .perrin file"),
        (lambda whole: whole[:12], "cut short after 12 bytes"),
        (lambda whole: whole[:-1], "cut short, expected"),
        (lambda whole: whole + b"\0", "longer than it says"),
        (
            lambda whole: whole[:8] + b"\2\0" + whole[10:],
            "of version 2 of the format, this perrin reads version 1",
        ),
        (lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]), "damaged, its content does not match its hash"),
    ],
)
def test_the_error_says_what_is_wrong(content, changed, message, tmp_path):
    path = tmp_path / "x.perrin"
    path.write_bytes(changed(content))
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


def test_a_file_is_read_whole(content, tmp_path):
    path = tmp_path / "x.perrin"
    path.write_bytes(content)
    found = read(path)
    assert isinstance(found, File)
    assert found == unpack(content, "x.perrin")
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "y.perrin")
