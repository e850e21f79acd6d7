"""``perrin compare``: paired differences of two bounds."""

import numpy as np
import pytest

from cli_helpers import TINY, error_of, figures_of, image_file, table, train
from perrin.cli.main import main
from perrin.data import split
from tiny_calibration import calibrate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def data(folder):
    return image_file(folder, n=30)


@pytest.fixture(scope="module")
def a(folder, data):
    flags = "--steps", "20", "--checkpoint-every", "10", "--lr", "0.01", "--held-out", "0.5"
    return train(data, folder / "a", *TINY, *flags)


@pytest.fixture(scope="module")
def b(folder, data):
    """The same data with a smaller held-out part, another seed and a longer training."""
    flags = "--steps", "30", "--lr", "0.01", "--held-out", "0.2", "--seed", "1"
    return train(data, folder / "b", *TINY, *flags)


@pytest.fixture(scope="module")
def longer(folder, data):
    """A chain with more terms than an estimate draws, of other examples."""
    (folder / "other").mkdir()
    other = image_file(folder / "other", n=30, seed=2)
    return train(other, folder / "longer", *TINY, "--num-timesteps", "60")


def compared(a, b, capsys, *flags):
    return figures_of(["compare", str(a), str(b), *map(str, flags)], capsys)


def likelihood(run, tmp_path, capsys, *flags):
    return figures_of(["likelihood", str(run), *map(str, flags), "--out", str(tmp_path / "own.csv")], capsys)


def test_the_difference_is_the_mean_of_the_pairs(a, b, data, tmp_path, capsys):
    out = tmp_path / "table.csv"
    figures = compared(a, b, capsys, data, "--out", out)
    rows = table(out)
    one, other, difference = (
        np.array([float(row[name]) for row in rows]) for name in ("bpd_a", "bpd_b", "difference")
    )
    np.testing.assert_allclose(difference, other - one, atol=1e-6)
    assert figures["difference"] == pytest.approx(difference.mean(), rel=1e-5)
    assert figures["difference_se"] == pytest.approx(difference.std(ddof=1) / 30**0.5, rel=1e-4)
    assert figures["unpaired_se"] == pytest.approx(
        np.sqrt((one.var(ddof=1) + other.var(ddof=1)) / 30), rel=1e-4
    )
    assert figures["ratio"] == pytest.approx(figures["unpaired_se"] / figures["difference_se"])
    assert (figures["n"], figures["table"]) == (30, str(out))
    assert [row["index"] for row in rows] == [row["name"] for row in rows] == [str(i) for i in range(30)]
    assert figures["a"]["bpd"] == pytest.approx(one.mean(), rel=1e-6)
    assert figures["network_calls_total"] == 2 * 30 * 15


@pytest.mark.parametrize("flags", [[], ["--steps", "5"]])
def test_the_totals_are_those_of_likelihood(a, data, tmp_path, flags, capsys):
    figures = compared(
        a, a, capsys, data, *(f"{flag}-b" if flag.startswith("--") else flag for flag in flags)
    )
    own = likelihood(a, tmp_path, capsys, data, *flags)
    assert figures["b"]["bpd"] == pytest.approx(own["bpd"], rel=1e-6)
    assert figures["b"]["bpd_se"] == pytest.approx(own["bpd_se"], rel=1e-6)


@pytest.mark.parametrize("flags", [[], ["--terms", "3"], ["--exact"]])
def test_a_run_does_not_differ_from_itself(a, flags, capsys):
    figures = compared(a, a, capsys, *flags)
    assert (figures["difference"], figures["difference_se"], figures["better"]) == (0, 0, None)
    assert figures["ratio"] is None
    assert figures["same_timesteps"] is True
    assert main(["compare", str(a), str(a), *flags]) == 0
    output = capsys.readouterr().out
    assert "B - A = +0.0000 ± 0.0000 bits/dim" in output
    assert "no difference beyond 2 standard errors" in output


@pytest.mark.parametrize("flags", [["--terms", "3"], ["--steps-a", "6", "--terms", "3"]])
def test_to_swap_the_two_negates_the_difference(a, b, data, flags, capsys):
    swapped = [{"--steps-a": "--steps-b"}.get(flag, flag) for flag in flags]
    forth, back = compared(a, b, capsys, data, *flags), compared(b, a, capsys, data, *swapped)
    assert forth["difference"] == pytest.approx(-back["difference"])
    assert forth["difference_se"] == pytest.approx(back["difference_se"])
    assert {forth["better"], back["better"]} in ({"a", "b"}, {None})


def test_pairing_reduces_the_error(a, data, capsys):
    figures = compared(a, a, capsys, data, "--weights-b", "model", "--terms", "4")
    assert figures["ratio"] > 3


def test_the_better_one_is_named_when_the_difference_is_clear(a, data, capsys):
    figures = compared(a, a, capsys, data, "--steps-b", "2")
    assert (figures["better"], figures["same_timesteps"]) == ("a", False)
    assert figures["difference"] > 2 * figures["difference_se"] > 0
    assert figures["b"]["chain"] == "2 of T = 12 steps"
    assert main(["compare", str(a), str(a), str(data), "--steps-b", "2"]) == 0
    output = capsys.readouterr().out
    assert "A is better: the difference exceeds 2 standard errors" in output
    assert "the same examples, and noise at each timestep for both; unpaired, the error" in output
    assert main(["compare", str(a), str(a), str(data), "--steps-a", "2"]) == 0
    assert "B is better" in capsys.readouterr().out


def test_a_shorter_chain_than_the_terms_is_whole(a, longer, data, capsys):
    figures = compared(a, longer, capsys, data, "--limit", "3")
    assert (figures["a"]["terms"], figures["b"]["terms"]) == (None, 16)
    assert (figures["a"]["network_calls"], figures["b"]["network_calls"]) == (15, 20)
    figures = compared(a, longer, capsys, data, "--limit", "3", "--terms", "50", "--decoder-draws", "1")
    assert (figures["a"]["terms"], figures["b"]["terms"]) == (None, 50)
    assert (figures["a"]["network_calls"], figures["b"]["network_calls"]) == (12, 51)
    line = error_of(["compare", str(a), str(longer), str(data), "--terms", "60"], capsys)
    assert line == "--terms must be from 1 to 59, the chain's KL terms, got 60"


def test_the_rows_do_not_depend_on_the_batch_size_but_on_the_seed(a, b, data, capsys):
    flags = data, "--terms", "3"
    one = compared(a, b, capsys, *flags)
    assert compared(a, b, capsys, *flags, "--batch-size", "7")["difference"] == pytest.approx(
        one["difference"], rel=1e-3
    )
    assert compared(a, b, capsys, *flags, "--seed", "1")["difference"] != one["difference"]
    loose = compared(a, b, capsys, *flags, "--no-clip")
    assert loose["difference"] != one["difference"]
    assert (one["clip_denoised"], loose["clip_denoised"]) == (True, False)


# Which two


def test_two_checkpoints_and_two_weights_of_one_run(a, capsys):
    figures = compared(a, a, capsys, "--checkpoint-a", "10", "--weights-a", "model")
    assert (figures["a"]["step"], figures["a"]["weights"]) == (10, "model")
    assert (figures["b"]["step"], figures["b"]["weights"]) == (20, "ema-0.9")
    figures = compared(a, a, capsys, "--checkpoint-b", "10", "--weights-b", "ema-0.5")
    assert (figures["b"]["step"], figures["b"]["weights"]) == (10, "ema-0.5")
    assert figures["difference"] != 0


def test_two_numbers_of_steps(a, capsys):
    figures = compared(a, a, capsys, "--steps-a", "3", "--steps-b", "4")
    assert (figures["a"]["num_timesteps"], figures["b"]["num_timesteps"]) == (3, 4)
    same = compared(a, a, capsys, "--steps-a", "3", "--steps-b", "3")
    assert (same["same_timesteps"], same["difference"]) == (True, 0)


def test_a_calibrated_chain_against_the_run_as_it_is(tmp_path, capsys):
    run = train(image_file(tmp_path), tmp_path / "run", *TINY, "--held-out", "0.3")
    with calibrate(run):
        figures = compared(run, run, capsys, "--calibrated-b")
        assert (figures["a"]["calibrated"], figures["b"]["calibrated"]) == (False, True)
        assert figures["b"]["chain"] == "2 of T = 12 steps, calibrated"
        back = compared(run, run, capsys, "--calibrated-a", "--steps-a", "3", "--steps-b", "3")
        assert (back["a"]["calibrated"], back["a"]["num_timesteps"]) == (True, 3)
    assert "is not calibrated" in error_of(["compare", str(run), str(run), "--calibrated-a"], capsys)
    assert "is not calibrated" in error_of(["compare", str(run), str(run), "--calibrated-b"], capsys)


def test_two_weights_have_a_calibration_each(tmp_path, capsys):
    run = train(image_file(tmp_path), tmp_path / "run", *TINY, "--held-out", "0.3")
    for weights in ("ema-0.9", "model"):
        assert main(["calibrate", str(run), "--weights", weights, "--images", "4"]) == 0
    both = "--calibrated-a", "--calibrated-b", "--steps-a", "3", "--steps-b", "3"
    figures = compared(run, run, capsys, "--weights-b", "model", *both)
    assert [figures[side]["weights"] for side in "ab"] == ["ema-0.9", "model"]
    assert figures["a"]["bpd"] != figures["b"]["bpd"]
    line = error_of(["compare", str(run), str(run), "--weights-b", "ema-0.5", "--calibrated-b"], capsys)
    assert "is for weights model of step 4, not ema-0.5 of step 4: calibrate again" in line


# Which data


def test_by_default_both_runs_held_the_examples_out(a, b, tmp_path, capsys):
    out = tmp_path / "table.csv"
    for pair in ((a, b), (b, a)):
        figures = compared(*pair, capsys, "--out", out)
        assert [int(row["index"]) for row in table(out)] == split(30, 0.2)[1].tolist()
        assert (figures["a"]["trained_on"], figures["b"]["trained_on"]) == (0, 0)
    assert compared(a, a, capsys)["n"] == 15


def test_examples_that_a_run_was_trained_on_are_said(a, b, data, capsys):
    figures = compared(a, b, capsys, data)
    assert (figures["a"]["trained_on"], figures["b"]["trained_on"]) == (15, 24)
    assert compared(a, b, capsys, data, "--limit", "2")["b"]["trained_on"] in (0, 1, 2)
    assert main(["compare", str(a), str(b), str(data)]) == 0
    output = capsys.readouterr().out
    assert "A was trained on 15 of these 30 examples, which flatters it" in output
    assert "B was trained on 24 of these 30 examples, which flatters it" in output


def test_what_another_data_set_holds_is_not_known(a, longer, capsys):
    figures = compared(a, longer, capsys)
    assert (figures["a"]["trained_on"], figures["b"]["trained_on"], figures["n"]) == (0, None, 15)
    assert main(["compare", str(a), str(longer)]) == 0
    output = capsys.readouterr().out
    assert "B was trained on other data: whether they hold these examples is not known" in output
    assert "A was trained" not in output


def test_one_example_cannot_tell(a, b, capsys):
    figures = compared(a, b, capsys, "--limit", "1")
    assert (figures["difference_se"], figures["better"], figures["a"]["bpd_se"]) == (None, None, None)
    assert main(["compare", str(a), str(b), "--limit", "1"]) == 0
    output = capsys.readouterr()
    assert "± unknown bits/dim" in output.out
    assert "one example cannot tell which is better" in output.out
    assert "comparing on 1 example\n" in output.err


def test_runs_of_other_data_are_refused(a, tmp_path, capsys):
    large = train(image_file(tmp_path, size=16), tmp_path / "large", *TINY)
    line = error_of(["compare", str(a), str(large)], capsys)
    assert line == f"{large} cannot be compared with {a}: shape must be (1, 8, 8), got (1, 16, 16)"
    np.save(tmp_path / "few.npy", np.arange(20 * 64, dtype=np.uint8).reshape(20, 8, 8) % 8)
    coarse = train(tmp_path / "few.npy", tmp_path / "coarse", *TINY, "--levels", "8")
    line = error_of(["compare", str(coarse), str(a)], capsys)
    assert line == f"{a} cannot be compared with {coarse}: levels must be 8, got 256"
    line = error_of(["compare", str(coarse), str(coarse), str(tmp_path / "images.npz")], capsys)
    assert "shape must be (1, 8, 8), got (1, 16, 16)" in line


def test_a_second_run_that_knows_classes_is_told_them(a, data, tmp_path, capsys):
    told = train(data, tmp_path / "told", *TINY, "--conditional")
    assert compared(a, told, capsys, data, "--limit", "2")["n"] == 2
    np.savez(tmp_path / "shifted.npz", images=np.load(data)["images"], labels=np.load(data)["labels"] + 1)
    line = error_of(["compare", str(a), str(told), str(tmp_path / "shifted.npz")], capsys)
    assert line == f"{tmp_path / 'shifted.npz'}: class '3' is none of the run's (0, 1, 2)"


def test_the_table_can_be_parquet_and_overwrites_nothing_else(a, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    figures = compared(a, a, capsys, "--out", tmp_path / "t.parquet")
    found = parquet.read_table(tmp_path / "t.parquet").to_pydict()
    assert list(found) == ["index", "name", "bpd_a", "bpd_b", "difference"]
    assert np.mean(found["bpd_a"]) == pytest.approx(figures["a"]["bpd"])
    own = tmp_path / "own.csv"
    assert main(["likelihood", str(a), "--out", str(own)]) == 0
    line = error_of(["compare", str(a), str(a), "--out", str(own)], capsys)
    assert line.startswith(f"{own} exists and is no such table (index, name, bpd_a, bpd_b, difference, ...)")
    assert compared(a, a, capsys)["table"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--terms", "12"], "--terms must be from 1 to 11, the chain's KL terms, got 12"),
        (["--exact", "--terms", "2"], "--exact takes all terms and --terms 2 some: give one of them"),
        (["--steps-a", "13"], "steps must be between 1 and 12, got 13"),
        (["--steps-b", "0"], "steps must be between 1 and 12, got 0"),
        (["--weights-b", "best"], "weights must be one of ema-0.9, ema-0.5, model, got best"),
        (["--checkpoint-b", "3"], "has no checkpoint of step 3, only of"),
        (["--out", "table.txt"], "must end in .csv or .parquet, got table.txt"),
        (["--ode"], "unrecognized options: --ode"),
        (["--steps", "3"], "--steps, 3 (perhaps you meant --steps-a {None}|INT or --steps-b {None}|INT)"),
    ],
)
def test_a_mistake_is_one_line(a, flags, message, capsys):
    assert message in error_of(["compare", str(a), str(a), *flags], capsys)


def test_a_second_run_is_needed(a, tmp_path, capsys):
    assert "B" in error_of(["compare", str(a)], capsys)
    assert f"{tmp_path} is no run" in error_of(["compare", str(a), str(tmp_path)], capsys)
