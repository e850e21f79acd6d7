"""``perrin interpolate``, ``inpaint`` and ``vary``: what they write."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cli_helpers import BOX, TINY, error_of, figures_of, image_file, train
from perrin.build import load_run
from perrin.cli import interpolate
from perrin.cli.editing import Images, Job
from perrin.cli.main import main
from perrin.cli.recipe import Recipe
from perrin.data import load, to_levels
from perrin.data.decode import decode
from perrin.editing import SamplingOptions, inpaint, vary
from perrin.evaluation.samples import PictureFolder
from perrin.samplers import SamplerDDIM, SamplerDDPM
from tiny_calibration import calibrate


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_file(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp("edit") / "run", *TINY, "--lr", "0.05")


@pytest.fixture(scope="module")
def conditional(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp("edit") / "run", *TINY, "--lr", "0.05", "--conditional")


@pytest.fixture(scope="module")
def cosine(data, tmp_path_factory):
    flags = [*TINY, "--schedule", "cosine", "--num-timesteps", "1000"]
    return train(data, tmp_path_factory.mktemp("edit") / "run", *flags, "--lr", "0.05")


def pixels(folder):
    return np.stack([decode(path).pixels for path in sorted(folder.glob("0*.png"))])


def made(out, *command):
    assert main([*map(str, command), "--out", str(out)]) == 0
    return pixels(out)


def size_of(path):
    with Image.open(path) as image:
        return image.size


def grid_size(rows, columns):
    return (columns * 50 + 2, rows * 50 + 2)  # tiles of 8 pixels, six times as large, and gaps


# What is written


def test_inpainting_keeps_what_is_outside_the_box(run, data, tmp_path):
    found = made(
        tmp_path / "a", "inpaint", run, data, "--box", 1, 2, 4, 3, "-n", 3, "--steps", 4, "--variations", 2
    )
    originals = load(data).values[:3].repeat(2, axis=0)
    fill = np.zeros((8, 8), bool)
    fill[1:5, 2:5] = True
    np.testing.assert_array_equal(found[..., ~fill], originals[..., ~fill])
    assert (found[..., fill] != originals[..., fill]).mean() > 0.5
    assert size_of(tmp_path / "a" / "grid.png") == grid_size(3, 4)


def test_the_grid_shows_the_image_the_gap_and_the_results(run, data, tmp_path):
    found = made(tmp_path / "a", "inpaint", run, data, "--box", 0, 0, 8, 4, "-n", 1, "--steps", 2)
    with Image.open(tmp_path / "a" / "grid.png") as image:
        grid = np.asarray(image)
    tiles = [grid[2:50, 2 + 50 * i : 50 + 50 * i][::6, ::6] for i in range(3)]
    np.testing.assert_array_equal(tiles[0], load(data).values[0, 0])
    np.testing.assert_array_equal(tiles[1][:, 4:], load(data).values[0, 0, :, 4:])
    assert set(tiles[1][:, :4].flatten().tolist()) <= {127, 128}
    np.testing.assert_array_equal(tiles[2], found[0, 0])


def masks(folder, fill):
    colours = np.stack([fill * 255] * 3, 2).astype(np.uint8)
    Image.fromarray(colours).save(folder / "colour.png")
    Image.fromarray(fill).save(folder / "bits.png")
    np.save(folder / "bool.npy", fill)
    np.save(folder / "numbers.npy", fill * 3.0)
    return [folder / name for name in ("colour.png", "bits.png", "bool.npy", "numbers.npy")]


def test_a_mask_is_white_where_a_box_would_be(run, data, tmp_path):
    flags = ["-n", 2, "--steps", 3, "--resamples", 2]
    box = made(tmp_path / "box", "inpaint", run, data, "--box", 2, 3, 5, 4, *flags)
    fill = np.zeros((8, 8), bool)
    fill[2:7, 3:7] = True
    for path in masks(tmp_path, fill):
        masked = made(tmp_path / path.stem, "inpaint", run, data, "--mask", path, *flags)
        np.testing.assert_array_equal(masked, box)


def test_inpainting_is_the_function_s(run, data, tmp_path):
    flags = ["--resamples", 3, "--jump", 2, "--seed", 5, "--steps", 6, "--variations", 2]
    found = made(tmp_path / "a", "inpaint", run, data, "--box", 0, 0, 8, 5, "-n", 2, *flags)
    model, fill = load_run(run), torch.zeros(8, 8, dtype=torch.bool)
    fill[:, :5] = True
    x = load(data).batch([0, 1], "cpu")[0]
    for v in range(2):
        options = SamplingOptions(seed=5 + v)
        sampler = SamplerDDPM(model.diffusion, 6)
        filled = inpaint(sampler, model.network, x, fill=fill, resamples=3, jump=2, options=options)
        np.testing.assert_array_equal(found[v::2], to_levels(filled, 256))


def test_variations_are_the_function_s(run, data, tmp_path):
    found = made(
        tmp_path / "a",
        "vary",
        run,
        data,
        "--strength",
        0.3,
        "-n",
        2,
        "--variations",
        3,
        "--seed",
        4,
        "--steps",
        6,
        "--sampler",
        "ddim",
    )
    model = load_run(run)
    x = load(data).batch([0, 1], "cpu")[0]
    sampler = SamplerDDIM(model.diffusion, 6)
    varied = vary(sampler, model.network, x, strength=0.3, variations=3, options=SamplingOptions(seed=4))
    np.testing.assert_array_equal(found, to_levels(varied.flatten(0, 1), 256))
    assert size_of(tmp_path / "a" / "grid.png") == grid_size(2, 4)


@pytest.mark.parametrize("command", [["inpaint", "--box", "0", "0", "4", "4"], ["vary"]], ids=lambda c: c[0])
def test_pictures_do_not_depend_on_the_batch_and_can_be_gone_on_with(run, data, tmp_path, capsys, command):
    name, *flags = command
    whole = [name, str(run), str(data), *flags, "--steps", "3", "--variations", "2"]
    four = made(tmp_path / "a", *whole, "-n", 4)
    np.testing.assert_array_equal(made(tmp_path / "b", *whole, "-n", 4, "--batch-size", 1), four)
    np.testing.assert_array_equal(made(tmp_path / "c", *whole, "-n", 2), four[:4])
    figures = figures_of([*whole, "-n", "4", "--out", str(tmp_path / "c")], capsys)
    np.testing.assert_array_equal(pixels(tmp_path / "c"), four)
    assert figures["network_calls"] > 0
    assert figures_of([*whole, "-n", "4", "--out", str(tmp_path / "c")], capsys)["network_calls"] is None
    line = error_of([*whole, "-n", "4", "--seed", "9", "--out", str(tmp_path / "c")], capsys)
    assert line.endswith("holds pictures of seed 0, asked for 9: choose another place")


def test_the_held_out_images_and_a_folder_of_the_run_are_the_default(run, capsys):
    figures = figures_of(["vary", str(run), "--strength", "0.2", "--steps", "4", "-n", "1"], capsys)
    assert figures["pictures"].startswith(str(run / "samples" / f"vary-{Recipe().sampler}-4steps-"))
    assert (figures["strength"], figures["count"], figures["variations"]) == (0.2, 1, 4)
    other = figures_of(["vary", str(run), "--strength", "0.4", "--steps", "4", "-n", "1"], capsys)
    assert other["pictures"] != figures["pictures"]


def test_inpainting_takes_fewer_steps_than_ancestral_sampling_unless_asked(
    run, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("perrin.cli.inpaint.MOST_STEPS", 5)
    command = ["inpaint", str(run), str(data), "--box", "0", "0", "2", "2", "-n", "1", "--resamples", "2"]
    assert figures_of([*command, "--out", str(tmp_path / "a")], capsys)["network_calls"] == 2 * 4 + 1
    assert figures_of([*command, "--steps", "7", "--out", str(tmp_path / "b")], capsys)["steps"] == 7


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-2m"])
def test_between_seeds_the_ends_are_the_samples(run, tmp_path, sampler):
    flags = ["--sampler", sampler, "--steps", 4]
    found = made(tmp_path / "a", "interpolate", run, "--seeds", 1, 2, "--count", 3, *flags)
    for seed, end in ((1, found[0]), (2, found[-1])):
        sample = made(tmp_path / f"s{seed}", "sample", run, "-n", 1, "--seed", seed, *flags)
        assert np.abs(end.astype(int) - sample[0]).max() <= 1
    assert size_of(tmp_path / "a" / "grid.png") == grid_size(1, 3)


def test_between_images_the_row_has_the_images_at_its_ends(run, data, tmp_path):
    flags = ["--count", 4, "--steps", 12]
    found = made(tmp_path / "a", "interpolate", run, data, "--between", 3, 7, *flags)
    assert len(found) == 4
    assert size_of(tmp_path / "a" / "grid.png") == grid_size(1, 6)
    back = made(tmp_path / "b", "interpolate", run, "--between", 7, 3, *flags)
    assert np.abs(found.astype(int) - back[::-1]).max() <= 1


def test_between_images_the_steps_leave_out_pure_noise_unless_asked(cosine, data, tmp_path, capsys):
    command = ["interpolate", str(cosine), str(data), "--between", "3", "7", "--count", "3", "--steps", "12"]
    good = figures_of([*command, "--out", str(tmp_path / "a")], capsys)
    poor = figures_of([*command, "--grid", "uniform", "--out", str(tmp_path / "b")], capsys)
    assert (good["timestep_grid"], poor["timestep_grid"]) == ("log-snr", "uniform")
    assert good["ends_rmse"] < 0.75 * poor["ends_rmse"]
    missed = (pixels(tmp_path / "a")[[0, 2]] - load(data).values[[3, 7]].astype(float)) / 127.5
    assert good["ends_rmse"] == pytest.approx(np.sqrt(np.square(missed).mean()), rel=1e-5)
    assert figures_of([*command, "--out", str(tmp_path / "a")], capsys)["ends_rmse"] == good["ends_rmse"]


def test_interpolation_says_what_it_made(run, data, tmp_path, capsys):
    flags = ["--count", 2, "--steps", 4]
    capsys.readouterr()
    made(tmp_path / "a", "interpolate", run, data, "--between", 3, 7, *flags)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == f"2 pictures, --between 3 7: {tmp_path / 'a'}, {tmp_path / 'a' / 'grid.png'}"
    assert second == "ddim, 8 network calls each; weights ema-0.9 of step 4"
    assert third.startswith("round trip of the images at the ends: root mean square error ")
    made(tmp_path / "b", "interpolate", run, "--seeds", 3, 7, "--count", 2, "--steps", 1)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("2 pictures, --seeds 3 7: ")
    assert second.startswith("ddim, 1 network call each; ")
    assert json.loads((tmp_path / "b" / "settings.json").read_text())["timestep_grid"] is None


def test_one_is_told_as_one(run, data, tmp_path, capsys):
    flags = ["-n", 1, "--variations", 1, "--steps", 1]
    capsys.readouterr()
    made(tmp_path / "a", "inpaint", run, data, *BOX, *flags, "--resamples", 1)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("1 picture of 1 image: ")
    assert second.startswith("1 resample, jump 1, 1 network call each, ")
    made(tmp_path / "b", "vary", run, data, *flags, "--strength", 1)
    assert "strength 1, 1 of 1 step, 1 network call each, " in capsys.readouterr().out


def test_interpolation_is_not_done_twice(run, tmp_path, capsys):
    command = ["interpolate", str(run), "--seeds", "1", "2", "--steps", "2", "--out", str(tmp_path / "a")]
    assert figures_of(command, capsys)["network_calls"] == 2
    assert figures_of(command, capsys)["network_calls"] is None


def test_text_says_what_was_made(run, data, tmp_path, capsys):
    capsys.readouterr()
    flags = ["--strength", 0.5, "--weights", "model", "--sampler", "ddim"]
    made(tmp_path / "a", "vary", run, data, "-n", 1, "--steps", 12, *flags)
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"4 pictures of 1 image: {tmp_path / 'a'}, {tmp_path / 'a' / 'grid.png'}"
    assert "strength 0.5, " in second
    assert second.endswith("ddim, seed 0; weights model of step 4")


def test_calibrated_timesteps_and_variances_are_taken(run, data, tmp_path, capsys):
    with calibrate(run):
        command = ["inpaint", str(run), str(data), "--box", "0", "0", "4", "4", "-n", "1", "--resamples", "2"]
        figures = figures_of([*command, "--calibrated", "--out", str(tmp_path / "a")], capsys)
        assert (figures["steps"], len(figures["calibration"])) == (2, 12)
        command = ["vary", str(run), str(data), "-n", "1", "--strength", "1", "--steps", "3", "--calibrated"]
        assert figures_of([*command, "--out", str(tmp_path / "b")], capsys)["network_calls"] == 3


# Classes


def test_a_label_takes_the_place_of_the_image_s_own(conditional, data, tmp_path):
    command = ["vary", conditional, data, "-n", 3, "--steps", 4, "--strength", 0.9, "--variations", 1]
    own = made(tmp_path / "own", *command)
    labelled = made(tmp_path / "label", *command, "--label", 1)
    assert [bool((a != b).any()) for a, b in zip(own, labelled, strict=True)] == [True, False, True]


def test_between_classes_a_label_must_be_named(conditional, data, tmp_path, capsys):
    command = ["interpolate", str(conditional), "--steps", "3", "--count", "2"]
    line = error_of([*command, "--seeds", "1", "2"], capsys)
    assert line == "--label must name the class of the pictures between two seeds"
    line = error_of([*command, str(data), "--between", "0", "1"], capsys)
    assert line.endswith("between images of classes 0 and 1")
    assert len(made(tmp_path / "a", *command, "--between", 0, 3)) == 2
    assert len(made(tmp_path / "b", *command, "--between", 0, 1, "--label", 2)) == 2
    assert json.loads((tmp_path / "b" / "settings.json").read_text())["label"] == "2"


def test_data_without_classes_need_a_label(conditional, data, tmp_path, capsys):
    bare = tmp_path / "bare.npz"
    np.savez(bare, images=load(data).values[:, 0])
    between = ["--between", "0", "1"]
    for command, *flags in (["vary"], ["inpaint", *BOX], ["interpolate", *between]):
        line = error_of([command, str(conditional), str(bare), *flags], capsys)
        assert line == (
            f"{bare} has no classes, which the conditional model needs: give --label, the class of all of them"
        )
    short = ["--steps", 2, "--count", 2]
    assert len(made(tmp_path / "a", "interpolate", conditional, bare, *between, *short, "--label", 1)) == 2


def test_seeds_need_no_data(run, data, capsys):
    line = error_of(["interpolate", str(run), str(data), "--seeds", "1", "2"], capsys)
    assert line == f"--seeds needs no data, got {data}: give --between I J to use them"


def test_a_label_out_of_range_is_refused(conditional, capsys):
    for command in (["vary"], ["inpaint", *BOX], ["interpolate", "--seeds", "1", "2"]):
        line = error_of([command[0], str(conditional), *command[1:], "--label", "3"], capsys)
        assert line == "--label 3: expected 0 to 2 or a class name (0, 1, 2)"


# What fails


def test_an_edit_that_fails_leaves_the_network_as_it_was(run, tmp_path):
    model = load_run(run)
    way = Recipe(sampler="ddim", steps=2).way(model)
    job = Job("vary", model, way, Images.load(model, way, None, None, count=1), variations=1, seed=0)

    def failing(x, how):
        raise MemoryError

    with pytest.raises(MemoryError):
        job.edit(PictureFolder(tmp_path, 256), failing, calls=2, batch_size=1)
    assert not model.network._forward_hooks


def test_an_interpolation_that_fails_leaves_the_network_as_it_was(run, tmp_path, monkeypatch):
    def failing(*args):
        raise MemoryError

    monkeypatch.setattr(interpolate, "pictures", failing)
    model, recipe = load_run(run), Recipe(sampler="ddim", steps=2)
    options = interpolate.Options(run, seeds=(1, 2), recipe=recipe)
    with pytest.raises(MemoryError):
        interpolate.draw(options, model, recipe.way(model), PictureFolder(tmp_path, 256), None, None)
    assert not model.network._forward_hooks
