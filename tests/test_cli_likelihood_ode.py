"""``perrin likelihood --ode``: the figures by the probability-flow ODE."""

import numpy as np
import pytest

from cli_helpers import TINY_MLP, column, error_of, measured, train, vector_file
from perrin.cli.main import main
from perrin.cli.progress import Bar

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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run whose network knows whole timesteps only."""
    folder = tmp_path_factory.mktemp("whole")
    return train(vector_file(folder), folder / "run", *TINY_MLP, "--mean-type", "previous-x")


def test_a_network_of_whole_timesteps_is_measured_at_all_of_them(whole, tmp_path, capsys):
    figures, _ = measured(whole, tmp_path, capsys, "--ode")
    assert figures["solver"] == "heun at the run's own timesteps"
    assert figures["network_calls"] == 2 * 11 + 1


@pytest.mark.parametrize("flags", [["--ode-steps", "6"], ["--solver", "adaptive"]])
def test_a_network_of_whole_timesteps_is_refused_others_before_measuring(whole, flags, capsys):
    line = error_of(["likelihood", str(whole), "--ode", *flags], capsys)
    assert line.endswith(f"knows whole timesteps only: expected heun at all of them, got {' '.join(flags)}")
    assert not (whole / "likelihood-ode.csv").exists()


@pytest.mark.parametrize(
    ("flags", "total", "parts"),
    [
        (["--ode-steps", "6", "--draws", "2"], 6 * 2 * 13, 2 * 2 * 13),
        (["--solver", "adaptive", "--tolerance", "0.1"], 6, 2),
    ],
)
def test_the_bar_moves_with_every_call_of_heun(run, flags, total, parts, tmp_path, monkeypatch):
    bars = []

    class Seen(Bar):
        def __init__(self, label, total):
            super().__init__(label, total)
            self.total, self.advances = total, []
            bars.append(self)

        def advance(self, amount=1.0):
            self.advances.append(amount)

    monkeypatch.setattr("perrin.cli.progress.Bar", Seen)
    out = str(tmp_path / "table.csv")
    assert main(["likelihood", str(run), "--ode", "--batch-size", "3", "--out", out, *flags]) == 0
    (bar,) = bars
    assert (bar.total, sum(bar.advances), len(bar.advances)) == (total, total, parts)
