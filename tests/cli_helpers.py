"""A tiny data set and a tiny run, as a user's commands make them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from perrin.cli.main import main

TINY = [
    *(
        "--channels",
        "8",
        "--channel-mult",
        "1",
        "--num-res-blocks",
        "1",
        "--attention-levels",
        "--num-heads",
        "1",
    ),
    *(
        "--num-timesteps",
        "12",
        "--batch-size",
        "32",
        "--steps",
        "4",
        "--log-every",
        "2",
        "--ema",
        "0.9",
        "0.5",
    ),
    *("--warmup-steps", "1"),
]
TINY_MLP = [
    *(
        "--kind",
        "mlp",
        "--width",
        "8",
        "--depth",
        "1",
        "--num-timesteps",
        "12",
        "--batch-size",
        "4",
        "--steps",
        "2",
    ),
]
BOX = ["--box", "0", "0", "4", "4"]


def image_file(folder: Path, *, n: int = 20, size: int = 8, seed: int = 0) -> Path:
    """An .npz of 8-bit grey images in three classes."""
    random = np.random.default_rng(seed)
    path = folder / "images.npz"
    np.savez(path, images=random.integers(0, 256, (n, size, size), np.uint8), labels=np.arange(n) % 3)
    return path


def vector_file(folder: Path) -> Path:
    """An .npy of vectors in [-1, 1]."""
    path = folder / "vectors.npy"
    np.save(path, np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32))
    return path


def train(data: Path, out: Path, *flags: str) -> Path:
    """The run that training with ``flags`` leaves in ``out``."""
    assert main(["train", str(data), "--out", str(out), *flags]) == 0
    return out


def error_of(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command with a mistake prints."""
    capsys.readouterr()
    assert main(args) == 2
    output = capsys.readouterr()
    assert output.out == ""
    *notes, line = output.err.splitlines()
    assert not any("error" in note or "Traceback" in note for note in notes)
    assert line.startswith("perrin: error: ")
    return line.removeprefix("perrin: error: ")


def figures_of(args: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    """The JSON object that a command prints, which is all of its standard output."""
    capsys.readouterr()
    assert main([*args, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def measured(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *flags: str, name: str = "table.csv"
) -> tuple[dict, Path]:
    """The figures of ``perrin likelihood`` and the table that it writes."""
    out = tmp_path / name
    return figures_of(["likelihood", str(run), "--out", str(out), *flags], capsys), out


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a .csv table."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column(path: Path, name: str) -> np.ndarray:
    """A column of a .csv table, as numbers."""
    return np.array([float(row[name]) for row in table(path)])
