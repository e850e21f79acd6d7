"""The README's blocks are run."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perrin.cli.main import main
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
    (tmp_path / "photos").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("photos")
def test_the_commands_run():
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("perrin ")]
    assert [line.split()[1] for line in lines] == ["train", "sample", "likelihood", "inspect"]
    for line in lines:
        command = shlex.split(line, comments=True)[1:]
        if command[0] == "sample":
            command[command.index("64")] = "4"
        if command[0] == "train":
            command[command.index("20000")] = "2"
            command += ["--channels", "8", "--num-timesteps", "60", "--batch-size", "4"]
        assert main(command) == 0, line


def test_the_toml_block_is_a_configuration(tmp_path):
    (block,) = blocks("toml")
    (tmp_path / "run.toml").write_text(block)
    config = read_toml(tmp_path / "run.toml")
    assert (config.network.kind, config.network.channels) == ("unet", 96)
