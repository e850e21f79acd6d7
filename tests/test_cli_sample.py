"""``perrin sample``: the same samples however they are drawn, kept as soon as they are there."""

import json

import numpy as np
import pytest
from PIL import Image

from cli_helpers import TINY, TINY_MLP, error_of, figures_of, image_file, train, vector_file
from perrin.cli.main import main
from perrin.data import load
from perrin.data.decode import decode
from perrin.evaluation.samples import PictureFolder
from tiny_calibration import calibrate


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    return train(image_file(folder), folder / "run", *TINY, "--lr", "0.05")


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional")
    return train(image_file(folder), folder / "run", *TINY, "--conditional")


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    return train(vector_file(folder), folder / "run", *TINY_MLP)


def pictures(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("0*.png"))}


def size_of(path):
    with Image.open(path) as image:
        return image.size


def sample(run, out, *flags):
    assert main(["sample", str(run), "--steps", "4", "--out", str(out), *flags]) == 0
    return pictures(out) if out.is_dir() else dict(np.load(out))


@pytest.mark.parametrize("sampler", [["ddim"], ["ddim", "--eta", "1"], ["ddpm"]], ids=" ".join)
def test_samples_do_not_depend_on_the_batch_size(run, tmp_path, sampler):
    whole = sample(run, tmp_path / "a", "-n", "5", "--sampler", *sampler)
    assert len(whole) == 5
    assert sample(run, tmp_path / "b", "-n", "5", "--batch-size", "2", "--sampler", *sampler) == whole
    assert sample(run, tmp_path / "c", "-n", "5", "--seed", "1", "--sampler", *sampler) != whole


def test_a_folder_below_the_run_is_the_default(run, capsys):
    figures = figures_of(["sample", str(run), "-n", "3", "--steps", "4", "--weights", "ema-0.5"], capsys)
    folder = run / "samples" / "dpm-2m-sde-4steps-ema-0.5-step4-seed0"
    assert figures["samples"] == str(folder)
    assert figures["grid"] == str(folder / "grid.png")
    assert (figures["weights"], figures["step"], figures["count"], figures["kept"]) == ("ema-0.5", 4, 3, 0)
    assert [size_of(folder / name) for name in ("grid.png", "00002.png")] == [
        (2 * 50 + 2, 2 * 50 + 2),
        (8, 8),
    ]


def test_it_says_which_weights_it_uses(run, tmp_path, capsys):
    capsys.readouterr()
    sample(run, tmp_path / "a", "-n", "1")
    assert "weights ema-0.9 of step 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("steps", "text"), [("1", "1 step, 1 network call"), ("3", "3 steps, 3 network calls")]
)
def test_it_says_what_a_sample_costs(run, tmp_path, steps, text, capsys):
    drawn(run, tmp_path / "a", "--sampler", "ddim", "--steps", steps)
    assert f"ddim, {text} each, seed 0" in capsys.readouterr().out


def test_the_weights_and_the_checkpoint_matter(run, tmp_path):
    average = sample(run, tmp_path / "a", "-n", "1")
    assert sample(run, tmp_path / "b", "-n", "1", "--checkpoint", "4", "--weights", "model") != average


@pytest.mark.parametrize("name", ["folder", "file.npz"])
def test_an_interrupted_command_goes_on_where_it_stopped(run, tmp_path, capsys, monkeypatch, name):
    whole = sample(run, tmp_path / f"whole-{name}", "-n", "4")
    command = [
        "sample",
        str(run),
        "--steps",
        "4",
        "--out",
        str(tmp_path / name),
        "-n",
        "4",
        "--batch-size",
        "1",
    ]
    _interrupt_after(3, monkeypatch)
    assert main(command) == 130
    monkeypatch.undo()
    assert figures_of(command, capsys)["kept"] == 3
    assert figures_of(command, capsys)["kept"] == 4
    continued = sample(run, tmp_path / name, "-n", "4")
    np.testing.assert_equal(continued, whole)


def _interrupt_after(count, monkeypatch):
    from perrin.samplers import SamplerDPM

    original, calls = SamplerDPM.sample_progressive, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > count:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SamplerDPM, "sample_progressive", interrupted)


def test_more_samples_can_be_asked_for_later(run, tmp_path, capsys):
    for out in (tmp_path / "folder", tmp_path / "file.npz"):
        sample(run, out, "-n", "2")
        command = ["sample", str(run), "--steps", "4", "--out", str(out), "-n", "3"]
        assert figures_of(command, capsys)["kept"] == 2


def test_a_half_written_file_does_not_count(tmp_path):
    (tmp_path / ".00000.png.7.tmp").write_bytes(b"half")
    (tmp_path / "grid.png").write_bytes(b"")
    assert PictureFolder(tmp_path, 256).done() == set()


@pytest.mark.parametrize("name", ["folder", "file.npz"])
def test_other_settings_are_refused_in_the_same_place(run, tmp_path, capsys, name):
    out = tmp_path / name
    sample(run, out, "-n", "1")
    line = error_of(["sample", str(run), "--steps", "5", "--out", str(out)], capsys)
    assert line == f"{out} holds pictures of steps 4, asked for 5: choose another place"


@pytest.mark.parametrize("name", ["folder", "file.npz"])
def test_a_place_with_something_else_is_left_alone(run, tmp_path, capsys, name):
    precious = tmp_path / "folder" / "thesis.tex" if name == "folder" else tmp_path / name
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("precious")
    line = error_of(["sample", str(run), "--out", str(tmp_path / name)], capsys)
    assert "holds something else, which this command did not make" in line
    assert precious.read_text() == "precious"


def test_an_npz_file_holds_the_same_samples_as_the_pictures(run, tmp_path):
    sample(run, tmp_path / "folder", "-n", "3")
    arrays = sample(run, tmp_path / "file.npz", "-n", "3")
    np.testing.assert_array_equal(arrays["images"][..., 0], load(tmp_path / "file.npz").values[:, 0])
    shown = [decode(path).pixels[0] for path in sorted((tmp_path / "folder").glob("0*.png"))]
    np.testing.assert_array_equal(arrays["images"][..., 0], shown)
    assert json.loads(str(arrays["settings"]))["sampler"] == "dpm-2m-sde"


def test_classes_come_in_turn_unless_one_is_named(conditional, tmp_path):
    turns = sample(conditional, tmp_path / "a.npz", "-n", "4")
    assert turns["labels"].tolist() == [0, 1, 2, 0]
    assert sample(conditional, tmp_path / "b.npz", "-n", "2", "--label", "2")["labels"].tolist() == [2, 2]


def test_the_grid_has_a_column_for_each_class(conditional, tmp_path):
    sample(conditional, tmp_path / "a", "-n", "5")
    assert size_of(tmp_path / "a" / "grid.png") == (3 * 50 + 2, 2 * 50 + 2)
    sample(conditional, tmp_path / "b", "-n", "5", "--label", "1")
    assert size_of(tmp_path / "b" / "grid.png") == (3 * 50 + 2, 2 * 50 + 2)


def test_vectors_go_into_a_file(vectors, tmp_path, capsys):
    figures = figures_of(["sample", str(vectors), "-n", "2", "--steps", "4"], capsys)
    assert figures["samples"] == str(vectors / "samples" / "dpm-2m-sde-4steps-ema-0.9999-step2-seed0.npz")
    values = np.load(figures["samples"])["data"]
    assert values.shape == (2, 3)
    assert np.abs(values).max() <= 1
    line = error_of(["sample", str(vectors), "--out", str(tmp_path / "folder")], capsys)
    assert line.endswith("samples of shape (3,) are no images: name a file ending in .npz")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--steps", "5000"], "--steps must lie between 1 and 12, the run's number of timesteps, got 5000"),
        (["-n", "0"], "--count must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--sampler", "ddim", "--eta", "1.5"], "--eta must be from 0 to 1, got 1.5"),
        (["--sampler", "ddim", "--eta", "nan"], "--eta must be from 0 to 1, got nan"),
        (
            ["--sampler", "ddpm", "--eta", "0"],
            "--eta belongs to --sampler ddim, got --sampler ddpm --eta 0.0",
        ),
        (["--sampler", "euler"], "invalid choice 'euler' for argument '--sampler'"),
        (["--weights", "ema-0.7"], "weights must be one of ema-0.9, ema-0.5, model, got ema-0.7"),
        (["--checkpoint", "3"], "has no checkpoint of step 3, only of 4"),
        (["--label", "0"], "has no classes"),
        (["--calibrated"], "is not calibrated: `perrin calibrate"),
    ],
)
def test_a_mistake_is_one_line(run, flags, message, capsys):
    assert message in error_of(["sample", str(run), *flags], capsys)


@pytest.mark.parametrize("label", ["3", "-1", "cat"])
def test_a_label_out_of_range_is_refused(conditional, label, capsys):
    line = error_of(["sample", str(conditional), f"--label={label}"], capsys)
    assert line == f"--label {label}: expected 0 to 2 or a class name (0, 1, 2)"


def test_a_run_without_checkpoints_is_refused(run, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    assert "has no checkpoint yet" in error_of(["sample", str(tmp_path)], capsys)


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert "is no run" in error_of(["sample", str(tmp_path)], capsys)


def test_a_checkpoint_cut_in_half_is_named(tmp_path, capsys):
    run = train(image_file(tmp_path), tmp_path / "run", *TINY)
    (file,) = run.glob("checkpoints/*/ema-0.9.safetensors")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert f"{file} is damaged" in error_of(["sample", str(run)], capsys)


def test_fewer_samples_than_a_file_holds_are_refused(run, tmp_path, capsys):
    command = ["sample", str(run), "--steps", "2", "--out", str(tmp_path / "x.npz"), "-n"]
    assert main([*command, "3"]) == 0
    capsys.readouterr()
    assert "holds 3 samples, asked for 2" in error_of([*command, "2"], capsys) or main([*command, "3"]) == 0


@pytest.mark.parametrize("content", ["", "null", "[1]", "{"])
def test_damaged_settings_are_told_in_one_line(run, tmp_path, capsys, content):
    command = ["sample", str(run), "--steps", "2", "--out", str(tmp_path / "x"), "-n", "1"]
    assert main(command) == 0
    capsys.readouterr()
    (tmp_path / "x" / "settings.json").write_text(content)
    assert "settings.json is damaged" in error_of(command, capsys)


# Calibrated chains


def drawn(run, out, *flags):
    assert main(["sample", str(run), "-n", "2", "--out", str(out), *flags]) == 0
    return pictures(out)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_calibrated_chain_has_the_timesteps_of_the_calibration(run, tmp_path, sampler):
    flags = ["--sampler", sampler, "--steps", "3"]
    even = drawn(run, tmp_path / "even", *flags)
    with calibrate(run):
        calibrated = drawn(run, tmp_path / "calibrated", *flags, "--calibrated")
        assert calibrated != even
        assert drawn(run, tmp_path / "one", *flags, "--calibrated", "--batch-size", "1") == calibrated


def test_the_calibrated_variance_is_that_of_ddpm_and_no_matter_to_ddim(run, tmp_path):
    for sampler, same in (("ddpm", False), ("ddim", True)):
        found = []
        for log_variance in (-3.0, 0.0):
            with calibrate(run, log_variance=log_variance):
                out = tmp_path / f"{sampler}{log_variance}"
                found.append(drawn(run, out, "--sampler", sampler, "--steps", "3", "--calibrated"))
        assert (found[0] == found[1]) is same


def test_a_calibrated_chain_has_a_folder_and_settings_of_its_own(run, tmp_path, capsys):
    command = ["sample", str(run), "-n", "1", "--calibrated"]
    with calibrate(run):
        figures = figures_of(command, capsys)
        assert figures["samples"] == str(run / "samples" / "dpm-2m-sde-2steps-ema-0.9-step4-calibrated-seed0")
        assert len(figures["calibration"]) == 12
        assert figures_of(command, capsys)["kept"] == 1
        assert main(command) == 0
        assert "dpm-2m-sde, 2 calibrated steps, seed 0" in capsys.readouterr().out
        line = error_of([*command, "--steps", "4"], capsys)
        assert line == "a calibrated chain has from 1 to 3 steps, got 4"
        plain = ["sample", str(run), "-n", "1", "--steps", "2", "--out", figures["samples"]]
        assert f"holds pictures of calibration {figures['calibration']}, asked for None" in error_of(
            plain, capsys
        )
    with calibrate(run, log_variance=-2.0):
        assert "holds pictures of calibration" in error_of(command, capsys)


def test_calibrating_other_weights_leaves_the_samples_of_these(run, tmp_path, capsys):
    command = ["sample", str(run), "-n", "1", "--calibrated", "--out", str(tmp_path / "x")]
    with calibrate(run, log_variance=-2.5):
        first = figures_of(command, capsys)
        aside, newest = run / "calibration-aside.json", run / "calibration.json"
        aside.write_bytes(newest.read_bytes())
        newest.write_text(newest.read_text().replace('"ema-0.9"', '"model"'))
        try:
            again = figures_of(command, capsys)
        finally:
            aside.unlink()
    assert again["kept"] == 1
    assert again["calibration"] == first["calibration"]


def test_samples_from_before_calibrations_can_be_gone_on_with(run, tmp_path, capsys):
    sample(run, tmp_path / "x", "-n", "1")
    record = tmp_path / "x" / "settings.json"
    settings = json.loads(record.read_text())
    del settings["calibration"]
    record.write_text(json.dumps(settings))
    figures = figures_of(
        ["sample", str(run), "--steps", "4", "-n", "2", "--out", str(tmp_path / "x")], capsys
    )
    assert figures["kept"] == 1
