"""``perrin demo``, with a configuration that trains at once."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from cli_helpers import TINY, error_of, figures_of, image_file, train
from perrin.cli.main import main
from perrin.config import DataConfig, TrainingConfig, UNetConfig
from perrin.presets import DEMO


@pytest.fixture
def tiny_demo(monkeypatch):
    config = replace(
        DEMO,
        data=DataConfig(path="digits", held_out=0.02),
        diffusion=replace(DEMO.diffusion, num_timesteps=5),
        network=UNetConfig(channels=8, channel_mult=(1,), num_res_blocks=1, attention_levels=(), num_heads=1),
        training=TrainingConfig(steps=3, minutes=1, batch_size=16, ema=(0.9,)),
    )
    monkeypatch.setattr("perrin.presets.DEMO", config)


@pytest.mark.usefixtures("tiny_demo")
def test_the_demo_leaves_pictures_figures_and_a_report(tmp_path, capsys):
    out = tmp_path / "digits"
    figures = figures_of(["demo", "--out", str(out)], capsys)
    assert (figures["n"], figures["num_timesteps"], figures["terms"]) == (36, 5, None)
    assert (figures["network_calls"], figures["decoder_draws"]) == (8, 4)
    assert figures["table"] == str(out / "likelihood.csv")
    assert (figures["train_steps"], figures["levels"], figures["weights"]) == (3, 17, "ema-0.9")
    assert figures["bpd"] > 0 < figures["bpd_se"]
    assert 2.3 < figures["histogram_bpd"] < 2.5
    assert json.loads((out / "report.json").read_text()) == figures
    assert "bits/dim" in (out / "report.md").read_text()
    assert (out / "loss.png").exists()
    assert len((out / "likelihood.csv").read_text().splitlines()) == 37
    with Image.open(out / "samples.png") as image:
        assert image.size == (502, 502)  # 10 x 10 tiles of 48 pixels


@pytest.mark.usefixtures("tiny_demo")
def test_the_demo_again_trains_no_further(tmp_path, capsys):
    command = ["demo", "--out", str(tmp_path / "digits")]
    first = figures_of(command, capsys)
    picture = (tmp_path / "digits" / "samples.png").read_bytes()
    assert main(command) == 0
    output = capsys.readouterr().out
    assert f"held-out     {first['bpd']:.3f} ± {first['bpd_se']:.3f} bits/dim (n = 36)" in output
    assert f"{tmp_path / 'digits'}/samples.png" in output
    assert (tmp_path / "digits" / "samples.png").read_bytes() == picture
    assert figures_of(command, capsys)["train_steps"] == 3


@pytest.mark.usefixtures("tiny_demo")
def test_the_time_can_be_given(tmp_path, capsys):
    figures = figures_of(["demo", "--out", str(tmp_path / "digits"), "--seconds", "0.001"], capsys)
    assert figures["train_steps"] == 1


def test_a_time_of_nothing_is_refused(tmp_path, capsys):
    line = error_of(["demo", "--out", str(tmp_path / "digits"), "--seconds", "0"], capsys)
    assert line == "--seconds must be above 0, got 0.0"


def test_a_run_of_other_data_is_refused(tmp_path, capsys):
    data = image_file(tmp_path)
    run = train(data, tmp_path / "run", *TINY)
    line = error_of(["demo", "--out", str(run)], capsys)
    assert line == f"--out {run} holds a run of {data}, not of digits: choose another folder"
