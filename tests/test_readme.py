"""The README's blocks are run."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perrin.cli.main import COMMANDS, main
from perrin.config import read_toml

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_library_block_runs():
    (block,) = blocks("python")
    names: dict[str, object] = {}
    exec(block, names)
    samples, bpd = names["samples"], names["bpd"]
    assert samples.shape == (16, 1, 8, 8)
    assert bpd.shape == (64,)
    assert bpd.isfinite().all()


@pytest.fixture
def photos(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name, count in (("photos", 80), ("held-out", 5), ("other", 5)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / name / f"{i}.png")
    for i in range(40):
        path = tmp_path / "birds" / ("heron", "stork")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHORTER = {
    "train": {"20000": "2"},
    "sample": {"64": "4", "15": "3"},
    "likelihood": {"64": "8"},
}
"""What the README asks for at full length."""
ADDED = {
    "train": ["--channels", "8", "--num-timesteps", "60", "--batch-size", "4", "--steps", "2"],
    "train-classifier": ["--steps", "2", "--channels", "8"],
    "inpaint": ["--steps", "3", "--resamples", "2"],
    "calibrate": ["--images", "8"],
    "anomaly": ["--reference-size", "16"],
    "verify": ["--only", "forward"],
}


@pytest.mark.usefixtures("photos")
def test_the_commands_run():
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("perrin ")]
    ran = [line.split()[1] for line in lines]
    assert set(COMMANDS) - set(ran) == {"decompress", "demo"}
    for line in lines:
        command = shlex.split(line, comments=True)[1:]
        shorter = SHORTER.get(command[0], {})
        command = [shorter.get(word, word) for word in command] + ADDED.get(command[0], [])
        assert main(command) == 0, line
        if command[0] == "train":  # the README's two runs
            shutil.copytree("runs/photos", "runs/a", dirs_exist_ok=True)
            shutil.copytree("runs/photos", "runs/b", dirs_exist_ok=True)


def test_the_toml_block_is_a_configuration(tmp_path):
    (block,) = blocks("toml")
    (tmp_path / "run.toml").write_text(block)
    config = read_toml(tmp_path / "run.toml")
    assert (config.network.kind, config.network.channels) == ("unet", 96)
