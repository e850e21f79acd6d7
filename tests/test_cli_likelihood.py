"""``perrin likelihood``: the figures, the chains and the curve over timesteps."""

import math

import numpy as np
import pytest
from PIL import Image

from cli_helpers import TINY, column, error_of, figures_of, image_file, measured, table, train
from perrin.cli.main import main
from perrin.data import split
from tiny_calibration import calibrate

PARTS = ("bpd", "prior_bpd", "vb_bpd", "decoder_bpd")


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """A chain with more terms than an estimate draws."""
    folder = tmp_path_factory.mktemp("long")
    return train(
        image_file(folder, n=40), folder / "run", *TINY, "--num-timesteps", "60", "--held-out", "0.8"
    )


# The figures


@pytest.mark.parametrize("flags", [[], ["--exact"]])
def test_the_figures_are_the_means_of_the_table(long_run, tmp_path, flags, capsys):
    figures, out = measured(long_run, tmp_path, capsys, *flags)
    rows = table(out)
    assert figures["table"] == str(out)
    assert [int(row["index"]) for row in rows] == split(40, 0.8)[1].tolist()
    assert [row["name"] for row in rows] == [row["index"] for row in rows]
    for key in PARTS:
        assert figures[key] == pytest.approx(column(out, key).mean(), rel=1e-6)
    bpd, error = column(out, "bpd"), column(out, "error_bpd")
    assert figures["bpd_se"] == pytest.approx(bpd.std(ddof=1) / 32**0.5, rel=1e-4)
    assert figures["bpd_mc_se"] == pytest.approx(np.sqrt((error**2).sum()) / 32, rel=1e-4)
    assert figures["bpd"] == pytest.approx(figures["prior_bpd"] + figures["vb_bpd"] + figures["decoder_bpd"])
    assert figures["n"] == 32
    assert figures["seconds"] > 0


@pytest.mark.parametrize("flags", [[], ["--exact"]])
def test_the_bands_add_up_to_the_sum_of_kl_terms(long_run, tmp_path, flags, capsys):
    figures, out = measured(long_run, tmp_path, capsys, *flags)
    assert len(figures["bands"]) > 4
    by_row = sum(column(out, band["name"]) for band in figures["bands"])
    np.testing.assert_allclose(by_row, column(out, "vb_bpd"), rtol=1e-6)
    for band in figures["bands"]:
        values = column(out, band["name"])
        assert band["bpd"] == pytest.approx(values.mean(), rel=1e-6, abs=1e-9)
        assert band["bpd_se"] == pytest.approx(values.std(ddof=1) / 32**0.5, rel=1e-4, abs=1e-9)
        assert band["drawn"] is True
    for part in ("prior", "decoder"):
        error = column(out, f"{part}_bpd").std(ddof=1) / 32**0.5
        assert figures[f"{part}_se"] == pytest.approx(error, rel=1e-4)


def test_a_band_that_no_draw_hit_has_no_error(long_run, tmp_path, capsys):
    command = ["--limit", "2", "--terms", "2"]
    figures, out = measured(long_run, tmp_path, capsys, *command)
    missed = [band for band in figures["bands"] if not band["drawn"]]
    assert len(figures["bands"]) - 4 <= len(missed) < len(figures["bands"])
    assert {(band["bpd"], band["bpd_se"]) for band in missed} == {(0, None)}
    assert all(band["bpd_se"] > 0 for band in figures["bands"] if band["drawn"])
    assert main(["likelihood", str(long_run), *command, "--out", str(out)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [" ".join(row[:-1]) for row in rows if row[-1] == "–"] == [band["name"] for band in missed]
    _, *shown = (row for row in rows if row[-1] == "share" or row[-1].endswith("%"))
    assert len(shown) == len(figures["bands"]) - len(missed) + 2
    assert all(row[-3] == "±" for row in shown)


def test_the_standard_error_is_at_least_the_monte_carlo_part(long_run, tmp_path, capsys):
    larger = []
    for seed in range(3):
        flags = "--limit", "2", "--terms", "2", "--seed", str(seed)
        figures, out = measured(long_run, tmp_path, capsys, *flags)
        spread = column(out, "bpd").std(ddof=1) / 2**0.5
        assert figures["bpd_se"] == pytest.approx(max(spread, figures["bpd_mc_se"]), rel=1e-4)
        larger.append(spread < figures["bpd_mc_se"])
    assert any(larger)


def test_the_estimate_agrees_with_all_terms_at_a_fraction_of_the_calls(long_run, tmp_path, capsys):
    few, _ = measured(long_run, tmp_path, capsys)
    every, _ = measured(long_run, tmp_path, capsys, "--exact")
    assert abs(few["bpd"] - every["bpd"]) < 4 * math.hypot(few["bpd_mc_se"], every["bpd_mc_se"])
    assert abs(few["vb_bpd"] / every["vb_bpd"] - 1) < 0.3
    assert (few["terms"], few["decoder_draws"], few["network_calls"]) == (16, 4, 20)
    assert (every["terms"], every["decoder_draws"], every["network_calls"]) == (None, 4, 63)
    assert every["network_calls_total"] == 32 * 63
    pilot = few["network_calls_total"] - 32 * 20
    assert 0 < pilot <= 8 * 48


def test_a_chain_of_few_terms_is_evaluated_whole(run, tmp_path, capsys):
    figures, _ = measured(run, tmp_path, capsys)
    assert (figures["num_timesteps"], figures["terms"], figures["network_calls"]) == (12, None, 11 + 4)
    assert figures["network_calls_total"] == 6 * 15
    assert (figures["levels"], figures["weights"], figures["clip_denoised"]) == (256, "ema-0.9", True)
    fewer, _ = measured(run, tmp_path, capsys, "--terms", "3", "--decoder-draws", "2")
    assert (fewer["terms"], fewer["network_calls"]) == (3, 5)


def test_a_part_that_is_drawn_once_has_no_known_error(run, tmp_path, capsys):
    figures, out = measured(run, tmp_path, capsys, "--decoder-draws", "1")
    assert figures["bpd_mc_se"] is None
    assert {row["error_bpd"] for row in table(out)} == {""}
    assert main(["likelihood", str(run), "--decoder-draws", "1", "--out", str(out)]) == 0
    assert "the Monte-Carlo part is unknown (--decoder-draws 2 tells it)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (["--terms", "1"], " (--terms 2 tells it)"),
        (["--terms", "1", "--decoder-draws", "1"], " (--terms 2 --decoder-draws 2 tells it)"),
        (["--steps", "2"], ""),
    ],
)
def test_what_would_tell_the_monte_carlo_part_is_said_where_it_is_not_known(
    run, flags, remedy, tmp_path, capsys
):
    assert main(["likelihood", str(run), "--out", str(tmp_path / "table.csv"), *flags]) == 0
    assert f"the Monte-Carlo part is unknown{remedy})" in capsys.readouterr().out
    if remedy:
        told = remedy.removeprefix(" (").removesuffix(" tells it)").split()
        assert measured(run, tmp_path, capsys, *told)[0]["bpd_mc_se"] > 0


@pytest.mark.parametrize("flags", [[], ["--exact"]])
def test_the_rows_do_not_depend_on_batch_size_or_limit_but_on_the_seed(long_run, tmp_path, flags, capsys):
    names = "one", "many", "few", "seed"
    files = [tmp_path / f"{name}.csv" for name in names]
    changes = ["--batch-size", "5"], [], ["--limit", "3"], ["--seed", "1"]
    for file, change in zip(files, changes, strict=True):
        assert main(["likelihood", str(long_run), "--out", str(file), *flags, *change]) == 0
    one, many, few, seed = (column(file, "bpd") for file in files)
    np.testing.assert_allclose(one, many, rtol=1e-4)
    np.testing.assert_allclose(few, many[:3], rtol=1e-4)
    assert not np.allclose(one, seed, rtol=1e-4)


def test_people_are_told_the_parts_and_how_it_was_measured(long_run, tmp_path, capsys):
    out = tmp_path / "table.csv"
    assert main(["likelihood", str(long_run), "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert "bits/dim (mean and standard error of n = 32; the Monte-Carlo part is 0." in output
    assert "variational bound, T = 60; 256 levels, predictions clipped to [-1, 1]" in output
    assert "weights ema-0.9 of step 4; seed 0; " in output
    assert "20 network calls per example: estimated from 16 KL terms, 4 decoder draws; " in output
    shares = [float(line.split()[-1].rstrip("%")) for line in output.splitlines() if line.endswith("%")]
    assert len(shares) > 6
    assert sum(shares) == pytest.approx(100, abs=1)
    assert f"one row per example: {out}" in output
    assert main(["likelihood", str(long_run), "--out", str(out), "--exact"]) == 0
    assert "63 network calls per example: all 59 KL terms, 4 decoder draws" in capsys.readouterr().out


def test_other_data_are_measured_in_their_order(run, tmp_path, capsys):
    data = image_file(tmp_path, n=7, seed=1)
    figures, out = measured(run, tmp_path, capsys, str(data), "--limit", "5")
    assert figures["n"] == 5
    assert [row["index"] for row in table(out)] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("flags", [[], ["--ode", "--ode-steps", "2"]])
def test_examples_that_the_run_was_trained_on_are_said(run, flags, tmp_path, capsys):
    data = str(run.parent / "images.npz")
    figures, out = measured(run, tmp_path, capsys, data, *flags)
    assert figures["trained_on"] == 14
    assert main(["likelihood", str(run), data, "--out", str(out), *flags]) == 0
    assert "the run was trained on 14 of these 20 examples, which flatters it" in capsys.readouterr().out
    assert measured(run, tmp_path, capsys, *flags)[0]["trained_on"] == 0
    other = str(image_file(tmp_path, n=4, seed=1))
    assert measured(run, tmp_path, capsys, other, *flags)[0]["trained_on"] is None
    assert main(["likelihood", str(run), other, "--out", str(out), *flags]) == 0
    assert "trained on" not in capsys.readouterr().out


def test_a_single_example_has_the_monte_carlo_error_alone(run, tmp_path, capsys):
    figures, out = measured(run, tmp_path, capsys, "--limit", "1")
    assert figures["bpd_se"] is None
    assert {band["bpd_se"] for band in figures["bands"]} == {None}
    assert figures["bpd_mc_se"] > 0
    assert (figures["prior_se"], figures["decoder_se"]) == (None, None)
    assert main(["likelihood", str(run), "--limit", "1", "--out", str(out)]) == 0
    output = capsys.readouterr()
    error = f"± {figures['bpd_mc_se']:.3f} bits/dim (n = 1: the error is the Monte-Carlo part alone)"
    assert error in output.out
    assert "measuring 1 example with weights" in output.err
    assert main(["likelihood", str(run), "--limit", "1", "--decoder-draws", "1", "--out", str(out)]) == 0
    assert "± unknown bits/dim (mean and standard error of n = 1;" in capsys.readouterr().out


def test_clipping_and_weights_matter_and_are_stated(run, tmp_path, capsys):
    plain, out = measured(run, tmp_path, capsys)
    loose, _ = measured(run, tmp_path, capsys, "--no-clip")
    assert loose["clip_denoised"] is False
    assert loose["bpd"] != plain["bpd"]
    assert main(["likelihood", str(run), "--no-clip", "--out", str(out)]) == 0
    assert "predictions not clipped" in capsys.readouterr().out
    last, _ = measured(run, tmp_path, capsys, "--weights", "model", "--checkpoint", "4")
    assert (last["weights"], last["step"]) == ("model", 4)
    assert last["bpd"] != plain["bpd"]


# Chains


def test_a_shorter_chain_is_another_bound(run, tmp_path, capsys):
    figures, out = measured(run, tmp_path, capsys, "--steps", "5")
    assert (figures["num_timesteps"], figures["chain"], figures["network_calls"]) == (
        5,
        "5 of T = 12 steps",
        4 + 4,
    )
    assert figures["bpd"] > measured(run, tmp_path, capsys)[0]["bpd"]
    assert main(["likelihood", str(run), "--steps", "5", "--out", str(out)]) == 0
    assert "variational bound, 5 of T = 12 steps; 256 levels" in capsys.readouterr().out


def test_a_chain_of_one_step_is_a_decoder(run, tmp_path, capsys):
    figures, _ = measured(run, tmp_path, capsys, "--steps", "1")
    assert (figures["vb_bpd"], figures["network_calls"]) == (0, 4)


def test_a_calibrated_chain_has_its_own_timesteps_and_variances(run, tmp_path, capsys):
    line = error_of(["likelihood", str(run), "--calibrated"], capsys)
    assert line == f"{run} is not calibrated: `perrin calibrate {run}` does it"
    with calibrate(run):
        best, _ = measured(run, tmp_path, capsys, "--calibrated")
        assert (best["num_timesteps"], best["chain"]) == (2, "2 of T = 12 steps, calibrated")
        three, _ = measured(run, tmp_path, capsys, "--calibrated", "--steps", "3")
        assert (three["num_timesteps"], three["calibrated"]) == (3, True)
        assert three["bpd"] != measured(run, tmp_path, capsys, "--steps", "3")[0]["bpd"]
        line = error_of(["likelihood", str(run), "--calibrated", "--steps", "4"], capsys)
        assert line == "a calibrated chain has from 1 to 3 steps, got 4"
        line = error_of(["likelihood", str(run), "--calibrated", "--weights", "model"], capsys)
        assert "calibration.json is for weights ema-0.9 of step 4, not model of step 4" in line


# By timestep


def test_the_curve_holds_every_term(long_run, tmp_path, capsys):
    figures, out = measured(long_run, tmp_path, capsys, "--per-timestep", "--batch-size", "10")
    curve, plot = tmp_path / "table-timesteps.csv", tmp_path / "table-timesteps.png"
    assert figures["curve"] == [str(curve), str(plot)]
    assert figures["terms"] is None
    rows = table(curve)
    assert list(rows[0]) == ["t", "timestep", "log_snr", "bpd", "error_bpd"]
    assert column(curve, "t").tolist() == column(curve, "timestep").tolist() == list(range(60))
    assert column(curve, "bpd")[0] == pytest.approx(figures["decoder_bpd"], rel=1e-6)
    assert column(curve, "bpd")[1:].sum() == pytest.approx(figures["vb_bpd"], rel=1e-6)
    assert (np.diff(column(curve, "log_snr")) < 0).all()
    decoder = column(out, "decoder_bpd")
    assert column(curve, "error_bpd")[0] == pytest.approx(decoder.std(ddof=1) / 32**0.5, rel=1e-4)
    band = next(band for band in figures["bands"] if band["name"] == "log-SNR 2 to 4")
    inside = (column(curve, "log_snr") >= 2) & (column(curve, "log_snr") < 4)
    assert column(curve, "bpd")[inside].sum() == pytest.approx(band["bpd"], rel=1e-6)
    with Image.open(plot) as image:
        assert image.width > image.height > 300


def test_the_curve_of_a_shorter_chain_names_the_networks_timesteps(run, tmp_path, capsys):
    flags = "--per-timestep", "--steps", "3", "--limit", "1"
    assert main(["likelihood", str(run), *flags, "--out", str(tmp_path / "table.csv")]) == 0
    curve, plot = tmp_path / "table-timesteps.csv", tmp_path / "table-timesteps.png"
    assert f"by timestep: {curve}, {plot}" in capsys.readouterr().out
    assert column(curve, "timestep").tolist() == [0, 6, 11]
    assert {row["error_bpd"] for row in table(curve)} == {""}


def test_a_curve_overwrites_only_a_curve(run, tmp_path, capsys):
    command = ["likelihood", str(run), "--per-timestep", "--steps", "2", "--out", str(tmp_path / "table.csv")]
    assert main(command) == 0
    assert main(command) == 0
    plot = tmp_path / "table-timesteps.png"
    Image.new("L", (2, 2)).save(plot)
    assert error_of(command, capsys) == f"{plot} exists and is no such plot: choose another --out"
    plot.write_text("mine")
    assert "is no such plot" in error_of(command, capsys)
    plot.unlink()
    (tmp_path / "table-timesteps.csv").write_text("mine\n")
    assert "is no such table (t, timestep, log_snr, bpd, error_bpd, ...)" in error_of(command, capsys)


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
