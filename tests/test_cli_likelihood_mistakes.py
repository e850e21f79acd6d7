"""Mistakes of the caller of ``perrin likelihood``, each told on one line."""

import math

import numpy as np
import pytest

from cli_helpers import TINY_MLP, error_of, image_file, measured, train, vector_file


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: image_file(folder, size=4), "shape must be (1, 8, 8), got (1, 4, 4)"),
        (vector_file, "shape must be (1, 8, 8), got (3,)"),
        (lambda folder: _floats(folder), "levels must be 256, got None"),
        (lambda folder: _bits(folder), "levels must be 256, got 2"),
        (lambda folder: _colour(folder), "shape must be (1, 8, 8), got (3, 8, 8)"),
    ],
)
def test_data_that_do_not_fit_are_refused(run, make, message, tmp_path, capsys):
    data = make(tmp_path)
    line = error_of(["likelihood", str(run), str(data)], capsys)
    assert line == f"{data} does not fit the run {run}: {message}"


def _floats(folder):
    np.save(folder / "floats.npy", np.zeros((3, 8, 8), np.float32))
    return folder / "floats.npy"


def _colour(folder):
    np.savez(folder / "colour.npz", images=np.zeros((3, 8, 8, 3), np.uint8))
    return folder / "colour.npz"


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A run of vectors of 1,000 levels in a file of int64."""
    folder = tmp_path_factory.mktemp("wide")
    np.save(folder / "wide.npy", np.arange(60).reshape(20, 3) * 16)
    return train(folder / "wide.npy", folder / "run", *TINY_MLP, "--levels", "1000")


def _low(folder, dtype):
    path = folder / "low.npy"
    np.save(path, np.arange(60).reshape(20, 3).astype(dtype))
    return str(path)


@pytest.mark.parametrize("dtype", [np.int64, np.uint32])
def test_wide_integers_that_happen_to_be_low_have_the_levels_of_the_run(wide, dtype, tmp_path, capsys):
    assert measured(wide, tmp_path, capsys, _low(tmp_path, dtype))[0]["levels"] == 1000


def test_narrow_integers_have_levels_of_their_own(wide, tmp_path, capsys):
    line = error_of(["likelihood", str(wide), _low(tmp_path, np.uint8)], capsys)
    assert line.endswith("levels must be 1000, got 256")


def test_wide_integers_beyond_the_levels_of_the_run_are_refused(vectors_of_levels, tmp_path, capsys):
    np.save(tmp_path / "high.npy", np.full((4, 3), 17))
    line = error_of(["likelihood", str(vectors_of_levels), str(tmp_path / "high.npy")], capsys)
    assert line.endswith("values must lie in 0..16 for 17 levels, the largest is 17")


@pytest.fixture(scope="module")
def vectors_of_levels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("levels")
    np.save(folder / "few.npy", np.arange(60, dtype=np.uint8).reshape(20, 3) % 17)
    return train(folder / "few.npy", folder / "run", *TINY_MLP, "--levels", "17")


def _bits(folder):
    np.save(folder / "bits.npy", np.zeros((3, 8, 8), bool))
    return folder / "bits.npy"


@pytest.mark.parametrize("values", [np.zeros((0, 3)), np.full((2, 3), math.nan)], ids=["empty", "nan"])
def test_empty_data_and_data_without_numbers_are_refused(vectors, tmp_path, values, capsys):
    data = tmp_path / "bad.npy"
    np.save(data, values.astype(np.float32))
    assert error_of(["likelihood", str(vectors), str(data)], capsys).startswith(f"{data}: ")
    assert not (vectors / "likelihood-bad.csv").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--terms", "0"], "--terms must be at least 1, got 0"),
        (["--terms", "12"], "--terms must be from 1 to 11, the chain's KL terms, got 12"),
        (["--terms", "4", "--steps", "4"], "--terms must be from 1 to 3, the chain's KL terms, got 4"),
        (["--decoder-draws", "0"], "--decoder-draws must be at least 1, got 0"),
        (["--exact", "--terms", "3"], "--exact takes all terms and --terms 3 some: give one of them"),
        (["--per-timestep", "--terms", "3"], "--per-timestep takes all terms and --terms 3 some: give one"),
        (["--steps", "0"], "steps must be between 1 and 12, got 0"),
        (["--steps", "13"], "steps must be between 1 and 12, got 13"),
        (["--weights", "best"], "weights must be one of ema-0.9, ema-0.5, model, got best"),
        (["--checkpoint", "3"], "has no checkpoint of step 3, only of 4"),
        (["--jso"], "perhaps you meant --json"),
        (["--probes", "2"], "--probes needs --ode"),
        (["--exact-trace"], "--exact-trace needs --ode"),
        (["--dequantization", "uniform"], "--dequantization needs --ode"),
        (["--ode", "--terms", "3"], "--ode is not the bound, to which --terms belongs: give one of them"),
        (["--ode", "--exact"], "--ode is not the bound, to which --exact belongs"),
        (["--ode", "--steps", "3"], "--ode is not the bound, to which --steps belongs"),
        (["--ode", "--per-timestep"], "--ode is not the bound, to which --per-timestep belongs"),
        (["--ode", "--calibrated"], "--ode is not the bound, to which --calibrated belongs"),
        (["--ode", "--no-clip"], "--ode is not the bound, to which --clip belongs"),
        (["--ode", "--decoder-draws", "2"], "--ode is not the bound, to which --decoder-draws belongs"),
        (["--ode", "--ode-steps", "0"], "--ode-steps must be at least 1, got 0"),
        (["--ode", "--probes", "0"], "--probes must be at least 1, got 0"),
        (["--ode", "--draws", "0"], "--draws must be at least 1, got 0"),
        (["--ode", "--tolerance", "0.1"], "--tolerance needs --solver adaptive"),
        (["--ode", "--solver", "adaptive", "--ode-steps", "3"], "--ode-steps belongs to --solver heun"),
        (
            ["--ode", "--solver", "adaptive", "--tolerance", "0"],
            "--tolerance must be above 0 and finite, got 0.0",
        ),
        (
            ["--ode", "--solver", "adaptive", "--tolerance", "nan"],
            "--tolerance must be above 0 and finite, got nan",
        ),
        (["--ode", "--exact-trace", "--probes", "2"], "--exact-trace has no --probes: give one of them"),
        (["--ode", "--solver", "euler"], "invalid choice 'euler' for argument '--solver'"),
    ],
)
def test_a_mistake_is_one_line(run, flags, message, capsys):
    assert message in error_of(["likelihood", str(run), *flags], capsys)


def test_a_run_without_checkpoints_is_refused(run, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    assert "has no checkpoint yet" in error_of(["likelihood", str(tmp_path)], capsys)
