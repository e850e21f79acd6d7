"""``perrin calibrate``: what it writes and reports, and what the other commands make of it."""

import csv
import json
import re
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
import torch

from chains import chain
from cli_helpers import TINY, TINY_MLP, error_of, figures_of, image_file, train, vector_file
from perrin import ModelMeanType, ModelVarType
from perrin.build import load_run, run_chain
from perrin.cli.calibrate import Fitted, better_kind
from perrin.cli.main import main
from perrin.data import split
from perrin.likelihood.calibration import Calibration, plan
from perrin.likelihood.costs import Levels, fitted_covariances, rules
from perrin.likelihood.statistics import collect
from perrin.training import RunFolder

FILES = ("calibration.json", "calibration.csv", "calibration.png")


@pytest.fixture(scope="module")
def figures(run):
    """What the command says with its defaults; the files that it leaves may be written over by other tests."""
    output = StringIO()
    with redirect_stdout(output):
        assert main(["calibrate", str(run), "--json"]) == 0
    saved = {name: (run / name).read_bytes() for name in FILES}
    return json.loads(output.getvalue()) | {"saved": saved}


def row(figures, variance, spacing, steps):
    key = {"variance": variance, "spacing": spacing, "steps": steps}
    (found,) = [cell for cell in figures["curve"] if key.items() <= cell.items()]
    return found


def test_it_leaves_a_calibration_a_table_and_a_plot(run, figures):
    assert [figures[key] for key in ("calibration", "table", "plot")] == [str(run / name) for name in FILES]
    assert figures["saved"]["calibration.png"].startswith(b"\x89PNG")
    saved = Calibration.from_json(figures["saved"]["calibration.json"])
    assert (saved.weights, saved.step, saved.num_timesteps, saved.levels) == ("ema-0.9", 4, 12, 256)
    assert (saved.images, figures["images"], figures["n"]) == (14, 14, 6)
    assert len(saved.paths) == 12
    assert figures["best_steps"] == saved.best_steps
    assert figures["timesteps"] == saved.timesteps()
    rows = list(csv.DictReader(StringIO(figures["saved"]["calibration.csv"].decode())))
    assert [float(r["bpd"]) for r in rows] == pytest.approx([c["bpd"] for c in figures["curve"]], rel=1e-6)
    assert list(rows[0]) == ["variance", "spacing", "steps", "bpd", "error_bpd"]


def test_every_variance_spacing_and_number_of_steps_is_compared(figures):
    found = {(cell["variance"], cell["spacing"], cell["steps"]) for cell in figures["curve"]}
    variances = ("fixed-small", "fixed-large", "learned", "analytic", "calibrated", "per-state")
    spacings = ("even", "quadratic", "dense head", "DP")
    assert found == {(v, s, k) for v in variances for s in spacings for k in (4, 8, 12)}
    assert len(figures["curve"]) == len(found)
    for variance in variances:
        whole = {row(figures, variance, spacing, 12)["bpd"] for spacing in spacings}
        assert len(whole) == 1
        error = row(figures, variance, "DP", 8)["bpd_se"]
        assert (error is None) == (variance in ("learned", "per-state"))


def test_the_calibrated_chain_measures_what_the_table_says(run, figures, capsys):
    (run / "calibration.json").write_bytes(figures["saved"]["calibration.json"])
    measured = {found["steps"]: found for found in figures["measured"]}
    assert set(measured) == {12, figures["best_steps"]}
    expected = row(figures, figures["kind"], "DP", 12)["bpd"]
    assert measured[12]["bpd"] == pytest.approx(expected, rel=2e-3)
    flags = ["--calibrated", "--steps", "12", "--exact", "--decoder-draws", "1"]
    again = figures_of(["likelihood", str(run), *flags], capsys)
    assert again["bpd"] == pytest.approx(measured[12]["bpd"], rel=1e-6)
    assert again["bpd_se"] == pytest.approx(measured[12]["bpd_se"], rel=1e-4)


def test_the_default_chain_has_the_best_number_of_steps(run, figures):
    (run / "calibration.json").write_bytes(figures["saved"]["calibration.json"])
    assert run_chain(load_run(run), calibrated=True).num_timesteps == figures["best_steps"]


def test_the_variance_for_each_state_is_taken_where_it_is_as_good_on_held_out_examples():
    """A network whose errors are as large as it says on the examples of the fit, and then the other way round."""
    diffusion = chain(ModelMeanType.START_X, ModelVarType.LEARNED_RANGE, num_timesteps=8, levels=17)
    x = torch.zeros(4, 1, 8, 8)
    size = torch.linspace(0.05, 0.6, 64).reshape(1, 1, 8, 8)

    def network(place):
        return lambda x_t, t: torch.cat([x + size * torch.sign(x_t), (2 * place - 1).expand_as(x_t)], 1)

    fit, same = (collect(diffusion, network(size), x, indices=range(i, i + 4)) for i in (0, 4))
    other = collect(diffusion, network(0.65 - size), x, indices=range(4, 8), widths=fit.widths)
    levels = Levels.of(diffusion)
    covariances = fitted_covariances(fit, levels)
    plans = {name: plan(fit, levels, rule) for name, rule in rules(covariances).items()}
    found = Fitted(4, fit, levels, covariances, plans)
    assert better_kind(found, same) == "per-state"
    assert better_kind(found, other) == "calibrated"


def test_people_see_the_table_and_that_it_is_for_the_bound(run, capsys):
    capsys.readouterr()
    assert main(["calibrate", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "n = 6 held-out examples (256 levels, predictions clipped)" in lines[0]
    assert lines[1].split() == ["variance", "spacing", "4", "8", "12"]
    assert len(lines[2].split()) == 5
    assert lines[2].startswith("fixed-small  even")
    assert any(re.search(r"steps, \d+ being best on the examples of the fit$", line) for line in lines)
    states = "learned, per-state, whose variance depends on the state: they have none"
    assert f"standard errors are in {run / 'calibration.csv'}, but for {states}" in lines
    assert any("optimises the bound, not the looks" in line for line in lines)
    assert any(
        line.endswith("measured on that chain") and "bits/dim with 12 calibrated" in line for line in lines
    )
    assert any("weights ema-0.9 of step 4, fitted to 14 examples" in line for line in lines)


def test_the_fit_takes_training_examples_spread_evenly(run, capsys, monkeypatch):
    import perrin.likelihood.statistics as statistics

    seen = []
    collect = statistics.collect

    def spy(*args, indices, **kwargs):
        seen.append(list(indices))
        return collect(*args, indices=indices, **kwargs)

    monkeypatch.setattr(statistics, "collect", spy)
    figures = figures_of(["calibrate", str(run), "--images", "7", "--limit", "2"], capsys)
    trained, held_out = (part.tolist() for part in split(20, 0.3))
    assert seen == [trained[::2], held_out[:2]]
    assert (figures["images"], figures["n"]) == (7, 2)
    seen.clear()
    own = run.parent / "images.npz"  # the run's own data, by name: what was held out stays so
    figures_of(["calibrate", str(run), str(own)], capsys)
    assert seen == [trained, held_out]
    seen.clear()
    (run.parent / "other").mkdir()
    other = image_file(run.parent / "other", n=5, seed=3)
    figures_of(["calibrate", str(run), str(other)], capsys)
    assert seen == [[0, 1, 2, 3, 4], held_out]


def test_the_figures_depend_on_the_seed_and_weights_but_not_on_the_batch_size(run, figures, capsys):
    other, seed, model = (
        figures_of(["calibrate", str(run), *flags], capsys)
        for flags in (
            ["--batch-size", "3"],
            ["--seed", "1"],
            ["--weights", "model", "--checkpoint", "4"],
        )
    )
    bpd = [np.array([cell["bpd"] for cell in f["curve"]]) for f in (figures, other, seed, model)]
    np.testing.assert_allclose(bpd[0], bpd[1], rtol=1e-3)
    assert not np.allclose(bpd[0], bpd[2], rtol=1e-4)
    assert not np.allclose(bpd[0], bpd[3], rtol=1e-4)
    assert model["weights"] == "model"
    line = error_of(["likelihood", str(run), "--calibrated", "--weights", "ema-0.5"], capsys)
    assert "is for weights model of step 4, not ema-0.5 of step 4" in line


def test_a_calibration_is_set_aside_for_another_one(run, figures, capsys):
    (run / "calibration.json").write_bytes(figures["saved"]["calibration.json"])
    for path in RunFolder.open(run).calibrations()[1:]:
        path.unlink()
    assert main(["calibrate", str(run), "--images", "7"]) == 0
    kept = RunFolder.open(run).calibrations()[1]
    assert re.fullmatch(r"calibration-[0-9a-f]{8}\.json", kept.name)
    assert kept.read_bytes() == figures["saved"]["calibration.json"]
    assert f"is kept as {kept}" in capsys.readouterr().err
    after = RunFolder.open(run).calibrations()
    assert main(["calibrate", str(run), "--images", "7"]) == 0  # the same once more
    assert RunFolder.open(run).calibrations() == after
    assert "is kept as" not in capsys.readouterr().err


def test_inspect_says_what_the_calibration_is_for(tmp_path, figures, capsys):
    data = image_file(tmp_path)
    run = train(data, tmp_path / "run", *TINY)
    assert figures_of(["inspect", str(run)], capsys)["calibration"] is None
    (run / "calibration.json").write_bytes(figures["saved"]["calibration.json"])
    best = figures["best_steps"]
    expected = {"weights": "ema-0.9", "step": 4, "best_steps": best, "stale": False}
    assert figures_of(["inspect", str(run)], capsys)["calibration"] == expected
    assert main(["inspect", str(run)]) == 0
    line = f"calibration  weights ema-0.9 of step 4, of the newest checkpoint; best with {best} steps"
    assert line in capsys.readouterr().out.splitlines()
    train(data, run, *TINY, "--steps", "5")
    assert figures_of(["inspect", str(run)], capsys)["calibration"] == expected | {"stale": True}
    assert main(["inspect", str(run)]) == 0
    assert "step 4, stale: not of the newest checkpoint" in capsys.readouterr().out
    (run / "calibration.json").write_text("{")
    assert main(["inspect", str(run)]) == 0
    output = capsys.readouterr()
    assert "calibration.json is damaged" in output.err
    assert "calibration  none" in output.out


def test_a_single_held_out_example_has_no_error(run, capsys):
    figures = figures_of(["calibrate", str(run), "--limit", "1"], capsys)
    assert [found["bpd_se"] for found in figures["measured"]] == [None] * len(figures["measured"])
    assert row(figures, "calibrated", "DP", 8)["bpd_se"] is None
    assert main(["calibrate", str(run), "--limit", "1"]) == 0
    assert "a single example has no standard errors" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images", "0"], "--images must be at least 1, got 0"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--weights", "best"], "weights must be one of ema-0.9, ema-0.5, model, got best"),
        (["--checkpoint", "5"], "no checkpoint of step 5"),
        (["--image"], "--images"),
    ],
)
def test_a_mistake_is_one_line(run, flags, message, capsys):
    assert message in error_of(["calibrate", str(run), *flags], capsys)


def test_data_that_do_not_fit_are_refused(run, tmp_path, capsys):
    data = image_file(tmp_path, size=4)
    line = error_of(["calibrate", str(run), str(data)], capsys)
    assert line == f"{data} does not fit the run {run}: shape must be (1, 8, 8), got (1, 4, 4)"


def test_a_conditional_model_is_told_the_classes(tmp_path, capsys):
    run = train(image_file(tmp_path), tmp_path / "run", *TINY, "--conditional")
    figures = figures_of(["calibrate", str(run)], capsys)
    assert figures["measured"][-1]["bpd"] > 0


@pytest.mark.parametrize("var", ["fixed-large", "learned"])
def test_vectors_and_other_variances_are_calibrated_too(tmp_path, var, capsys):
    run = train(vector_file(tmp_path), tmp_path / "run", *TINY_MLP, "--var-type", var)
    figures = figures_of(["calibrate", str(run)], capsys)
    fixed = var == "fixed-large"
    variances = {cell["variance"] for cell in figures["curve"]}
    assert ("per-state" in variances) == ("learned" in variances) == (not fixed)
    assert figures["levels"] is None
    assert not fixed or figures["kind"] == "calibrated"
    again = figures_of(["likelihood", str(run), "--calibrated", "--exact", "--decoder-draws", "1"], capsys)
    best = [found for found in figures["measured"] if found["steps"] == figures["best_steps"]]
    assert again["bpd"] == pytest.approx(best[0]["bpd"], rel=1e-5)


def test_a_network_of_the_mean_is_refused(tmp_path, capsys):
    run = train(image_file(tmp_path), tmp_path / "run", *TINY, "--mean-type", "previous-x")
    assert "predicts epsilon, x_0 or v, got previous-x" in error_of(["calibrate", str(run)], capsys)
    assert not (run / "calibration.json").exists()


def test_a_damaged_calibration_is_one_line_for_those_who_use_it(run, figures, capsys):
    file = run / "calibration.json"
    record = json.loads(figures["saved"]["calibration.json"])
    file.write_text(json.dumps(record | {"curve": []}))
    line = error_of(["likelihood", str(run), "--calibrated"], capsys)
    assert line.startswith(f"{file} is damaged")
