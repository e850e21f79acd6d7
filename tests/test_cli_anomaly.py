"""``perrin anomaly``: scores of a run's examples, from the command line."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli_helpers import TINY, TINY_MLP, error_of, figures_of, image_file, table, train, vector_file
from perrin.build import load_run
from perrin.cli.anomaly import Part, Scores, band_names, group, reference
from perrin.cli.main import main
from perrin.cli.measure import Subject
from perrin.data import split
from perrin.evaluation.anomaly import visited
from perrin.evaluation.auroc import auroc, is_plot


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anomaly")
    return train(image_file(folder, n=60), folder / "run", *TINY, "--held-out", "0.3")


def numbers(rows, name):
    return torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)


def dark_file(folder, n=15):
    """Images of the tiny run's shape whose values are all low."""
    path = folder / "dark.npz"
    images = np.random.default_rng(5).integers(0, 256, (n, 8, 8)) // 16
    np.savez(path, images=images.astype(np.uint8), labels=np.arange(n) % 3)
    return path


def test_each_example_has_a_row_and_the_figures_are_those_of_the_table(run, tmp_path, capsys):
    data = image_file(tmp_path, n=25, seed=1)
    figures = figures_of(["anomaly", str(run), str(data)], capsys)
    assert figures["table"] == str(run / "anomaly-images.csv")
    rows = table(Path(figures["table"]))
    assert [int(row["index"]) for row in rows] == list(range(25))
    assert [row["name"] for row in rows] == [str(i) for i in range(25)]
    assert {row["outside"] for row in rows} == {"0"}
    assert list(rows[0])[:6] == ["index", "name", "outside", "score", "p_value", "rough_bpd"]
    assert sum(name.startswith("z at t=") for name in rows[0]) == 10
    p, group = numbers(rows, "p_value"), figures["data"]
    assert group["n"] == 25
    assert group["score_median"] == pytest.approx(float(numbers(rows, "score").median()), rel=1e-6)
    rough = numbers(rows, "rough_bpd")
    assert group["rough_bpd_mean"] == pytest.approx(float(rough.mean()), rel=1e-6)
    assert group["rough_bpd_se"] == pytest.approx(float(rough.std()) / 5, rel=1e-5)
    assert p.min() >= figures["smallest_p"] == pytest.approx(1 / 19)  # 18 held-out examples
    assert (figures["fitted"], figures["ranked"], figures["network_calls"]) == (42, 18, 10)
    assert figures["network_calls_total"] == 10 * (42 + 18 + 25)
    assert (figures["weights"], figures["step"], figures["auroc"], figures["plot"]) == (
        "ema-0.9",
        4,
        None,
        None,
    )
    assert figures["log_snrs"] == sorted(figures["log_snrs"], reverse=True)


def test_data_known_to_be_outside_give_the_area_of_score_and_bound(run, tmp_path, capsys):
    data, dark, out = image_file(tmp_path, n=20, seed=1), dark_file(tmp_path), tmp_path / "table.csv"
    args = ["anomaly", str(run), str(data), "--outside", str(dark), "--out", str(out)]
    figures = figures_of(args, capsys)
    rows = table(out)
    for name, key in (("score", "auroc"), ("rough_bpd", "auroc_rough_bpd")):
        values = [numbers([row for row in rows if row["outside"] == side], name) for side in "01"]
        assert [len(group) for group in values] == [20, 15]
        assert figures[key] == pytest.approx(asdict(auroc(*values)), abs=1e-6)
    assert figures["auroc"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert figures["outside"]["n"] == 15
    plot = tmp_path / "table-groups.png"
    assert figures["plot"] == str(plot)
    assert is_plot(plot)
    assert main(args) == 0
    output = capsys.readouterr().out
    assert "AUROC 1.0000 [1.0000, 1.0000] of the score; " in output
    assert "of the rough bound (95% bootstrap intervals)" in output
    assert f"histograms: {plot}" in output


def test_a_share_below_a_level_that_no_p_value_reaches_is_unknown(run, tmp_path, capsys):
    data, out = str(image_file(tmp_path, n=90, seed=1)), tmp_path / "table.csv"
    args = ["anomaly", str(run), data, "--out", str(out)]
    for flags, smallest in (([], 1 / 19), (["--reference", data], 1 / 31)):
        figures = figures_of([*args, *flags], capsys)
        p, found = numbers(table(out), "p_value"), figures["data"]
        assert figures["smallest_p"] == pytest.approx(smallest)
        assert found["p_below_01"] is None
        reached = float((p < 0.05).double().mean()) if smallest < 0.05 else None
        assert found["p_below_05"] == (None if reached is None else pytest.approx(reached))


def test_a_share_below_a_level_is_that_of_the_table():
    p = torch.tensor([0.009, 0.01, 0.04, 0.05, 0.5], dtype=torch.float64)
    scores = Scores(Part("x", None, [0] * 5), p, p, p, p)
    assert [group(scores, at).p_below_01 for at in (0.0099, 0.01)] == [0.2, None]
    assert [group(scores, at).p_below_05 for at in (0.04, 0.05)] == [0.6, None]


def test_scored_examples_that_were_fitted_are_said(run, tmp_path, capsys):
    args = ["anomaly", str(run), str(run.parent / "images.npz"), "--reference-size", "30", "--limit", "50"]
    trained = split(60, 0.3)[0]
    found = figures_of(args, capsys)["data"]
    fitted = {int(trained[place * 42 // 30]) for place in range(30)}
    assert found["fitted"] == len(fitted & set(range(50)))
    assert found["trained_on"] == int((trained < 50).sum())
    assert main(args) == 0
    seen = found["trained_on"], found["fitted"]
    warning = "the run was trained on {} and the reference fitted to {}: their p-values do not hold"
    assert warning.format(*seen) in capsys.readouterr().out


def test_scored_examples_of_the_reference_were_fitted_though_the_run_may_not_know_them(run, tmp_path, capsys):
    data = str(image_file(tmp_path, n=30, seed=1))
    args = ["anomaly", str(run), data, "--reference", data]
    found = figures_of(args, capsys)["data"]
    assert (found["fitted"], found["trained_on"]) == (20, None)
    assert main(args) == 0
    assert "of these 30 examples the reference fitted to 20: their p-values" in capsys.readouterr().out


def test_scored_examples_of_other_data_were_not_fitted(run, tmp_path, capsys):
    args = ["anomaly", str(run), str(image_file(tmp_path, n=60, seed=1))]
    found = figures_of(args, capsys)["data"]
    assert (found["fitted"], found["trained_on"]) == (0, None)
    assert main(args) == 0
    assert "do not hold" not in capsys.readouterr().out


def test_people_are_told_what_was_compared_and_how(run, tmp_path, capsys):
    assert main(["anomaly", str(run), str(image_file(tmp_path)), "--limit", "5"]) == 0
    output = capsys.readouterr().out
    assert "images.npz: n = 5, median score " in output
    assert "p < 0.01 for –, p < 0.05 for –, rough bound " in output
    assert "fitted to 42 examples, p-values among 18 others, smallest possible p 0.053" in output
    assert "biased: `perrin likelihood` is the number" in output
    assert "weights ema-0.9 of step 4; 10 network calls per example; " in output
    assert "it is no anomaly score" in output
    assert "AUROC" not in output


def test_a_single_example_has_no_standard_error_and_no_plural(run, tmp_path, capsys):
    args = ["anomaly", str(run), str(image_file(tmp_path)), "--limit", "1"]
    assert figures_of(args, capsys)["data"]["rough_bpd_se"] is None
    assert main(args) == 0
    output = capsys.readouterr()
    assert "scoring 1 example against 42 + 18 of " in output.err
    assert " ± unknown bits/dim" in output.out


def test_rows_depend_on_the_seed_and_not_on_the_batch_size(run, tmp_path):
    data = image_file(tmp_path, seed=1)
    found = []
    for name, flags in (("one", ["--batch-size", "7"]), ("many", []), ("seed", ["--seed", "1"])):
        out = tmp_path / f"{name}.csv"
        assert main(["anomaly", str(run), str(data), "--out", str(out), *flags]) == 0
        found.append(numbers(table(out), "score"))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=0)
    assert not torch.allclose(found[1], found[2], rtol=1e-3)


def test_other_reference_data_take_the_place_of_the_run_s_own(run, tmp_path, capsys):
    dark, out = dark_file(tmp_path, n=90), tmp_path / "table.csv"
    own = figures_of(["anomaly", str(run), str(dark), "--out", str(out)], capsys)
    other = figures_of(
        [
            "anomaly",
            str(run),
            str(dark),
            "--reference",
            str(dark),
            "--reference-size",
            "50",
            "--out",
            str(out),
        ],
        capsys,
    )
    assert (other["fitted"], other["ranked"], other["reference"]) == (50, 25, str(dark))
    assert own["data"]["score_median"] > 3 * other["data"]["score_median"]


def test_the_reference_is_fitted_to_training_examples_and_ranks_held_out_ones(run):
    model = Subject.load(run, weights=None, checkpoint=None, steps=None, calibrated=False, device="cpu")
    fitted, ranked = reference(model, None, 1000)
    trained, held_out = split(60, 0.3)
    assert (fitted.indices, ranked.indices) == (trained.tolist(), held_out.tolist())
    few = reference(model, None, 20)
    assert [len(part.indices) for part in few] == [20, 10]
    assert set(few[0].indices) < set(trained.tolist())


def test_bands_of_nearly_equal_noise_have_columns_of_their_own():
    assert band_names([0, 1], [9.0, 8.99]) == ["z at t=0, log-SNR 9.0", "z at t=1, log-SNR 9.0"]


def test_vectors_are_scored_and_written_as_parquet(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    from pyarrow.parquet import read_table

    run = train(vector_file(tmp_path), tmp_path / "run", *TINY_MLP, "--held-out", "0.4")
    out = tmp_path / "table.parquet"
    figures = figures_of(["anomaly", str(run), str(tmp_path / "vectors.npy"), "--out", str(out)], capsys)
    assert (figures["fitted"], figures["ranked"]) == (12, 8)
    assert read_table(out).num_rows == 20
    assert figures["network_calls"] == len(visited(load_run(run).diffusion)) == 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--reference-size", "15"], "--reference-size must be at least 16, got 15"),
        (["--weights", "best"], "weights must be one of ema-0.9, ema-0.5, model, got best"),
        (["--checkpoint", "3"], "has no checkpoint of step 3, only of 4"),
        (["--out", "x.txt"], "must end in .csv or .parquet, got x.txt"),
        (["--outside", "nowhere.npz"], "nowhere.npz: no such file or folder"),
        (["--reference", "nowhere.npz"], "nowhere.npz: no such file or folder"),
        (["--refrence", "x"], "perhaps you meant --reference"),
    ],
)
def test_a_mistake_is_one_line(run, flags, message, tmp_path, capsys):
    assert message in error_of(["anomaly", str(run), str(image_file(tmp_path)), *flags], capsys)


def _array(folder, values):
    np.save(folder / "values.npy", values)
    return folder / "values.npy"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: image_file(folder, size=4), "shape must be (1, 8, 8), got (1, 4, 4)"),
        (vector_file, "shape must be (1, 8, 8), got (3,)"),
        (
            lambda folder: _array(folder, np.zeros((3, 8, 8, 3), np.uint8)),
            "shape must be (1, 8, 8), got (3, 8, 8)",
        ),
        (lambda folder: _array(folder, np.zeros((3, 8, 8), np.float32)), "levels must be 256, got None"),
        (lambda folder: _array(folder, np.zeros((0, 8, 8), np.uint8)), "values.npy"),
        (lambda folder: _array(folder, np.full((3, 8, 8), np.nan, np.float32)), "values.npy"),
    ],
)
@pytest.mark.parametrize("place", ["data", "outside", "reference"])
def test_data_that_do_not_fit_are_refused_wherever_they_stand(run, make, message, place, tmp_path, capsys):
    wrong = str(make(tmp_path))
    (tmp_path / "right").mkdir()
    right = str(image_file(tmp_path / "right"))
    args = [wrong] if place == "data" else [right, f"--{place}", wrong]
    assert message in error_of(["anomaly", str(run), *args], capsys)


def test_a_reference_that_is_too_small_is_refused(run, tmp_path, capsys):
    data = str(image_file(tmp_path, n=12))
    line = error_of(["anomaly", str(run), data, "--reference", data], capsys)
    assert line == "at least 8 reference examples to rank among are needed, got 4"


def test_a_file_that_is_no_table_of_scores_is_not_overwritten(run, tmp_path, capsys):
    out = tmp_path / "mine.csv"
    out.write_text("mine\n")
    args = ["anomaly", str(run), str(image_file(tmp_path)), "--out", str(out)]
    assert "is no such table" in error_of(args, capsys)
    assert out.read_text() == "mine\n"


def test_a_picture_that_is_no_plot_of_scores_is_not_overwritten(run, tmp_path, capsys):
    mine, data = tmp_path / "table-groups.png", str(image_file(tmp_path))
    Image.new("L", (2, 2)).save(mine)
    before = mine.read_bytes()
    args = ["anomaly", str(run), data, "--out", str(tmp_path / "table.csv")]
    line = error_of([*args, "--outside", data], capsys)
    assert line == f"{mine} exists and is no such plot: choose another --out"
    assert not (tmp_path / "table.csv").exists()
    assert main(args) == 0  # which draws nothing
    assert mine.read_bytes() == before


def test_what_replaces_earlier_results_by_default_says_so(run, tmp_path, capsys):
    data, results = str(image_file(tmp_path).rename(tmp_path / "twice.npz")), run / "anomaly-first-3-twice"
    args = ["anomaly", str(run), data, "--outside", data, "--limit", "3"]
    lines = [f"replacing {results}.csv", f"replacing {results}-groups.png"]
    told = []
    for flags in ([], [], ["--out", f"{results}.csv"]):
        assert main([*args, *flags]) == 0
        told.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("replacing")])
    assert told == [[], lines, []]


def test_a_conditional_model_needs_the_classes_of_all_data(tmp_path, capsys):
    data = image_file(tmp_path, n=60)
    run = train(data, tmp_path / "run", *TINY, "--conditional", "--held-out", "0.3")
    assert figures_of(["anomaly", str(run), str(data)], capsys)["data"]["n"] == 60
    unlabelled = _array(tmp_path, np.load(data)["images"])
    line = error_of(["anomaly", str(run), str(data), "--outside", str(unlabelled)], capsys)
    assert line == f"{unlabelled} has no classes, which the conditional model needs"
