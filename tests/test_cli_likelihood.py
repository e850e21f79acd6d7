"""``perrin likelihood`` and ``perrin inspect``: the figures of a run."""

import csv
import math

import numpy as np
import pytest
from PIL import Image

from cli_helpers import TINY, TINY_MLP, error_of, figures_of, image_file, train, vector_file
from perrin.cli.main import main
from perrin.data import split
from tiny_calibration import calibrate

PARTS = ("bpd", "prior_bpd", "vb_bpd", "decoder_bpd")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("likelihood")
    return train(image_file(folder), folder / "run", *TINY, "--held-out", "0.3")


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """A chain with more terms than an estimate draws."""
    folder = tmp_path_factory.mktemp("long")
    return train(
        image_file(folder, n=40), folder / "run", *TINY, "--num-timesteps", "60", "--held-out", "0.8"
    )


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column(path, name):
    return np.array([float(row[name]) for row in table(path)])


def measured(run, tmp_path, capsys, *flags, name="table.csv"):
    out = tmp_path / name
    return figures_of(["likelihood", str(run), "--out", str(out), *flags], capsys), out


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


# The ODE


ODE = ("--ode", "--ode-steps", "6")


def test_the_ode_is_another_labelled_number(run, tmp_path, capsys):
    figures, out = measured(run, tmp_path, capsys, *ODE)
    assert "bpd" not in figures
    values = column(out, "bpd")
    assert figures["ode_bpd"] == pytest.approx(values.mean(), rel=1e-6)
    assert figures["ode_bpd_se"] == pytest.approx(values.std(ddof=1) / 6**0.5, rel=1e-4)
    assert (figures["dequantization"], figures["draws"], figures["probes"]) == ("truncated-normal", 1, 1)
    assert (figures["network_calls"], figures["vector_jacobian_products"]) == (13, 7)
    assert (figures["solver"], figures["clip_denoised"]) == ("heun with 6 steps", False)
    assert figures["ode_bpd_mc_se"] is None
    assert main(["likelihood", str(run), *ODE, "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert (
        "probability-flow ODE, bound with truncated-normal dequantization, 1 draw; not the variational bound"
        in output
    )
    assert "heun with 6 steps, 1 Rademacher probe; density at sigma/alpha = 0." in output
    assert "the Monte-Carlo part is unknown (--draws 2 tells it)" in output


def test_draws_and_probes_of_the_ode_give_an_error(run, tmp_path, capsys):
    figures, out = measured(run, tmp_path, capsys, *ODE, "--draws", "2", "--probes", "3")
    assert (figures["draws"], figures["probes"], figures["vector_jacobian_products"]) == (2, 3, 2 * 3 * 7)
    error = column(out, "error_bpd")
    assert figures["ode_bpd_mc_se"] == pytest.approx(np.sqrt((error**2).sum()) / 6, rel=1e-4)
    assert figures["ode_bpd_se"] >= figures["ode_bpd_mc_se"]
    assert main(["likelihood", str(run), *ODE, "--draws", "2", "--probes", "3", "--out", str(out)]) == 0
    assert (
        "2 draws; not the variational bound\nheun with 6 steps, 3 Rademacher probes"
        in capsys.readouterr().out
    )


def test_the_rows_of_the_ode_do_not_depend_on_the_batch_size_but_on_the_seed(run, tmp_path):
    files = [tmp_path / f"{name}.csv" for name in ("one", "many", "seed")]
    for file, flags in zip(files, (["--batch-size", "4"], [], ["--seed", "1"]), strict=True):
        assert main(["likelihood", str(run), *ODE, "--out", str(file), *flags]) == 0
    one, many, seed = (column(file, "bpd") for file in files)
    np.testing.assert_allclose(one, many, rtol=1e-4)
    assert not np.allclose(one, seed, rtol=1e-4)


def test_the_dequantization_and_the_exact_trace_are_choices(run, tmp_path, capsys):
    normal, _ = measured(run, tmp_path, capsys, *ODE, "--limit", "2", "--exact-trace")
    uniform, _ = measured(run, tmp_path, capsys, *ODE, "--limit", "2", "--dequantization", "uniform")
    assert (normal["probes"], normal["vector_jacobian_products"]) == (0, 64 * 7)
    assert uniform["dequantization"] == "uniform"
    assert uniform["ode_bpd"] != normal["ode_bpd"]


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    return train(
        vector_file(folder), folder / "run", *TINY_MLP, "--steps", "50", "--lr", "0.05", "--ema", "0.9"
    )


def test_the_adaptive_solver_keeps_its_tolerance(vectors, tmp_path, capsys):
    flags = "--ode", "--solver", "adaptive", "--exact-trace"
    loose, _ = measured(vectors, tmp_path, capsys, *flags)
    tight, _ = measured(vectors, tmp_path, capsys, *flags, "--tolerance", "1e-8")
    assert loose["solver"] == "adaptive with tolerance 0.0001"
    assert tight["solver"] == "adaptive with tolerance 1e-08"
    assert tight["network_calls"] > loose["network_calls"]
    assert tight["ode_bpd"] == pytest.approx(loose["ode_bpd"], abs=2e-3)
    even, _ = measured(vectors, tmp_path, capsys, "--ode", "--exact-trace")
    assert even["network_calls"] == 201
    assert tight["ode_bpd"] == pytest.approx(even["ode_bpd"], abs=5e-3)


def test_continuous_data_have_a_density_without_dequantization(vectors, tmp_path, capsys):
    figures, out = measured(vectors, tmp_path, capsys, *ODE)
    assert (figures["dequantization"], figures["levels"]) == ("none", None)
    assert main(["likelihood", str(vectors), *ODE, "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert "probability-flow ODE, log density, 1 draw" in output
    assert "the Monte-Carlo part is unknown (--probes 2 tells it)" in output
    probed, _ = measured(vectors, tmp_path, capsys, *ODE, "--probes", "2")
    assert probed["ode_bpd_mc_se"] > 0
    for flag in ("--dequantization=uniform", "--draws=2"):
        line = error_of(["likelihood", str(vectors), *ODE, flag], capsys)
        assert line == f"{flag.split('=')[0]} is for data with levels, these are continuous"
    bound, _ = measured(vectors, tmp_path, capsys)
    assert bound["levels"] is None
    assert main(["likelihood", str(vectors), "--out", str(out)]) == 0
    assert "continuous data" in capsys.readouterr().out


def test_the_exact_trace_of_many_dimensions_is_refused(tmp_path, capsys):
    np.save(tmp_path / "wide.npy", np.zeros((4, 1025), np.float32))
    run = train(tmp_path / "wide.npy", tmp_path / "run", *TINY_MLP)
    line = error_of(["likelihood", str(run), "--ode", "--exact-trace"], capsys)
    assert line == "--exact-trace is for at most 1024 dimensions, the data have 1025"


# Mistakes


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


# perrin inspect


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


# Tables


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
    ],
)
def test_the_table_is_named_after_what_is_measured(run, flags, name, tmp_path, capsys):
    data = image_file(tmp_path, n=2)
    with calibrate(run):
        for extra, end in ([], ""), ([str(data)], "-images"):
            figures = figures_of(["likelihood", str(run), *extra, *flags, "--limit", "1"], capsys)
            assert figures["table"] == str(run / f"{name}{end}.csv")
            assert len(table(run / f"{name}{end}.csv")) == 1


def test_replacing_a_table_that_was_not_named_is_said(run, tmp_path, capsys):
    command, target = ["likelihood", str(run), "--limit", "1", "--steps", "2"], run / "likelihood-2-steps.csv"
    said = f"replacing {target}"
    for command_again, expected in (
        (command, False),
        (command, True),
        ([*command, "--out", str(target)], False),
    ):
        assert main(command_again) == 0
        assert (said in capsys.readouterr().err.splitlines()) is expected


def test_other_data_have_a_table_of_their_own(run, tmp_path, capsys):
    figures = figures_of(["likelihood", str(run)], capsys)
    assert figures["table"] == str(run / "likelihood.csv")
    held_out = (run / "likelihood.csv").read_bytes()
    figures = figures_of(["likelihood", str(run), str(image_file(tmp_path))], capsys)
    assert figures["table"] == str(run / "likelihood-images.csv")
    assert (run / "likelihood.csv").read_bytes() == held_out
