"""Runs trained with ``--label-drop`` on data without classes: told none, and measured as such."""

import numpy as np
import pytest

from cli_helpers import TINY, error_of, figures_of, image_file, measured, train
from perrin.build import load_run
from perrin.cli.main import main
from perrin.data import load
from perrin.likelihood import bound
from perrin.networks import NO_CLASS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("withheld")
    data = image_file(folder, n=40)
    return train(data, folder / "run", *TINY, "--conditional", "--label-drop", "0.3", "--held-out", "0.4")


@pytest.fixture(scope="module")
def data(run):
    return run.parent / "images.npz"


@pytest.fixture(scope="module")
def bare(data):
    """The same images without their classes."""
    path = data.with_name("bare.npy")
    np.save(path, np.load(data)["images"])
    return path


def test_data_without_classes_are_measured_as_told_none(run, bare, tmp_path, capsys):
    figures, _ = measured(run, tmp_path, capsys, str(bare), "--limit", "3")
    model, (x, _) = load_run(run), load(bare).batch(range(3), "cpu")
    told = {"y": x.new_full((3,), NO_CLASS).long()}
    expected = bound(
        model.diffusion, model.network, x, indices=range(3), decoder_draws=4, model_kwargs=told
    ).total
    assert figures["bpd"] == pytest.approx(float(expected.mean()), rel=1e-6)
    assert figures["conditional"] is False


def test_it_is_said_that_none_are_told(run, bare, tmp_path, capsys):
    assert main(["likelihood", str(run), str(bare), "--limit", "1", "--out", str(tmp_path / "t.csv")]) == 0
    output = capsys.readouterr()
    assert f"{bare} has no classes: {run} is told none, as --label-drop trained it" in output.err
    assert "given its class" not in output.out


@pytest.mark.parametrize(
    ("flags", "kind"), [([], "variational bound"), (["--ode", "--ode-steps", "2"], "probability-flow ODE")]
)
def test_a_number_given_the_class_is_called_one(run, flags, kind, tmp_path, capsys):
    figures, out = measured(run, tmp_path, capsys, "--limit", "2", *flags)
    assert figures["conditional"] is True
    assert main(["likelihood", str(run), "--limit", "2", "--out", str(out), *flags]) == 0
    assert f"{kind} of each example given its class, " in capsys.readouterr().out


def test_a_model_that_always_knew_the_class_needs_it(data, bare, tmp_path, capsys):
    told = train(data, tmp_path / "told", *TINY, "--conditional")
    line = error_of(["likelihood", str(told), str(bare)], capsys)
    assert line == f"{bare} has no classes, which the conditional model needs"


def test_runs_are_compared_without_classes(run, bare, capsys):
    figures = figures_of(["compare", str(run), str(run), str(bare), "--limit", "2"], capsys)
    assert (figures["a"]["conditional"], figures["b"]["conditional"]) == (False, False)


def test_a_comparison_says_which_side_knows_the_class(run, data, tmp_path, capsys):
    plain = train(data, tmp_path / "plain", *TINY)
    assert main(["compare", str(plain), str(run), str(data), "--limit", "2"]) == 0
    a, b = (line for line in capsys.readouterr().out.splitlines() if line.startswith(("  A ", "  B ")))
    assert ("given its class" in a, "given its class" in b) == (False, True)


def test_scores_are_against_a_reference_that_is_told_as_little(run, data, bare, capsys):
    """The images that were fitted score alike, whether their file has classes or the reference has none."""
    medians = [
        figures_of(["anomaly", str(run), *map(str, files)], capsys)["data"]["score_median"]
        for files in ((bare,), (data, "--reference", bare), (bare, "--reference", data))
    ]
    assert medians[1] == pytest.approx(medians[2], rel=1e-9)
    assert len(set(medians)) == 2


def test_a_calibration_fits_data_without_classes(run, bare, capsys):
    assert figures_of(["calibrate", str(run), str(bare), "--images", "5"], capsys)["images"] == 5


def test_data_without_classes_are_compressed_and_come_back(run, bare, tmp_path, capsys):
    pytest.importorskip("constriction")
    file, back = tmp_path / "x.perrin", tmp_path / "back.npy"
    figures_of(["compress", str(run), str(bare), "--out", str(file), "--limit", "3", "--steps", "2"], capsys)
    figures_of(["decompress", str(run), str(file), "--out", str(back)], capsys)
    np.testing.assert_array_equal(np.load(back), load(bare).values[:3])
