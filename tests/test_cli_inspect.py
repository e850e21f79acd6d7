"""``perrin inspect``: what a run is."""

import pytest

from cli_helpers import TINY_MLP, figures_of, train, vector_file
from perrin.cli.main import main


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
