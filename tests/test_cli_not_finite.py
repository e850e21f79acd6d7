"""What measures a run says of a network that gives NaN."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from cli_helpers import error_of


@pytest.fixture
def broken(run, tmp_path):
    """A copy of the tiny run whose weights are NaN."""
    copy = shutil.copytree(run, tmp_path / "broken")
    for path in copy.glob("checkpoints/*/*.safetensors"):
        state = load_file(path)
        save_file({name: tensor.fill_(float("nan")) for name, tensor in state.items()}, path)
    return copy


@pytest.mark.parametrize("flags", [[], ["--terms", "3"], ["--exact"]])
def test_the_bound_of_a_broken_network_is_no_number(broken, flags, capsys):
    line = error_of(["likelihood", str(broken), *flags], capsys)
    assert line.startswith("the bound's term at timestep 1 is not finite: the network's output there is not")
    assert not (broken / "likelihood.csv").exists()


def test_a_broken_network_is_not_compared(run, broken, capsys):
    assert "is not finite" in error_of(["compare", str(run), str(broken)], capsys)


def test_a_broken_network_has_no_anomaly_scores(broken, run, capsys):
    line = error_of(["anomaly", str(broken), str(run.parent / "images.npz")], capsys)
    assert line.startswith("the network's output at timestep 0 is not finite")
