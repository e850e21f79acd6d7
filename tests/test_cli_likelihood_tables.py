"""The tables of ``perrin likelihood``: their formats, their names, and what they overwrite."""

import numpy as np
import pytest

from cli_helpers import column, error_of, figures_of, image_file, measured, table
from perrin.cli.main import main
from perrin.data import split
from tiny_calibration import calibrate


def test_a_table_can_be_parquet(run, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    figures, out = measured(run, tmp_path, capsys, name="table.parquet")
    rows = parquet.read_table(out).to_pydict()
    _, text = measured(run, tmp_path, capsys)
    assert list(rows) == list(table(text)[0])
    assert rows["index"] == split(20, 0.3)[1].tolist()
    np.testing.assert_allclose(rows["bpd"], column(text, "bpd"), rtol=1e-7)
    assert np.mean(rows["bpd"]) == pytest.approx(figures["bpd"])
    assert measured(run, tmp_path, capsys, name="table.parquet")[0]["table"] == str(out)


@pytest.mark.parametrize("name", ["notes.txt", "notes.csv", "notes.parquet", "config.json", "", "dir.csv"])
def test_what_is_no_table_is_not_overwritten(run, tmp_path, name, capsys):
    target = tmp_path / name
    if name == "dir.csv":
        target.mkdir()
    elif name:
        target.write_text("mine\n")
    line = error_of(["likelihood", str(run), "--out", str(target)], capsys)
    known = target.suffix in (".csv", ".parquet")
    assert ("is no such table (index, name, bpd, ...)" if known else "must end in .csv or .parquet") in line
    assert target.is_dir() or target.read_text() == "mine\n"


def test_a_place_that_cannot_be_written_is_told_in_one_line(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = error_of(["likelihood", str(run), "--out", str(tmp_path / "file" / "x.csv")], capsys)
    assert str(tmp_path / "file") in line


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--steps", "3"], "likelihood-3-steps"),
        (["--calibrated"], "likelihood-calibrated"),
        (["--calibrated", "--steps", "3"], "likelihood-calibrated-3-steps"),
        (["--ode", "--ode-steps", "2"], "likelihood-ode"),
        (["--weights", "ema-0.5"], "likelihood-ema-0.5"),
        (["--checkpoint", "4"], "likelihood-step-4"),
        (["--limit", "1"], "likelihood-first-1"),
        (["--steps", "3", "--weights", "model", "--limit", "1"], "likelihood-3-steps-model-first-1"),
    ],
)
def test_the_table_is_named_after_what_is_measured(run, flags, name, tmp_path, capsys):
    data = image_file(tmp_path, n=2)
    with calibrate(run):
        for extra, end in ([], ""), ([str(data)], "-images"):
            figures = figures_of(["likelihood", str(run), *extra, *flags], capsys)
            assert figures["table"] == str(run / f"{name}{end}.csv")
            assert len(table(run / f"{name}{end}.csv")) == figures["n"]


def test_replacing_a_table_that_was_not_named_is_said(run, tmp_path, capsys):
    command, target = ["likelihood", str(run), "--steps", "2"], run / "likelihood-2-steps.csv"
    said = f"replacing {target}"
    for command_again, expected in (
        (command, False),
        (command, True),
        ([*command, "--out", str(target)], False),
    ):
        assert main(command_again) == 0
        assert (said in capsys.readouterr().err.splitlines()) is expected


def test_replacing_a_curve_that_was_not_named_is_said(run, capsys):
    command = ["likelihood", str(run), "--per-timestep", "--steps", "4", "--weights", "ema-0.5"]
    ends = ".csv", "-timesteps.csv", "-timesteps.png"
    said = [f"replacing {run}/likelihood-4-steps-ema-0.5{end}" for end in ends]
    for expected in ([], said):
        assert main(command) == 0
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("replacing")] == expected


def test_other_data_have_a_table_of_their_own(run, tmp_path, capsys):
    figures = figures_of(["likelihood", str(run)], capsys)
    assert figures["table"] == str(run / "likelihood.csv")
    held_out = (run / "likelihood.csv").read_bytes()
    figures = figures_of(["likelihood", str(run), str(image_file(tmp_path))], capsys)
    assert figures["table"] == str(run / "likelihood-images.csv")
    assert (run / "likelihood.csv").read_bytes() == held_out
