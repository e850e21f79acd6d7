"""The flags that commands which sample share: samplers, grids, guidance, thresholds, trajectories."""

import json
from dataclasses import fields
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from cli_helpers import BOX, TINY, TINY_MLP, error_of, figures_of, image_file, train, vector_file
from perrin.build import load_run
from perrin.cli.grids import GridFlag
from perrin.cli.main import main
from perrin.cli.recipe import Recipe, SamplerName
from perrin.data import to_levels
from perrin.data.decode import decode
from perrin.samplers import SAMPLERS, GridName, SampleNoise


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    return train(image_file(folder), folder / "run", *TINY, "--lr", "0.05")


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guided")
    flags = ["--conditional", "--label-drop", "0.5", "--checkpoint-every", "2", "--keep", "5", "--lr", "0.05"]
    return train(image_file(folder), folder / "run", *TINY, *flags)


def samples(run, out, *flags):
    assert main(["sample", str(run), "-n", "4", "--out", str(out), *flags]) == 0
    return np.stack([decode(path).pixels for path in sorted(out.glob("0*.png"))])


def test_the_flags_know_every_sampler_and_grid():
    assert get_args(SamplerName) == tuple(SAMPLERS)
    assert get_args(GridFlag) == get_args(GridName)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_the_same_samples_in_batches_of_any_size(run, tmp_path, capsys, sampler):
    whole = samples(run, tmp_path / "a", "--sampler", sampler, "--steps", "3")
    parts = samples(run, tmp_path / "b", "--sampler", sampler, "--steps", "3", "--batch-size", "3")
    np.testing.assert_array_equal(whole, parts)
    capsys.readouterr()


def test_network_calls_are_counted(run, tmp_path, capsys):
    for sampler, calls in [("dpm-2m", 3), ("heun", 5), ("dpm-2s", 5)]:
        command = ["sample", str(run), "-n", "2", "--sampler", sampler, "--steps", "3"]
        assert figures_of([*command, "--out", str(tmp_path / sampler)], capsys)["network_calls"] == calls


def test_guidance_counts_twice_where_it_guides(conditional, tmp_path, capsys):
    command = ["sample", str(conditional), "-n", "2", "--sampler", "ddim", "--steps", "4", "--json"]
    guided = figures_of([*command, "--guidance-scale", "2", "--out", str(tmp_path / "a")], capsys)
    assert guided["network_calls"] == 8
    some = [*command, "--guidance-scale", "2", "--guidance-interval", "0", "0.0001"]
    assert figures_of([*some, "--out", str(tmp_path / "b")], capsys)["network_calls"] == 4


@pytest.mark.parametrize(
    "flags",
    [
        ["--grid", "karras"],
        ["--guidance-scale", "3"],
        ["--guidance-scale", "3", "--guidance-rescale", "0.7"],
        ["--guidance-scale", "3", "--guidance-interval", "0.2", "2"],
        ["--autoguidance", "2"],
        ["--autoguidance", "2", "--autoguidance-scale", "3"],
        ["--threshold", "0.5"],
        ["--sampler", "heun", "--churn", "2"],
    ],
    ids=" ".join,
)
def test_each_flag_changes_the_samples_and_the_name_of_their_folder(conditional, tmp_path, capsys, flags):
    sampler = [] if "--sampler" in flags else ["--sampler", "dpm-2m"]
    base = ["--steps", "4", "--sampler", "heun"] if "--sampler" in flags else ["--steps", "4", *sampler]
    plain = samples(conditional, tmp_path / "plain", *base)
    changed = samples(conditional, tmp_path / "changed", "--steps", "4", *sampler, *flags)
    assert (plain != changed).any()
    capsys.readouterr()
    command = ["sample", str(conditional), "-n", "1", "--steps", "4"]
    names = {figures_of([*command, *more], capsys)["samples"] for more in (base[2:], [*sampler, *flags])}
    assert len(names) == 2


def test_guidance_of_scale_1_changes_no_bit(conditional, tmp_path):
    plain = samples(conditional, tmp_path / "a", "--steps", "4")
    np.testing.assert_array_equal(
        samples(conditional, tmp_path / "b", "--steps", "4", "--guidance-scale", "1"), plain
    )


def test_guided_samples_can_be_added_to_later(conditional, tmp_path, capsys):
    command = [
        "sample",
        str(conditional),
        "--steps",
        "2",
        "--out",
        str(tmp_path / "a"),
        "--guidance-scale",
        "2",
    ]
    command += ["--guidance-interval", "0.1", "3"]
    for count, kept in [("1", 0), ("3", 1)]:
        assert figures_of([*command, "-n", count], capsys)["kept"] == kept


def test_the_settings_name_every_flag(run, tmp_path):
    samples(run, tmp_path / "a", "--steps", "4", "--grid", "karras")
    settings = json.loads((tmp_path / "a" / "settings.json").read_text())
    named = {field.name for field in fields(Recipe)} - {"calibrated", "grid"}
    assert named <= settings.keys()
    assert settings["timestep_grid"] == "karras"
    assert settings["threshold"] is None


@pytest.mark.parametrize("name", ["strip.png", "film.gif", "film.webp"])
def test_a_trajectory_ends_in_the_samples(run, tmp_path, name, capsys):
    path = tmp_path / name
    found = samples(run, tmp_path / "a", "--steps", "5", "--sampler", "dpm-2m", "--trajectory", str(path))
    assert f"{path}" in capsys.readouterr().out
    with Image.open(path) as image:
        if name == "strip.png":
            assert image.size == (6 * 50 + 2, 8 * 50 + 2)  # noise, 5 states; two rows for each of 4 samples
            last = np.asarray(image)[2:50:6, 5 * 50 + 2 : 6 * 50 : 6]
            np.testing.assert_array_equal(last, found[0][0])
        else:
            assert image.n_frames == 6
            image.seek(5)
            last = np.asarray(image.convert("L"))[2:50:6, 2:50:6]
            np.testing.assert_allclose(last, found[0][0], atol=3)


def test_a_trajectory_begins_where_the_samples_do(run, tmp_path, monkeypatch, capsys):
    asked, initial = [], SampleNoise.initial

    def recorded(self, shape, device):
        asked.append(device)
        return initial(self, shape, device)

    model_s = torch.device("cpu", 0)  # "cpu" is another name
    monkeypatch.setattr("perrin.cli.sample.pick_device", lambda name: model_s)
    monkeypatch.setattr(SampleNoise, "initial", recorded)
    samples(run, tmp_path / "a", "--steps", "2", "--trajectory", str(tmp_path / "strip.png"))
    assert asked == [model_s] * 3  # the samples, those that are shown again, and the picture's first column


@pytest.mark.parametrize("name", ["strip.png", "film.gif", "film.webp"])
def test_a_trajectory_takes_the_place_of_one_alone(run, tmp_path, name, capsys):
    path = tmp_path / name
    command = [
        "sample",
        str(run),
        "-n",
        "2",
        "--steps",
        "3",
        "--out",
        str(tmp_path / "a"),
        "--trajectory",
        str(path),
    ]
    assert main(command) == 0
    assert main(command) == 0
    Image.new("L", (3, 3)).save(path)
    line = error_of(command, capsys)
    assert line == f"--trajectory {path} is another picture's place: choose another name"
    with Image.open(path) as image:
        assert image.size == (3, 3)


@pytest.mark.parametrize("name", ["00000.png", "grid.png"])
def test_a_trajectory_is_none_of_the_samples(run, tmp_path, name, capsys):
    out = tmp_path / "a"
    line = error_of(["sample", str(run), "--out", str(out), "--trajectory", str(out / name)], capsys)
    assert "is another picture's place" in line


def test_vectors_have_no_trajectory(tmp_path, capsys):
    vectors = train(vector_file(tmp_path), tmp_path / "run", *TINY_MLP)
    line = error_of(["sample", str(vectors), "--trajectory", str(tmp_path / "a.gif")], capsys)
    assert line == "--trajectory needs a run of images, got data of shape (3,)"


def test_a_model_that_knows_no_class_can_be_asked_for_none(conditional, tmp_path, capsys):
    told = samples(conditional, tmp_path / "a", "--steps", "3", "--label", "1")
    none = samples(conditional, tmp_path / "b", "--steps", "3", "--label", "-1")
    assert (told != none).any()
    line = error_of(["sample", str(conditional), "--label", "3"], capsys)
    assert line == "--label 3: expected 0 to 2 or a class name (0, 1, 2), or -1 for none"


def test_names_of_folders_keep_sampler_and_steps_apart(run, capsys):
    command = ["sample", str(run), "-n", "1", "--sampler", "unipc-2", "--steps", "7"]
    assert "/unipc-2-7steps-" in figures_of(command, capsys)["samples"]


def test_the_grid_of_times_and_the_picture_are_both_told(run, tmp_path, capsys):
    figures = figures_of(["sample", str(run), "-n", "1", "--steps", "3", "--grid", "karras"], capsys)
    assert figures["timestep_grid"] == "karras"
    assert figures["grid"].endswith("grid.png")


def test_times_of_the_user_s_own_are_a_grid(run, tmp_path, capsys):
    command = ["--sampler", "dpm-2m", "--grid", "11,6.5,2,0"]
    load = load_run(run)
    sampler = SAMPLERS["dpm-2m"](load.diffusion, grid=[11, 6.5, 2, 0])
    noise = SampleNoise(0, range(4))
    x = sampler.sample(load.network, (4, 1, 8, 8), noise=noise.initial((4, 1, 8, 8), "cpu"))
    np.testing.assert_array_equal(samples(run, tmp_path / "a", *command), to_levels(x, 256))
    settings = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert (settings["timestep_grid"], settings["steps"]) == ([11, 6.5, 2, 0], 4)
    samples(run, tmp_path / "a", *command[:-1], "11,6.5,2,0,-1", "--steps", "4")
    names = set()
    for times in ("11,6.5,2,0", "11,6.5,1,0"):
        names.add(figures_of(["sample", str(run), "-n", "1", "--grid", times], capsys)["samples"])
    assert len(names) == 2


def test_editing_takes_times_of_the_user_s_own(run, tmp_path, capsys):
    command = ["inpaint", str(run), "-n", "1", *BOX, "--grid", "11,5,0", "--out", str(tmp_path / "a")]
    figures = figures_of(command, capsys)
    assert (figures["timestep_grid"], figures["steps"]) == ([11, 5, 0], 3)


def test_a_compiled_network_is_compiled(run, tmp_path, monkeypatch):
    compiled = []

    def compile(network):
        compiled.append(network)
        return network

    monkeypatch.setattr("torch.compile", compile)
    samples(run, tmp_path / "a", "--steps", "2", "--compile")
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--sampler", "euler"], "invalid choice 'euler'"),
        (["--grid", "log"], "--grid takes uniform|quadratic|trailing|log-snr|karras|T,T,..., got log"),
        (["--grid", "11,a"], "--grid takes uniform|quadratic|trailing|log-snr|karras|T,T,..., got 11,a"),
        (["--grid", "0,11"], "--grid must hold falling times from 0 to 11, got [0, 11]"),
        (["--grid", "12,0"], "--grid must hold falling times from 0 to 11, got [12, 0]"),
        (["--grid", "nan"], "--grid must hold falling times from 0 to 11, got [nan]"),
        (
            ["--grid", "11,4,0", "--steps", "2"],
            "--steps must be 3, the number of times in grid, or None, got 2",
        ),
        (
            ["--grid", "11,4.5,0", "--sampler", "ddpm"],
            "--grid must hold whole times for this sampler and network, got [11, 4.5, 0]",
        ),
        (
            ["--grid", "11,0", "--calibrated"],
            "--calibrated has timesteps of its own: give --grid 11,0 or it, not both",
        ),
        (
            ["--eta", "0.5", "--sampler", "heun"],
            "--eta belongs to --sampler ddim, got --sampler heun --eta 0.5",
        ),
        (["--churn", "1"], "--churn belongs to --sampler heun, got --sampler dpm-2m-sde --churn 1.0"),
        (["--sampler", "heun", "--churn", "-1"], "--churn must be from 0 to 1e+06, got -1"),
        (["--sampler", "heun", "--churn", "inf"], "--churn must be from 0 to 1e+06, got inf"),
        (["--sampler", "ddim", "--eta", "2"], "--eta must be from 0 to 1, got 2"),
        (["--guidance-scale", "nan"], "--guidance-scale must be from -1e+06 to 1e+06, got nan"),
        (
            ["--guidance-scale", "3", "--guidance-rescale", "2"],
            "--guidance-rescale must be from 0 to 1, got 2",
        ),
        (
            ["--guidance-scale", "3", "--guidance-interval", "5", "1"],
            "--guidance-interval must be two rising numbers from 0 on, got 5 1",
        ),
        (["--autoguidance-scale", "3"], "--autoguidance-scale 3 needs --autoguidance, which is not given"),
        (["--classifier-scale", "3"], "--classifier-scale 3 needs --classifier, which is not given"),
        (["--threshold", "0"], "--threshold must be above 0, got 0"),
        (["--calibrated", "--grid", "karras"], "--calibrated has timesteps of its own"),
        (["--guidance-rescale", "0.5"], "need --guidance-scale, got 1"),
        (["--guidance-scale", "2"], "has no classes"),
        (["--label", "3"], "has no classes"),
        (["--threshold", "1.5"], "--threshold must be from 0 to 1, got 1.5"),
        (["--autoguidance", "3"], "has no checkpoint of step 3"),
        (["--classifier", "nowhere"], "nowhere holds no classifier"),
        (["--trajectory", "film.mp4"], "--trajectory must end in .png, .gif, .webp, got film.mp4"),
        (
            ["--label", "-1", "--guidance-scale", "5"],
            "--guidance-scale 5 guides to a class, got --label -1, which is none: leave out one of them",
        ),
        (
            ["--label", "-1", "--classifier", "nowhere"],
            "--classifier nowhere guides to a class, got --label -1, which is none: leave out one of them",
        ),
        (
            ["--autoguidance", "4"],
            "--autoguidance must be the step of an earlier checkpoint than the one that samples, 4, got 4",
        ),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--steps", "13"], "--steps must lie between 1 and 12"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_flag_is_one_clear_line(run, tmp_path, capsys, flags, line):
    assert line in error_of(["sample", str(run), "--out", str(tmp_path / "x"), *flags], capsys)
    assert not (tmp_path / "x").exists()


def test_a_later_checkpoint_is_no_weaker_one(conditional, capsys):
    line = error_of(["sample", str(conditional), "--checkpoint", "2", "--autoguidance", "4"], capsys)
    assert line == (
        "--autoguidance must be the step of an earlier checkpoint than the one that samples, 2, got 4"
    )


@pytest.mark.parametrize("command", [["vary"], ["inpaint", *BOX], ["interpolate", "--seeds", "1", "2"]])
def test_editing_does_not_guide_to_no_class_either(conditional, capsys, command):
    name, *flags = command
    line = error_of([name, str(conditional), *flags, "--label", "-1", "--guidance-scale", "2"], capsys)
    assert line.startswith("--guidance-scale 2 guides to a class, got --label -1")


def test_guidance_needs_a_model_that_did_without_its_classes(tmp_path, capsys):
    told = train(image_file(tmp_path), tmp_path / "run", *TINY, "--conditional")
    line = error_of(["sample", str(told), "--guidance-scale", "2"], capsys)
    assert "was trained with its classes always told, train with --label-drop 0.1" in line
