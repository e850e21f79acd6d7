"""Folders of images: what is kept of each kind of file, classes, errors and the cache."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from perrin.data import load, write_image
from perrin.errors import DataError

RNG = np.random.default_rng(0)


def noise(*shape, levels=256, dtype=np.uint8):
    return RNG.integers(0, levels, shape).astype(dtype)


def png16(colour_type, values):
    """A 16-bit PNG of (H, W, C) values, which Pillow reads but does not write; every row is filtered by Up."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width = values.shape[:2]
    rows = values.astype(">u2").reshape(height, -1).view(np.uint8)
    filtered = rows - np.vstack([0 * rows[:1], rows[:-1]])
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    body = b"".join(b"\2" + row.tobytes() for row in filtered)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def png_grey(depth, width, rows):
    """A grey PNG of 2 or 4 bits from the packed bytes of its rows."""
    content = png16(0, np.zeros((1, 1, 1)))[:8]
    header = struct.pack(">IIBBBBB", width, len(rows), depth, 0, 0, 0, 0)
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + b"\0".join(rows))), (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return content


def tiff16(values, order, packed):
    """A 16-bit RGB TIFF of (H, W, 3) values in byte order ``<`` or ``>``, plain or ``packed`` by deflate."""
    body = values.astype(order + "u2").tobytes()
    body = zlib.compress(body) if packed else body
    height, width = values.shape[:2]
    tags = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, None),
        (259, 3, 8 if packed else 1),
        (262, 3, 2),
        (273, 4, None),
    ]
    tags += [(277, 3, 3), (278, 4, height), (279, 4, len(body))]
    start = 8 + 2 + 12 * len(tags) + 4
    content = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(tags))
    for tag, kind, value in tags:
        if value is None:
            count, value, kind = (3, start, 3) if tag == 258 else (1, start + 6, 4)
            content += struct.pack(order + "HHII", tag, kind, count, value)
        else:
            code = "HHIHxx" if kind == 3 else "HHII"
            content += struct.pack(order + code, tag, kind, 1, value)
    return content + struct.pack(order + "I3H", 0, 16, 16, 16) + body


def values_of(folder):
    dataset = load(folder)
    return dataset.values[0], dataset.facts.levels


@pytest.mark.parametrize(
    ("suffix", "channels"),
    [
        ("png", 1),
        ("png", 2),
        ("png", 3),
        ("png", 4),
        ("tif", 1),
        ("tif", 2),
        ("tif", 3),
        ("tif", 4),
        ("webp", 3),
    ],
)
def test_8_bit_modes_are_kept_as_they_are(tmp_path, suffix, channels):
    pixels = noise(5, 7, channels)
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(pixels.squeeze()).save(tmp_path / f"a.{suffix}", **options)
    values, levels = values_of(tmp_path)
    assert (values.dtype, levels) == (np.uint8, 256)
    np.testing.assert_array_equal(values, np.moveaxis(pixels, 2, 0))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_keeps_every_bit(tmp_path, suffix):
    pixels = noise(5, 7, levels=65536, dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    values, levels = values_of(tmp_path)
    assert (values.dtype, levels) == (np.uint16, 65536)
    np.testing.assert_array_equal(values[0], pixels)


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_png_keeps_every_bit(tmp_path, colour_type, channels):
    pixels = noise(5, 7, channels, levels=65536, dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png16(colour_type, pixels))
    values, levels = values_of(tmp_path)
    assert (values.dtype, levels) == (np.uint16, 65536)
    np.testing.assert_array_equal(values, np.moveaxis(pixels, 2, 0))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_colour_tiff_keeps_every_bit(tmp_path, order, packed):
    pixels = noise(5, 7, 3, levels=65536, dtype=np.uint16)
    (tmp_path / "a.tif").write_bytes(tiff16(pixels, order, packed))
    values, levels = values_of(tmp_path)
    assert levels == 65536
    np.testing.assert_array_equal(values, np.moveaxis(pixels, 2, 0))


@pytest.mark.parametrize("suffix", ["png", "pbm", "tif"])
def test_1_bit_images_have_2_levels(tmp_path, suffix):
    pixels = noise(5, 9, levels=2, dtype=bool)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    values, levels = values_of(tmp_path)
    assert (values.dtype, levels) == (np.uint8, 2)
    np.testing.assert_array_equal(values[0], pixels)


@pytest.mark.parametrize(
    ("depth", "row", "expected"), [(2, b"\x1b", [0, 1, 2, 3]), (4, b"\x05\xaf", [0, 5, 10, 15])]
)
def test_2_and_4_bit_grey_pngs_have_4_and_16_levels(tmp_path, depth, row, expected):
    (tmp_path / "a.png").write_bytes(png_grey(depth, 4, [row, row]))
    values, levels = values_of(tmp_path)
    assert levels == 2**depth
    assert values.tolist() == [[expected, expected]]


@pytest.mark.parametrize(
    ("header", "body", "expected", "levels"),
    [
        (b"P5 4 1 16\n", bytes([0, 1, 8, 16]), [0, 1, 8, 16], 17),
        (b"P2 4 1 1000\n", b"0 1 999 1000\n", [0, 1, 999, 1000], 1001),
        (b"P5 2 1 4095\n", bytes([0, 1, 15, 255]), [1, 4095], 4096),
    ],
)
def test_a_pgm_states_its_own_number_of_levels(tmp_path, header, body, expected, levels):
    (tmp_path / "a.pgm").write_bytes(header + body)
    values, found = values_of(tmp_path)
    assert found == levels
    assert values[0, 0].tolist() == expected


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_a_palette_becomes_rgb_and_with_transparency_rgba(tmp_path, suffix):
    image = Image.fromarray(noise(5, 7, levels=3))
    image.putpalette([255, 0, 0, 0, 255, 10, 0, 0, 255])
    image.save(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(values_of(tmp_path)[0], np.moveaxis(np.asarray(image.convert("RGB")), 2, 0))
    image.save(tmp_path / f"a.{suffix}", transparency=1)
    values, _ = values_of(tmp_path)
    assert values.shape == (4, 5, 7)
    np.testing.assert_array_equal(values[3], np.where(np.asarray(image) == 1, 0, 255))


@pytest.mark.parametrize("name", ["a.JPG", "a.Jpeg", "a.bmp", "a.PPM"])
def test_suffixes_in_any_case(tmp_path, name):
    Image.fromarray(np.full((5, 7, 3), 128, np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    dataset = load(tmp_path)
    assert list(dataset.names) == [name]
    np.testing.assert_array_equal(dataset.values, 128)


def test_an_image_is_turned_upright_by_its_exif_orientation(tmp_path):
    pixels = noise(5, 7)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(values_of(tmp_path)[0][0], np.rot90(pixels, -1))


def test_images_are_found_below_in_sorted_order_without_hidden_ones(tmp_path):
    for i, name in enumerate(["b/2.png", "b/10.png", "a.png", "b/c/1.png", ".hidden.png", ".cache/1.png"]):
        write_image(tmp_path / name, np.full((1, 2, 2), i, np.uint8), 256)
    dataset = load(tmp_path)
    assert list(dataset.names) == ["a.png", "b/10.png", "b/2.png", "b/c/1.png"]
    assert dataset.values[:, 0, 0, 0].tolist() == [2, 1, 0, 3]
    assert (dataset.labels, dataset.facts.class_names) == (None, None)


def test_links_are_followed_and_circles_end(tmp_path):
    write_image(tmp_path / "real" / "1.png", np.zeros((1, 2, 2), np.uint8), 256)
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "class").symlink_to(tmp_path / "real")
    (folder / "class" / "circle").symlink_to(folder)
    assert list(load(folder).names) == ["class/1.png"]


def test_sub_folders_are_classes(tmp_path):
    for name in ("dog/1.png", "cat/2.png", "dog/0.png"):
        write_image(tmp_path / name, np.zeros((3, 2, 2), np.uint8), 256)
    dataset = load(tmp_path)
    assert dataset.facts.class_names == ("cat", "dog")
    assert dataset.labels is not None
    assert dataset.labels.dtype == np.int64
    assert dataset.labels.tolist() == [0, 1, 1]


def test_stated_levels_of_a_folder(tmp_path):
    pixels = noise(4, 4, levels=17)
    pixels[0, 0] = 16
    Image.fromarray(pixels).save(tmp_path / "a.png")
    dataset = load(tmp_path, levels=17)
    assert dataset.facts.levels == 17
    np.testing.assert_array_equal(dataset.values[0, 0], pixels)
    with pytest.raises(DataError, match=r"values must lie in 0..9 for 10 levels, the largest is 16"):
        load(tmp_path, levels=10)


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"no images in this folder \(looked for .png, .jpg"):
        load(tmp_path)


def test_mixed_sizes_are_refused_with_both_named(tmp_path):
    write_image(tmp_path / "a.png", np.zeros((1, 5, 7), np.uint8), 256)
    write_image(tmp_path / "b.png", np.zeros((1, 5, 8), np.uint8), 256)
    with pytest.raises(DataError, match=r"share one size, but a.png is 7x5, b.png is 8x5 \(width x height\)"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("channels", "levels", "kind"),
    [(3, 256, "RGB with 256"), (4, 256, "RGBA with 256"), (1, 65536, "grey with 65536")],
)
def test_mixed_modes_and_depths_are_refused_with_both_named(tmp_path, channels, levels, kind):
    write_image(tmp_path / "a.png", np.zeros((1, 5, 7), np.uint8), 256)
    write_image(tmp_path / "b.png", np.zeros((channels, 5, 7), np.uint8), levels)
    with pytest.raises(DataError, match=f"but a.png is grey with 256 levels, b.png is {kind} levels"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp", "gif", "ppm"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.6])
def test_an_image_cut_short_is_refused_by_name(tmp_path, suffix, share):
    Image.fromarray(noise(40, 40, 3)).save(tmp_path / f"a.{suffix}")
    content = (tmp_path / f"a.{suffix}").read_bytes()
    (tmp_path / f"a.{suffix}").write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=rf"a.{suffix}: (damaged image|not an image)") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_flipped_bytes_never_raise_anything_else(tmp_path):
    originals = []
    for suffix in ("png", "jpg", "gif", "tif"):
        Image.fromarray(noise(16, 16)).save(tmp_path / f"x.{suffix}")
        originals.append((tmp_path / f"x.{suffix}").read_bytes())
        (tmp_path / f"x.{suffix}").unlink()
    refused = 0
    for trial in range(200):
        content = bytearray(originals[trial % 4])
        for place in RNG.integers(0, len(content), 4):
            content[place] ^= 0x55
        (tmp_path / "a.png").write_bytes(content)
        try:
            load(tmp_path)
        except DataError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("mode", "name", "message"),
    [
        ("F", "a.tif", "a.tif: 32-bit F is not read without loss; expected grey"),
        ("I", "a.tif", "a.tif: 32-bit I is not read"),
        ("CMYK", "a.jpg", "a.jpg: 8-bit CMYK is not read"),
    ],
)
def test_other_pixel_kinds_are_refused(tmp_path, mode, name, message):
    Image.new(mode, (4, 4)).save(tmp_path / name)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_16_bit_colour_that_would_lose_bits_is_refused(tmp_path):
    (tmp_path / "a.ppm").write_bytes(b"P6 2 1 65535\n" + bytes(12))
    with pytest.raises(DataError, match=r"a.ppm: 16-bit RGB is not read without loss"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.tif", "a.png"])
def test_several_frames_are_refused(tmp_path, name):
    frames = [Image.fromarray(noise(8, 8, 3)) for _ in range(3)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=f"{name}: holds 3 frames, expected a single image"):
        load(tmp_path)


def test_a_cameras_jpeg_with_a_preview_is_its_first_image(tmp_path):
    images = [Image.fromarray(np.full((8, 8), grey, np.uint8)) for grey in (200, 20)]
    images[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=images[1:])
    np.testing.assert_array_equal(values_of(tmp_path)[0], 200)


@pytest.fixture
def always_cached(monkeypatch):
    monkeypatch.setattr("perrin.data.folder.CACHE_ABOVE_BYTES", 0)


def decoded_names(monkeypatch):
    """Names of the files that are decoded from here on."""
    from perrin.data import folder

    names = []
    monkeypatch.setattr(
        folder, "decode", lambda path, decode=folder.decode: names.append(path.name) or decode(path)
    )
    return names


def test_a_small_folder_is_not_cached(tmp_path):
    write_image(tmp_path / "images" / "a.png", noise(3, 5, 7), 256)
    assert not isinstance(load(tmp_path / "images", cache=tmp_path / "cache").values, np.memmap)
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("always_cached")
def test_a_large_folder_is_decoded_once(tmp_path, monkeypatch):
    pixels = noise(4, 3, 5, 7)
    for i, image in enumerate(pixels):
        write_image(tmp_path / "images" / f"{i}.png", image, 256)
    assert not isinstance(load(tmp_path / "images").values, np.memmap)
    names = decoded_names(monkeypatch)
    for _ in range(2):
        dataset = load(tmp_path / "images", cache=tmp_path / "cache")
        assert isinstance(dataset.values, np.memmap)
        np.testing.assert_array_equal(dataset.values, pixels)
        assert dataset.batch([1, 2], "cpu")[0].shape == (2, 3, 5, 7)
    assert names == ["0.png", "0.png", "1.png", "2.png", "3.png", "0.png"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.usefixtures("always_cached")
@pytest.mark.parametrize("change", ["size", "time", "name", "more", "fewer"])
def test_a_changed_folder_is_decoded_again(tmp_path, change):
    images, cache = tmp_path / "images", tmp_path / "cache"
    for name in ("a.png", "b.png"):
        write_image(images / name, np.zeros((1, 5, 7), np.uint8), 256)
    load(images, cache=cache)
    if change == "size":
        write_image(images / "b.png", noise(1, 5, 7), 256)
    elif change == "time":
        os.utime(images / "b.png", ns=(0, 0))
    elif change == "name":
        (images / "a.png").rename(images / "c.png")
    elif change == "more":
        write_image(images / "c.png", noise(1, 5, 7), 256)
    else:
        (images / "a.png").unlink()
    dataset = load(images, cache=cache)
    np.testing.assert_array_equal(dataset.values, load(images).values)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.usefixtures("always_cached")
def test_a_failure_leaves_no_cache_behind(tmp_path):
    images, cache = tmp_path / "images", tmp_path / "cache"
    write_image(images / "a.png", np.zeros((1, 5, 7), np.uint8), 256)
    (images / "b.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"b.png: not an image"):
        load(images, cache=cache)
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("always_cached")
def test_a_full_disk_is_found_out_before(tmp_path, monkeypatch):
    write_image(tmp_path / "images" / "a.png", np.zeros((1, 5, 7), np.uint8), 256)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 34}))
    with pytest.raises(DataError, match=r"decoded images need 0.0 GB, 0.0 GB are free"):
        load(tmp_path / "images", cache=tmp_path / "cache")
