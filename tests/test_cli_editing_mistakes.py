"""Mistakes of the caller of ``perrin interpolate``, ``inpaint`` and ``vary``, each told on one line."""

import numpy as np
import pytest
from PIL import Image

from cli_helpers import BOX, error_of, image_file


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["inpaint"],
            "what to fill must be said by either --mask FILE or --box TOP LEFT HEIGHT WIDTH, got neither",
        ),
        (["inpaint", *BOX, "--mask", "x.png"], "--box TOP LEFT HEIGHT WIDTH, got both"),
        (
            ["inpaint", "--box", "0", "0", "4"],
            "--box takes 4 whole numbers (TOP LEFT HEIGHT WIDTH), got 0 0 4",
        ),
        (
            ["interpolate", "--seeds", "1", "2", "DATA"],
            "--seeds takes 2 whole numbers (A B), got 1 2 DATA: what belongs to no flag goes before --seeds",
        ),
        (["interpolate", "--between", "1"], "--between takes 2 whole numbers (I J), got 1"),
        (
            ["inpaint", "--box", "0", "5", "8", "4"],
            "--box 0 5 8 4 (TOP LEFT HEIGHT WIDTH) must lie within the images, 8 x 8 pixels (height x width)",
        ),
        (["inpaint", "--box", "-1", "5", "8", "2"], "must lie within the images"),
        (["inpaint", "--box", "0", "5", "0", "2"], "must lie within the images"),
        (
            ["inpaint", "--box", "0", "0", "8", "8"],
            "--box 0 0 8 8 must leave some pixels to keep, got the whole image, 8 x 8 pixels (height x width)",
        ),
        (["inpaint", *BOX, "--resamples", "0"], "--resamples must be at least 1, got 0"),
        (["inpaint", *BOX, "--jump", "0"], "--jump must be at least 1, got 0"),
        (
            ["inpaint", *BOX, "--jump", "7", "--steps", "6"],
            "--jump must be from 1 to 6, the number of steps, got 7",
        ),
        (
            ["inpaint", *BOX, "--steps", "13"],
            "--steps must lie between 1 and 12, the run's number of timesteps",
        ),
        (["inpaint", *BOX, "--label", "1"], "has no classes"),
        (["inpaint", *BOX, "--sampler", "euler"], "invalid choice 'euler' for argument '--sampler'"),
        (["vary", "--strength", "0"], "--strength must be above 0 and at most 1, got 0.0"),
        (["vary", "--strength", "nan"], "--strength must be above 0 and at most 1, got nan"),
        (
            ["vary", "--sampler", "ddpm", "--calibrated"],
            "--calibrated gives ddpm variances for all of its steps",
        ),
        (["vary", "--variations", "0"], "--variations must be at least 1, got 0"),
        (["vary", "-n", "0"], "--count must be at least 1, got 0"),
        (["vary", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["vary", "--out", "x.npz"], "--out must be a folder for pictures, got x.npz"),
        (["vary", "--weights", "ema-0.7"], "weights must be one of ema-0.9, ema-0.5, model, got ema-0.7"),
        (["vary", "--checkpoint", "3"], "has no checkpoint of step 3"),
        (["interpolate"], "the ends must be given by either --seeds A B or --between I J"),
        (["interpolate", "--seeds", "1", "2", "--between", "1", "2"], "the ends must be given by either"),
        (
            ["interpolate", "--seeds", "1", "2", "--count", "1"],
            "--count must be at least 2, both ends, got 1",
        ),
        (["interpolate", "--between", "0", "20"], "--between must name images from 0 to 19, got 0 20"),
        (
            ["interpolate", "--between", "0", "1", "--sampler", "ddpm"],
            "--between inverts images with ddim and eta 0, got --sampler ddpm",
        ),
        (
            ["interpolate", "--between", "0", "1", "--eta", "0.5"],
            "--between inverts images with ddim and eta 0, got --sampler ddim --eta 0.5",
        ),
    ],
)
def test_a_mistake_is_one_line(run, args, message, capsys):
    command, *flags = args
    assert message in error_of([command, str(run), *flags], capsys)


def test_data_of_another_shape_are_refused(run, tmp_path, capsys):
    other = image_file(tmp_path, size=10)
    for command in (["inpaint", *BOX], ["vary"], ["interpolate", "--between", "0", "1"]):
        line = error_of([command[0], str(run), str(other), *command[1:]], capsys)
        assert line.endswith("shape must be (1, 8, 8), got (1, 10, 10)")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones((10, 12), bool), "must be of the images' size, 8 x 8 pixels (height x width), got 10 x 12"),
        (
            np.zeros((8, 8), bool),
            "must leave some pixels to fill and some to keep, got all of them to keep (what is not 0 is filled)",
        ),
        (np.ones((8, 8), bool), "got all of them to fill"),
        (np.ones((8, 8, 3)), "expected numbers (H, W), got float64 of shape (8, 8, 3)"),
        (np.full((8, 8), "a"), "expected numbers (H, W), got <U1 of shape (8, 8)"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(run, tmp_path, capsys, values, message):
    np.save(tmp_path / "mask.npy", values)
    assert message in error_of(["inpaint", str(run), "--mask", str(tmp_path / "mask.npy")], capsys)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mask.png", b"no picture", "not an image of a known format"),
        ("mask.npy", b"no array", "damaged array file"),
        ("none.png", None, ": No such file or directory"),
        ("none.npy", None, ": No such file or directory"),
    ],
)
def test_a_mask_that_cannot_be_read_is_refused(run, tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    line = error_of(["inpaint", str(run), "--mask", str(tmp_path / name)], capsys)
    assert line.startswith(str(tmp_path / name))
    assert message in line
    assert (content is None) == ("damaged" not in line and "format" not in line)


@pytest.mark.parametrize("alpha", [0, 255])
def test_a_mask_of_one_kind_is_refused_whatever_its_alpha(run, tmp_path, capsys, alpha):
    Image.new("LA", (8, 8), (127, alpha)).save(tmp_path / "mask.png")
    line = error_of(["inpaint", str(run), "--mask", str(tmp_path / "mask.png")], capsys)
    assert line == (
        f"--mask {tmp_path / 'mask.png'} must leave some pixels to fill and some to keep, got all of them to keep "
        "(filled is what is white: colours above half of the highest level on average; alpha is ignored)"
    )


def test_runs_of_vectors_are_refused(vectors, capsys):
    line = error_of(["vary", str(vectors)], capsys)
    assert line.endswith(
        "must be a run of images, which are edited as pictures; its data have the shape (3,)"
    )
