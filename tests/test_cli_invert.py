"""``perrin invert`` and ``perrin reconstruct``."""

import json
import math
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from cli_helpers import TINY, image_file, table, train
from perrin.cli.invert import METHODS, Method
from perrin.errors import PerrinError
from perrin.evaluation.latents import Latents
from perrin.evaluation.plots import has_title
from perrin.evaluation.round_trips import RoundTrips, plot_round_trips


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("invert")
    return train(image_file(folder), folder / "run", *TINY, "--held-out", "0.3", "--conditional")


def call(capsys, command, *args):
    """What ``perrin COMMAND`` prints."""
    capsys.readouterr()
    import_module(f"perrin.cli.{command}").run([str(arg) for arg in args])
    return capsys.readouterr().out


def figures(capsys, command, *args):
    return json.loads(call(capsys, command, *args, "--json"))


def refused(command, *args):
    """The message of the mistake."""
    with pytest.raises(PerrinError) as caught:
        import_module(f"perrin.cli.{command}").run([str(arg) for arg in args])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels(path):
    """The picture at ``path``."""
    with Image.open(path) as image:
        return np.asarray(image)


def values_of(run, count):
    """The first examples that ``run`` was trained on, as level indices (N, H, W)."""
    with np.load(run.parent / "images.npz") as archive:
        return archive["images"][:count]


# perrin invert


@pytest.mark.parametrize("method", ["ddim", "fixed-point", "bdia"])
def test_the_latents_come_back_as_the_round_trip_says(run, tmp_path, method, capsys):
    out, data = tmp_path / "latents.npz", run.parent / "images.npz"
    found = figures(
        capsys,
        "invert",
        run,
        data,
        "--method",
        method,
        "--steps",
        6,
        "-n",
        5,
        "--batch-size",
        2,
        "--out",
        out,
    )
    assert (found["method"], found["steps"], found["n"], found["latents"]) == (method, 6, 5, str(out))
    assert found["rmse_levels"] == pytest.approx(found["rmse"] * 127.5)
    back = tmp_path / "back.npz"
    call(capsys, "reconstruct", run, "--latents", out, "--out", back, "--batch-size", 3)
    with np.load(back) as archive:
        same = archive["images"][..., 0] == values_of(run, 5)
        assert archive["labels"].tolist() == [0, 1, 2, 0, 1]
    assert same.mean() == pytest.approx(found["exact_share"], abs=0.01)
    assert (method == "ddim") or same.all()
    again = Latents.read(out)
    assert len(again.states) == (2 if method == "bdia" else 1)
    assert list(again.indices) == [0, 1, 2, 3, 4]


def test_bdia_is_exact_in_float64(run, tmp_path, capsys):
    flags = "--method", "bdia", "--steps", 12, "--out", tmp_path / "latents.npz"
    double, single = (
        figures(capsys, "invert", run, *flags, "--precision", precision) for precision in ("auto", "float32")
    )
    assert double["largest_error"] < 1e-10
    assert double["precision"] == "float64"
    assert 1e-10 < single["largest_error"] < 1e-2
    assert double["network_calls"] == 23
    assert double["n"] == 6  # what was held out


def test_every_method_is_in_the_table():
    assert get_args(Method) == tuple(METHODS)


def test_what_has_not_converged_is_said(run, tmp_path, capsys):
    flags = "--method", "fixed-point", "--steps", 6, "--out", tmp_path / "latents.npz"
    poor = call(capsys, "invert", run, *flags, "--iterations", 1, "--tolerance", "1e-9")
    assert "NOT CONVERGED: 0 of 6 examples to 1e-09; largest residual" in poor
    good = call(capsys, "invert", run, *flags, "--tolerance", "0.01", "--precision", "float64")
    assert "converged: all examples to 0.01" in good
    assert "NOT" not in good


@pytest.mark.parametrize("grid", ["uniform", "karras"])
def test_the_grid_is_kept_with_the_latents(run, tmp_path, grid, capsys):
    out = tmp_path / "latents.npz"
    found = figures(capsys, "invert", run, "--grid", grid, "--steps", 6, "--out", out)
    assert found["grid"] == Latents.read(out).settings.grid == grid


def test_another_class_comes_back_as_another_image(run, tmp_path, capsys):
    out = tmp_path / "latents.npz"
    call(capsys, "invert", run, "--steps", 6, "--label", "1", "--out", out)
    assert Latents.read(out).classes.tolist() == [1] * 6
    own, other = tmp_path / "own.npz", tmp_path / "other.npz"
    call(capsys, "reconstruct", run, "--latents", out, "--out", own)
    call(capsys, "reconstruct", run, "--latents", out, "--out", other, "--label", "2")
    with np.load(own) as one, np.load(other) as two:
        assert (one["images"] != two["images"]).any()
        assert two["labels"].tolist() == [2] * 6


def test_vectors_are_inverted_too(vectors, tmp_path, capsys):
    found = figures(capsys, "invert", vectors, vectors.parent / "vectors.npy", "--steps", 6)
    assert found["rmse_levels"] is None
    assert found["exact_share"] is None
    assert found["largest_error"] < 1e-10
    assert found["latents"].startswith(str(vectors / "latents-bdia-6-steps-"))
    back = figures(capsys, "reconstruct", vectors, "--latents", found["latents"])
    assert back["samples"] == str(vectors / "samples" / Path(found["latents"]).name)
    with np.load(back["samples"]) as archive:
        np.testing.assert_allclose(
            archive["data"], np.load(vectors.parent / "vectors.npy"), rtol=0, atol=1e-6
        )
    text = call(capsys, "reconstruct", vectors, "--steps", 6, "--out", tmp_path / "table.csv")
    assert "grid" not in text
    assert not (tmp_path / "table-grid.png").exists()


def test_by_default_other_settings_have_another_file(run, capsys):
    data = run.parent / "images.npz"
    flags = [
        [],
        [data],
        ["-n", 2],
        ["--label", "1"],
        ["--grid", "uniform"],
        ["--weights", "model"],
        ["--precision", "float32"],
        ["--method", "fixed-point"],
        ["--method", "fixed-point", "--tolerance", "1e-3"],
        ["--method", "fixed-point", "--iterations", "2"],
    ]
    found = [figures(capsys, "invert", run, *more, "--steps", 3)["latents"] for more in flags]
    assert len(set(found)) == len(found)
    assert figures(capsys, "invert", run, "--steps", 3)["latents"] == found[0]


def test_data_without_classes_are_inverted_as_one_class(run, tmp_path, capsys):
    bare = tmp_path / "bare.npz"
    np.savez(bare, images=values_of(run, 3))
    flags = "--steps", 4, "-n", 3, "--label", "1"
    plain = figures(capsys, "invert", run, bare, *flags, "--out", tmp_path / "a.npz")
    known = figures(capsys, "invert", run, run.parent / "images.npz", *flags, "--out", tmp_path / "b.npz")
    assert plain["n"] == 3
    assert plain["rmse"] == known["rmse"]
    assert Latents.read(tmp_path / "a.npz").classes.tolist() == [1, 1, 1]
    for command in ("invert", "reconstruct"):
        assert refused(command, run, bare) == (
            f"{bare} has no classes, which the conditional model needs: give --label, the class of all of them"
        )


def test_one_step_is_one(run, capsys, tmp_path):
    text = call(capsys, "invert", run, "-n", 1, "--method", "ddim", "--steps", 1, "--out", tmp_path / "a.npz")
    assert text.startswith("ddim, 1 step, 1 example, 2 network calls\n")


# perrin reconstruct


def test_the_error_against_the_number_of_steps_is_a_table_a_plot_and_a_grid(run, tmp_path, capsys):
    out = tmp_path / "table.csv"
    flags = "--steps", 4, 12, "--method", "ddim", "bdia", "--out", out
    found = figures(capsys, "reconstruct", run, run.parent / "images.npz", *flags, "-n", 3)
    rows = table(out)
    assert [(row["method"], int(row["steps"])) for row in rows] == [
        ("ddim", 4),
        ("ddim", 12),
        ("bdia", 4),
        ("bdia", 12),
    ]
    for row, each in zip(rows, found["round_trips"], strict=True):
        assert float(row["rmse"]) == pytest.approx(each["rmse"], rel=1e-6)
        assert each["largest_residual"] is each["converged"] is None
    assert float(rows[0]["rmse"]) > 1e6 * float(rows[2]["rmse"])
    assert has_title(Path(found["plot"]), "perrin reconstruct")
    assert has_title(Path(found["grid"]), "perrin reconstruct")
    tiles = pixels(found["grid"])
    assert tiles.shape == (5 * 50 + 2, 3 * 50 + 2)
    assert np.array_equal(tiles[2:50:6, 2:50:6], values_of(run, 1)[0])
    assert np.array_equal(tiles[:52], tiles[200:252])  # the data, and what bdia made of them


def test_the_table_for_people_says_what_has_not_converged(run, tmp_path, capsys):
    flags = "--steps", 6, "--method", "fixed-point", "--iterations", 1, "--out", tmp_path / "table.csv"
    text = call(capsys, "reconstruct", run, *flags)
    assert text.splitlines()[1].endswith("NOT: 0 of 6")


@pytest.mark.parametrize(("converged", "explained"), [(2.0, 0), (1.0, 1), (math.nan, 0)])
def test_the_plot_explains_its_hollow_marks(converged, explained, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "perrin.evaluation.round_trips.save_figure", lambda figure, path, title: drawn.append(figure)
    )
    found = RoundTrips("fixed-point", 5, 0.1, math.nan, math.nan, 0.1, 0.1, converged, n=2, network_calls=9)
    plot_round_trips([found, replace(found, steps=9)], tmp_path / "plot.png")
    texts = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert texts == ["fixed-point", *["hollow: not all converged"] * explained]


def test_latents_come_back_as_pictures(run, tmp_path, capsys):
    out = tmp_path / "latents.npz"
    call(capsys, "invert", run, run.parent / "images.npz", "--steps", 6, "-n", 2, "--out", out)
    found = figures(capsys, "reconstruct", run, "--latents", out)
    assert found["samples"] == str(run / "samples" / "latents")
    assert np.array_equal(pixels(run / "samples/latents/00001.png"), values_of(run, 2)[1])


# Mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps must be from 1 to 12, got 0"),
        (["--steps", "13"], "--steps must be from 1 to 12, got 13"),
        (["--steps", "1"], "--steps must be at least 2 for bdia, got 1"),
        (["--method", "edict"], "edict"),
        (["--iterations", "0"], "--iterations must be at least 1, got 0"),
        (["-n", "0"], "--count must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--tolerance", "-1"], "--tolerance must be at least 0, got -1"),
        (["--tolerance", "nan"], "--tolerance must be at least 0, got nan"),
        (["--label", "7"], "--label 7: expected a class name, 0 to 2"),
        (["--label", "-1"], "--label -1: expected a class name, 0 to 2"),
        (["--weights", "ema-0.1"], "ema-0.1"),
        (["--checkpoint", "99"], "99"),
    ],
)
def test_a_mistake_is_one_line(run, flags, message):
    assert message in refused("invert", run, *flags)
    assert message in refused(
        "reconstruct", run, *(flags if flags[0] != "--steps" else ["--steps", "6", flags[1]])
    )


def test_data_that_do_not_fit_are_refused(run, vectors, tmp_path):
    assert "shape must be (1, 8, 8), got (3,)" in refused("invert", run, vectors.parent / "vectors.npy")
    other = tmp_path / "nan.npy"
    np.save(other, np.full((4, 3), np.nan, np.float32))
    assert str(other) in refused("invert", vectors, other)
    assert "has no classes" in refused("invert", vectors, "--label", "1")


def test_a_file_of_something_else_is_not_overwritten(run, tmp_path):
    (tmp_path / "other.npz").write_text("mine")
    assert "holds no latents" in refused("invert", run, "--out", tmp_path / "other.npz")
    assert "must end in .npz" in refused("invert", run, "--out", tmp_path / "latents.csv")
    for name in ("plot.png", "table-grid.png"):
        Image.new("L", (3, 3)).save(tmp_path / name)
        kept = (tmp_path / name).read_bytes()
        message = refused(
            "reconstruct",
            run,
            "--out",
            tmp_path / f"{name.removesuffix('-grid.png').removesuffix('.png')}.csv",
        )
        assert (
            message
            == f"{tmp_path / name} exists and was not made by perrin reconstruct: choose another --out"
        )
        assert (tmp_path / name).read_bytes() == kept
    assert not list(tmp_path.glob("*.csv"))
    (tmp_path / "other.csv").write_text("mine")
    assert "is no such table" in refused("reconstruct", run, "--out", tmp_path / "other.csv")
    assert (tmp_path / "other.csv").read_text() == "mine"


def test_latents_of_another_model_are_refused(run, vectors, tmp_path, capsys):
    out = tmp_path / "latents.npz"
    call(capsys, "invert", run, "--steps", 6, "--out", out)
    assert "was made by step 4 of another run" in refused("reconstruct", vectors, "--latents", out)
    other = train(run.parent / "images.npz", tmp_path / "run", *TINY, "--conditional", "--seed", "1")
    assert "of another model than" in refused("reconstruct", other, "--latents", out)
    assert "leave out --steps, --grid" in refused(
        "reconstruct", run, "--latents", out, "--steps", "5", "--grid", "uniform"
    )
    assert f"leave out {out}" in refused("reconstruct", run, out, "--latents", out)


def _damage(arrays, name):
    return {
        "no settings": {key: value for key, value in arrays.items() if key != "settings"},
        "one state": {key: value for key, value in arrays.items() if key != "before"},
        "no states": {key: value for key, value in arrays.items() if key not in ("latest", "before")},
        "nan": arrays | {"latest": np.full_like(arrays["latest"], np.nan)},
        "flat": arrays | {"latest": np.float64(3.0), "before": np.float64(3.0)},
        "whole numbers": {
            k: v.astype(np.int64) if k in ("latest", "before") else v for k, v in arrays.items()
        },
        "labels": arrays | {"labels": np.zeros(1, np.int64)},
        "steps": arrays
        | {"settings": np.array(str(arrays["settings"]).replace('"steps": 6', '"steps": "six"'))},
        "shape": arrays | {"latest": arrays["latest"][..., :4], "before": arrays["before"][..., :4]},
    }[name]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no settings", "holds no latents of perrin invert"),
        ("one state", "1 states do not belong to method bdia"),
        ("no states", "its arrays do not fit together"),
        ("nan", "values that are no finite numbers"),
        ("flat", "its arrays do not fit together"),
        ("whole numbers", "values that are no finite numbers"),
        ("labels", "its arrays do not fit together"),
        ("steps", "holds no latents of perrin invert"),
        ("shape", r"shape must be (1, 8, 8), got (1, 8, 4)"),
    ],
)
def test_damaged_latents_are_refused(run, tmp_path, damage, message, capsys):
    out = tmp_path / "latents.npz"
    call(capsys, "invert", run, "--steps", 6, "--out", out)
    with np.load(out) as archive:
        arrays = _damage(dict(archive), damage)
    np.savez(out, **arrays)
    assert message in refused("reconstruct", run, "--latents", out)


def test_a_file_that_is_not_there_is_named(run, tmp_path):
    with pytest.raises(OSError, match=r"absent\.npz"):
        import_module("perrin.cli.reconstruct").run([str(run), "--latents", str(tmp_path / "absent.npz")])
