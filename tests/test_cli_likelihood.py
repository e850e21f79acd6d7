"""``perrin likelihood`` and ``perrin inspect``: the figures of a run."""

import csv

import numpy as np
import pytest

from cli_helpers import TINY, TINY_MLP, error_of, figures_of, image_file, train, vector_file
from perrin.cli.main import main
from perrin.data import split


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("likelihood")
    return train(image_file(folder), folder / "run", *TINY, "--held-out", "0.3")


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_figures_are_the_means_of_the_table(run, capsys):
    figures = figures_of(["likelihood", str(run)], capsys)
    rows = table(run / "likelihood.csv")
    assert figures["csv"] == str(run / "likelihood.csv")
    assert [int(row["index"]) for row in rows] == split(20, 0.3)[1].tolist()
    assert [row["name"] for row in rows] == [row["index"] for row in rows]
    for key in ("bpd", "prior_bpd", "vb_bpd", "decoder_bpd"):
        assert figures[key] == pytest.approx(np.mean([float(row[key]) for row in rows]), abs=1e-6)
    bpd = np.array([float(row["bpd"]) for row in rows])
    assert figures["bpd_se"] == pytest.approx(bpd.std(ddof=1) / 6**0.5, abs=1e-6)
    assert figures["bpd"] == pytest.approx(figures["prior_bpd"] + figures["vb_bpd"] + figures["decoder_bpd"])
    assert (figures["n"], figures["num_timesteps"], figures["network_calls"]) == (6, 12, 12)
    assert (figures["levels"], figures["weights"], figures["terms"]) == (256, "ema-0.9", None)
    assert figures["seconds"] > 0


def test_the_rows_do_not_depend_on_the_batch_size_but_on_the_seed(run, tmp_path):
    files = [tmp_path / f"{name}.csv" for name in ("one", "many", "seed")]
    for file, flags in zip(files, (["--batch-size", "4"], [], ["--seed", "1"]), strict=True):
        assert main(["likelihood", str(run), "--out", str(file), *flags]) == 0
    one, many, seed = ([float(row["bpd"]) for row in table(file)] for file in files)
    np.testing.assert_allclose(one, many, rtol=1e-4)
    assert not np.allclose(one, seed, rtol=1e-4)


def test_people_are_told_the_parts_and_how_it_was_measured(run, capsys):
    assert main(["likelihood", str(run)]) == 0
    output = capsys.readouterr().out
    assert "bits/dim (mean and standard error of n = 6)" in output
    assert "prior + " in output
    assert "T = 12, 256 levels, predictions clipped" in output
    assert "weights ema-0.9 of step 4; 12 network calls per example" in output


def test_fewer_terms_are_called_an_estimate(run, capsys):
    assert main(["likelihood", str(run), "--terms", "3"]) == 0
    assert "estimate with 3+1 calls per example" in capsys.readouterr().out
    assert figures_of(["likelihood", str(run), "--terms", "3"], capsys)["network_calls"] == 4


def test_other_data_are_measured_in_their_order(run, tmp_path, capsys):
    data = image_file(tmp_path, n=7, seed=1)
    out = tmp_path / "table.csv"
    figures = figures_of(["likelihood", str(run), str(data), "--limit", "5", "--out", str(out)], capsys)
    assert figures["n"] == 5
    assert [row["index"] for row in table(out)] == ["0", "1", "2", "3", "4"]


def test_a_single_example_has_no_standard_error(run, capsys):
    assert figures_of(["likelihood", str(run), "--limit", "1"], capsys)["bpd_se"] is None
    assert main(["likelihood", str(run), "--limit", "1"]) == 0
    assert "± unknown bits/dim (mean and standard error of n = 1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: image_file(folder, size=4), "shape must be (1, 8, 8), got (1, 4, 4)"),
        (vector_file, "shape must be (1, 8, 8), got (3,)"),
        (lambda folder: _floats(folder), "levels must be 256, got None"),
        (lambda folder: _bits(folder), "levels must be 256, got 2"),
    ],
)
def test_data_that_do_not_fit_are_refused(run, make, message, tmp_path, capsys):
    data = make(tmp_path)
    line = error_of(["likelihood", str(run), str(data)], capsys)
    assert line == f"{data} does not fit the run {run}: {message}"


def _floats(folder):
    np.save(folder / "floats.npy", np.zeros((3, 8, 8), np.float32))
    return folder / "floats.npy"


def _bits(folder):
    np.save(folder / "bits.npy", np.zeros((3, 8, 8), bool))
    return folder / "bits.npy"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--terms", "12"], "--terms must be from 1 to 11, got 12"),
        (["--weights", "best"], "weights must be one of ema-0.9, ema-0.5, model, got best"),
        (["--jso"], "perhaps you meant --json"),
    ],
)
def test_a_mistake_is_one_line(run, flags, message, capsys):
    assert message in error_of(["likelihood", str(run), *flags], capsys)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional")
    return train(image_file(folder), folder / "run", *TINY, "--conditional")


def test_a_conditional_model_is_told_the_classes(conditional, tmp_path, capsys):
    data = conditional.parent / "images.npz"
    unlabelled = tmp_path / "images.npy"
    np.save(unlabelled, np.load(data)["images"])
    shifted = tmp_path / "shifted.npz"
    np.savez(shifted, images=np.load(data)["images"], labels=np.load(data)["labels"] + 1)
    out = ["--out", str(tmp_path / "table.csv")]
    assert figures_of(["likelihood", str(conditional), str(data), *out], capsys)["n"] == 20
    line = error_of(["likelihood", str(conditional), str(unlabelled), *out], capsys)
    assert line == f"{unlabelled} has no classes, which the conditional model needs"
    line = error_of(["likelihood", str(conditional), str(shifted), *out], capsys)
    assert line == f"{shifted}: class '3' is none of the run's (0, 1, 2)"


def test_inspect_shows_what_a_run_is(run, capsys):
    figures = figures_of(["inspect", str(run)], capsys)
    assert figures["config"]["training"]["ema"] == [0.9, 0.5]
    assert figures["data"]["shape"] == [1, 8, 8]
    assert figures["checkpoints"] == [4]
    assert figures["weights"] == ["ema-0.9", "ema-0.5", "model"]
    assert figures["parameters"] > 1000
    assert figures["log_snr_first"] > 0 > figures["log_snr_last"]
    assert figures["sigma_first_half_bins"] == pytest.approx(255 * figures["sigma_first"])
    assert figures["metrics"]["step"] == 4
    assert {"loss", "held_out_bpd"} <= figures["metrics"].keys()


def test_inspect_prints_a_table_for_people(run, capsys):
    assert main(["inspect", str(run)]) == 0
    output = capsys.readouterr().out
    assert "checkpoints  4" in output
    assert "half-bins" in output


def test_inspect_copes_with_vectors_no_signal_and_no_checkpoint(tmp_path, capsys):
    flags = [*TINY_MLP, "--zero-terminal-snr", "--mean-type", "velocity", "--var-type", "fixed-small"]
    run = train(vector_file(tmp_path), tmp_path / "run", *flags)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((run / "config.json").read_bytes())
    figures = figures_of(["inspect", str(tmp_path / "bare")], capsys)
    assert (figures["log_snr_last"], figures["sigma_first_half_bins"]) == (None, None)
    assert figures["checkpoints"] == []
    assert main(["inspect", str(tmp_path / "bare")]) == 0
    assert "none yet" in capsys.readouterr().out


def test_a_file_that_is_no_table_is_not_overwritten(run, tmp_path, capsys):
    for name in ("notes.txt", "config.json"):
        target = tmp_path / name
        target.write_text("mine\n")
        assert "is no table of likelihoods" in error_of(
            ["likelihood", str(run), "--out", str(target)], capsys
        )
        assert target.read_text() == "mine\n"
    assert "is no table of likelihoods" in error_of(["likelihood", str(run), "--out", str(tmp_path)], capsys)


def test_a_place_that_cannot_be_written_is_told_in_one_line(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = error_of(["likelihood", str(run), "--out", str(tmp_path / "file" / "x.csv")], capsys)
    assert str(tmp_path / "file") in line


def test_other_data_have_a_table_of_their_own(run, tmp_path, capsys):
    held_out = (run / "likelihood.csv").read_text() if (run / "likelihood.csv").exists() else None
    figures = figures_of(["likelihood", str(run), str(image_file(tmp_path))], capsys)
    assert figures["csv"].startswith(str(run / "likelihood-"))
    assert ((run / "likelihood.csv").read_text() if held_out else None) == held_out
