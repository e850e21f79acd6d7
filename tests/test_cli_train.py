"""``perrin train``: a run, its resumption, and what it refuses."""

import json
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from cli_helpers import TINY, TINY_MLP, error_of, figures_of, image_file, train, vector_file
from perrin.cli.main import main
from perrin.cli.train import Preset
from perrin.presets import PRESETS
from perrin.training import Interrupted, RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    return train(image_file(folder), folder / "run", *TINY)


@pytest.fixture
def data(run):
    return str(run.parent / "images.npz")


def test_training_prints_where_the_run_is_and_what_it_reached(tmp_path, capsys):
    assert main(["train", str(image_file(tmp_path)), "--out", str(tmp_path / "run"), *TINY]) == 0
    output = capsys.readouterr()
    assert f"run {tmp_path / 'run'}: 20 examples of shape (1, 8, 8)" in output.err
    assert re.search(r"step 4/4, loss \S+, \d+ examples/s, held-out \S+ ± \S+ bits/dim", output.err)
    assert "step 4/4, loss" in output.out
    assert f"run {tmp_path / 'run'}: loss.png" in output.out


def test_a_run_holds_its_configuration_and_pictures(run):
    record = json.loads((run / "config.json").read_text())
    assert record["config"]["network"]["channels"] == 8
    assert len(record["data"].pop("fingerprint")) == 24
    assert record["data"] == {"shape": [1, 8, 8], "levels": 256, "class_names": ["0", "1", "2"], "count": 20}
    assert {"loss.png", "samples.png", "metrics.jsonl"} <= {path.name for path in run.iterdir()}


def test_json_has_the_figures(run, data, capsys):
    figures = figures_of(["train", data, "--out", str(run), *TINY], capsys)
    assert figures["run"] == str(run)
    assert (figures["step"], figures["finished"], figures["checkpoints"]) == (4, True, [4])
    assert figures["held_out_bpd"] > 0


def test_flags_go_before_the_file_and_the_file_before_the_defaults(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text('[training]\nlr = 0.5\nsteps = 1\nbatch_size = 2\n[network]\nkind = "mlp"\nwidth = 8\n')
    command = ["train", str(vector_file(tmp_path)), "--out", str(tmp_path / "run"), "--config", str(file)]
    assert figures_of([*command, "--lr", "0.25", "diffusion.num_timesteps=12"], capsys)["step"] == 1
    config = RunFolder.open(tmp_path / "run").config
    assert (config.training.lr, config.training.batch_size, config.network.width) == (0.25, 2, 8)
    assert (config.network.depth, config.diffusion.num_timesteps) == (4, 12)


def test_unknown_keys_in_a_file_are_refused(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text("[training]\nlearning_rate = 1e-3\n")
    line = error_of(["train", "digits", "--out", str(tmp_path / "run"), "--config", str(file)], capsys)
    assert line == f"{file}: unknown key training.learning_rate"


PRESET = ["--preset", "likelihood", "--channels", "8", "--num-timesteps", "4", "--num-heads", "1"]
SHORT = ["--minutes", "None", "--steps", "2", "--precision", "fp32", "--batch-size", "4"]


def test_a_preset_gives_the_defaults_and_the_data_what_it_leaves_open(tmp_path, capsys):
    command = ["train", str(image_file(tmp_path, size=16)), "--out", str(tmp_path / "run"), *PRESET, *SHORT]
    assert figures_of(command, capsys)["finished"]
    config = RunFolder.open(tmp_path / "run").config
    assert (config.diffusion.schedule, config.network.level_basis, config.network.channels) == (
        "log-snr-linear",
        16,
        8,
    )
    assert (config.diffusion.log_snr_max, config.network.fourier, config.network.patch) == (13.28, (), 2)
    assert figures_of([*command[:-1], "4"], capsys)["finished"]
    assert figures_of(["train", "--out", str(tmp_path / "run"), "--steps", "3"], capsys)["step"] == 3


def test_the_command_with_a_preset_resumes_its_run(tmp_path, capsys):
    command = ["train", str(image_file(tmp_path)), "--out", str(tmp_path / "run"), *PRESET, *SHORT]
    assert figures_of([*command, "--stop-at", "1"], capsys)["step"] == 1
    assert "going on from the checkpoint of step 1" in _notes_of(command, capsys)
    without_data = ["train", "--out", str(tmp_path / "run"), *PRESET, *SHORT]
    assert figures_of(without_data, capsys)["step"] == 2
    line = error_of([*command, "--log-snr-max", "9"], capsys)
    assert line.endswith("diffusion.log_snr_max is 13.28, asked for 9.0")


def test_a_file_goes_before_the_preset(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text("[diffusion]\nlog_snr_max = 8.0\n[network]\ndropout = 0.25\n[training]\nlr = 0.5\n")
    data, out = str(image_file(tmp_path)), str(tmp_path / "run")
    command = ["train", data, "--out", out, *PRESET, *SHORT, "--config", str(file), "--lr", "0.01"]
    assert figures_of(command, capsys)["finished"]
    config = RunFolder.open(out).config
    assert (config.diffusion.log_snr_max, config.network.dropout, config.training.lr) == (8.0, 0.25, 0.01)
    assert (config.network.level_basis, config.network.patch) == (16, 1)


def test_an_unknown_preset_is_one_line_that_names_those_there_are(capsys):
    line = error_of(["train", "digits", "--preset", "fast"], capsys)
    assert "'fast'" in line
    assert "--preset" in line
    assert "likelihood" in line


def test_presets_stand_in_the_help(capsys):
    assert main(["train", "--help"]) == 0
    assert re.search(r"--preset \{None,likelihood\}", capsys.readouterr().out)


def test_every_preset_can_be_asked_for():
    assert get_args(Preset) == tuple(PRESETS)


def test_a_preset_for_levels_refuses_data_without(tmp_path, capsys):
    command = [
        "train",
        str(vector_file(tmp_path)),
        "--kind",
        "mlp",
        "--preset",
        "likelihood",
        "--level-basis",
        "4",
    ]
    line = error_of([*command, "--out", str(tmp_path / "run")], capsys)
    assert "network.level_basis = 4: needs data with levels" in line


def test_a_stopped_run_goes_on_by_the_same_command_or_by_its_path_alone(tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    command = ["train", str(image_file(tmp_path)), *out, *TINY]
    first = figures_of([*command, "--stop-at", "1"], capsys)
    assert (first["step"], first["finished"]) == (1, False)
    assert figures_of([*command, "--stop-at", "2"], capsys)["step"] == 2
    assert "going on from the checkpoint of step 2" in _notes_of(["train", *out, "--stop-at", "3"], capsys)
    assert figures_of(["train", *out], capsys)["finished"]
    assert figures_of(["train", *out, "--steps", "6"], capsys)["step"] == 6


def _notes_of(args, capsys):
    assert main(args) == 0
    return capsys.readouterr().err


def test_a_single_held_out_example_has_no_standard_error(tmp_path, capsys):
    run = train(image_file(tmp_path), tmp_path / "run", *TINY, "--held-out", "0.01")
    assert figures_of(["train", "--out", str(run)], capsys)["held_out_bpd_se"] is None
    assert main(["train", "--out", str(run), "--steps", "5"]) == 0
    assert "± unknown bits/dim" in capsys.readouterr().err


def test_another_configuration_is_refused_on_resuming(run, data, capsys):
    line = error_of(["train", data, "--out", str(run), *TINY, "--lr", "0.1"], capsys)
    assert line.endswith("training.lr is 0.0004, asked for 0.1")


def test_another_kind_of_network_is_refused_on_resuming(run, data, capsys):
    assert "network.kind is 'unet', asked for 'mlp'" in error_of(
        ["train", data, "--out", str(run), "--kind", "mlp"], capsys
    )


def test_data_that_changed_are_refused_on_resuming(tmp_path, capsys):
    data = image_file(tmp_path)
    train(data, tmp_path / "run", *TINY)
    image_file(tmp_path, size=4)
    line = error_of(["train", "--out", str(tmp_path / "run")], capsys)
    assert (
        line == f"{data} is not, or no longer, what {tmp_path / 'run'} was begun with: "
        "shape must be (1, 8, 8), got (1, 4, 4)"
    )


def test_other_values_of_the_same_shape_are_refused_and_nothing_is_written(tmp_path, capsys):
    data = tmp_path / "images.npy"
    np.save(data, np.zeros((20, 8, 8), np.uint8))
    run = train(data, tmp_path / "run", *TINY)
    before = (run / "config.json").read_text()
    np.save(data, np.full((20, 8, 8), 7, np.uint8))
    line = error_of(["train", str(data), "--out", str(run), "--steps", "9"], capsys)
    assert "is not, or no longer, what" in line
    assert "fingerprint" in line
    assert (run / "config.json").read_text() == before


def test_moved_data_are_found_again_under_their_new_path(tmp_path, capsys):
    data = image_file(tmp_path)
    run = train(data, tmp_path / "run", *TINY)
    moved = data.rename(tmp_path / f"moved{data.suffix}")
    assert figures_of(["train", str(moved), "--out", str(run), "--steps", "5"], capsys)["step"] == 5
    assert json.loads((run / "config.json").read_text())["config"]["data"]["path"] == str(moved)


def test_a_refused_option_leaves_no_folder_behind(tmp_path, capsys):
    out = tmp_path / "run"
    line = error_of(["train", str(vector_file(tmp_path)), "--out", str(out), *TINY_MLP, "--flip"], capsys)
    assert "data.flip = true needs images" in line
    assert not out.exists()


def test_digits_train_from_the_command_line(tmp_path, capsys):
    figures = figures_of(["train", "digits", "--out", str(tmp_path / "run"), *TINY], capsys)
    assert figures["finished"]


def test_weights_are_as_readable_as_the_rest_of_a_checkpoint(run):
    modes = {path.suffix: path.stat().st_mode for path in (run / "checkpoints" / "step-00000004").iterdir()}
    assert modes[".safetensors"] == modes[".pt"]


@pytest.mark.parametrize(
    ("make", "flags", "message"),
    [
        (vector_file, TINY, "network.kind = 'unet': data of shape (3,) need 'mlp'"),
        (image_file, TINY_MLP, "network.kind = 'mlp': data of shape (1, 8, 8) need 'unet'"),
        (vector_file, [*TINY_MLP, "--conditional"], "data.conditional = True: these data have no classes"),
        (image_file, ["--channel-mult", "1", "1", "1", "1", "1"], "multiples of 16"),
        (image_file, ["--zero-terminal-snr"], "diffusion.zero_terminal_snr = True: needs mean_type start-x"),
        (image_file, ["--steps", "None"], "training would never end"),
        (lambda folder: folder / "absent", TINY, "no such file or folder"),
        (lambda folder: folder, TINY, "no images"),
    ],
)
def test_what_cannot_be_trained_leaves_no_folder(make, flags, message, tmp_path, capsys):
    line = error_of(["train", str(make(tmp_path)), "--out", str(tmp_path / "run"), *flags], capsys)
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    line = error_of(["train", str(image_file(tmp_path)), "--out", str(tmp_path / "run"), *TINY], capsys)
    assert "is not empty and holds no run" in line
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_cuda_is_refused_where_there_is_none(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    command = ["train", str(image_file(tmp_path)), "--out", str(tmp_path / "run"), "--device", "cuda"]
    assert (
        error_of(command, capsys) == "--device cuda: torch finds no CUDA device here (expected auto or cpu)"
    )


def test_an_interrupted_training_ends_with_130(run, data, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise Interrupted(3)

    monkeypatch.setattr("perrin.training.train", stop)
    assert main(["train", data, "--out", str(run)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "perrin: interrupted; step 3 is saved"


def test_other_exceptions_are_not_hidden(run, data, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr("perrin.training.train", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", data, "--out", str(run)])


def test_without_out_the_run_is_named_for_the_data(tmp_path, capsys, monkeypatch):
    data = image_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    figures = figures_of(["train", str(data), *TINY], capsys)
    assert figures["run"] == str(Path("runs") / data.name.split(".")[0])
    assert "going on from the checkpoint of step 4" in _notes_of(["train", str(data)], capsys)
