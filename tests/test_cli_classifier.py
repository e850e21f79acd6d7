"""``perrin train-classifier``: what it trains, leaves and says."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cli_helpers import BOX, TINY, TINY_MLP, figures_of, image_file, train, vector_file
from cli_helpers import error_of as error_of_command
from perrin.build import load_run
from perrin.cli.train_classifier import DEFAULT_STEPS, Options, config_of, run
from perrin.errors import PerrinError
from perrin.training.classifier import load_classifier

SMALL = [
    *("--channels", "8", "--channel-mult", "1", "--num-res-blocks", "1", "--attention-levels"),
    *("--num-heads", "1", "--batch-size", "8", "--patch", "2"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    data = image_file(folder)
    return {
        "plain": train(data, folder / "plain", *TINY, "--held-out", "0.3"),
        "classes": train(data, folder / "classes", *TINY, "--held-out", "0.3", "--conditional"),
    }


def answer(args: list[str]) -> dict[str, Any]:
    output = StringIO()
    with redirect_stdout(output):
        run([*args, "--json"])
    (line,) = output.getvalue().splitlines()
    return json.loads(line)


def error_of(args: list[str]) -> str:
    with pytest.raises(PerrinError) as caught:
        run(args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["plain", "classes"])
def test_it_trains_a_classifier_that_fits_its_run(runs: dict[str, Path], kind: str, tmp_path: Path) -> None:
    figures = answer([str(runs[kind]), "--steps", "3", "--out", str(tmp_path / "c"), *SMALL])
    network, facts = load_classifier(tmp_path / "c")
    model = load_run(runs[kind])
    facts.check(model.diffusion, model.folder.facts.shape, model.folder.facts.class_names)
    assert figures["classifier"] == str(tmp_path / "c")
    assert (figures["run"], figures["step"], figures["classes"]) == (str(runs[kind]), 3, ["0", "1", "2"])
    assert figures["accuracy"] == pytest.approx(facts.accuracy)
    assert [band["accuracy"] for band in figures["bands"]] == [band.accuracy for band in facts.bands]
    assert {band["count"] for band in figures["bands"]} == {6}
    assert network(torch.zeros(2, 1, 8, 8), torch.tensor([0, 11])).shape == (2, 3)


def test_it_goes_on_in_the_runs_own_folder_and_prints_a_table(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(runs["plain"]), *SMALL]
    run([*command, "--steps", "2"])
    run([*command, "--steps", "4"])
    output = capsys.readouterr()
    *_, last = output.out.splitlines()
    assert last == f"classifier {runs['plain'] / 'classifier'}: classifier.json and its weights"
    assert "3 classes; step 4" in output.out
    facts = load_classifier(runs["plain"] / "classifier")[1]
    for band in facts.bands:
        assert any(
            line.startswith(band.band) and f"{band.accuracy:.3f} ±" in line
            for line in output.out.splitlines()
        )
    assert output.err.count("cross entropy") == 2
    note = f"classifier {runs['plain'] / 'classifier'}: 3 classes; 20 examples, of which 6 are held out; on "
    assert output.err.count(note) == 2
    assert error_of([*command, "--steps", "5", "--lr", "0.1"]).endswith(
        "holds a classifier with lr 0.001, asked for 0.1: choose another --out"
    )


def test_a_folder_of_something_else_is_left_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    foreign = tmp_path / "state"
    foreign.mkdir()
    (foreign / "state.pt").write_text("mine")
    checkpoint = next((runs["plain"] / "checkpoints").iterdir())
    for place in (runs["plain"], checkpoint, tmp_path, foreign, tmp_path / "mine.txt"):
        before = sorted(place.iterdir()) if place.is_dir() else []
        assert error_of([str(runs["plain"]), "--steps", "2", "--out", str(place), *SMALL]) == (
            f"{place} exists and was not made by perrin train-classifier: choose another place"
        )
        assert (sorted(place.iterdir()) if place.is_dir() else []) == before
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".state.77.tmp.pt").write_text("left by a killed write")
    assert answer([str(runs["plain"]), "--steps", "2", "--out", str(tmp_path / "empty"), *SMALL])["step"] == 2


def test_minutes_are_a_budget_too(runs: dict[str, Path], tmp_path: Path) -> None:
    command = [str(runs["plain"]), *SMALL, "--out", str(tmp_path / "c")]
    assert 1 <= answer([*command, "--minutes", "1e-6"])["step"] < DEFAULT_STEPS
    assert answer([*command, "--minutes", "10", "--steps", "4"])["step"] == 4


def test_each_flag_reaches_the_network_and_its_training() -> None:
    plain = config_of(Options(Path("run")), (1, 8, 8))
    changed = {
        "channels": 16,
        "channel_mult": (1, 2),
        "num_res_blocks": 2,
        "attention_levels": (0,),
        "num_heads": 2,
        "dropout": 0.2,
        "patch": 4,
    }
    for name, value in changed.items():
        assert getattr(config_of(Options(Path("run"), **{name: value}), (1, 8, 8)).encoder, name) == value
        assert getattr(plain.encoder, name) != value
    for name, value in {"batch_size": 5, "lr": 0.5, "weight_decay": 0.5, "seed": 9}.items():
        assert getattr(config_of(Options(Path("run"), **{name: value}), (1, 8, 8)), name) == value
    assert plain.encoder.patch == 1
    assert config_of(Options(Path("run")), (1, 28, 28)).encoder.patch == 2


DRAWING = {"sample": [], "vary": [], "inpaint": BOX, "interpolate": ["--seeds", "1", "2"]}


@pytest.mark.parametrize("command", DRAWING)
def test_pictures_of_two_classifiers_do_not_share_a_folder(
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    run([str(runs["plain"]), "--steps", "1", "--out", str(tmp_path / "cl"), *SMALL])
    drawing = [command, str(runs["plain"]), *DRAWING[command], "-n", "2", "--steps", "2", "--label", "1"]
    drawing += ["--out", str(tmp_path / "o")]
    kept = figures_of([*drawing, "--classifier", str(tmp_path / "cl")], capsys)["classifier"]
    monkeypatch.chdir(tmp_path)
    again = figures_of([*drawing, "--classifier", "cl"], capsys)
    assert again["network_calls"] is None  # nothing is drawn again
    run([str(runs["plain"]), "--steps", "2", "--out", str(tmp_path / "cl"), *SMALL])
    line = error_of_command([*drawing, "--classifier", "cl"], capsys)
    assert line.startswith(f"{tmp_path / 'o'} holds pictures of classifier {kept}, asked for ")


def labelled(folder: Path, names: list[str], n: int = 24) -> Path:
    """A folder of class folders of grey images."""
    from perrin.data import write_image

    random = np.random.default_rng(1)
    for i in range(n):
        values = random.integers(0, 256, (1, 8, 8)).astype(np.uint8)
        path = folder / names[i % len(names)] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, values, 256)
    return folder


def test_other_data_bring_their_own_classes_to_an_unconditional_run(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    data = labelled(tmp_path / "data", ["cat", "dog"])
    figures = answer([str(runs["plain"]), str(data), "--steps", "2", "--out", str(tmp_path / "c"), *SMALL])
    assert figures["classes"] == ["cat", "dog"]
    model = load_run(runs["plain"])
    load_classifier(tmp_path / "c")[1].check(model.diffusion, model.folder.facts.shape)


def test_a_conditional_run_keeps_its_numbers_of_the_classes(runs: dict[str, Path], tmp_path: Path) -> None:
    data = labelled(tmp_path / "data", ["1", "2"])
    figures = answer([str(runs["classes"]), str(data), "--steps", "2", "--out", str(tmp_path / "c"), *SMALL])
    assert figures["classes"] == ["0", "1", "2"]
    other = labelled(tmp_path / "other", ["1", "cat"])
    assert "class 'cat' is none of the run's (0, 1, 2)" in error_of(
        [str(runs["classes"]), str(other), *SMALL]
    )


def test_data_without_classes_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "bare.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8))
    assert error_of([str(runs["plain"]), str(path), *SMALL]) == (
        f"{path} has no classes, which a classifier needs (folders of classes, or labels in a file)"
    )
    bare = train(path, tmp_path / "run", *TINY)
    assert error_of([str(bare), *SMALL]).startswith(f"{path} has no classes")


def test_vectors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vectors.npz"
    np.savez(path, images=np.load(vector_file(tmp_path)), labels=np.arange(20) % 2)
    made = train(path, tmp_path / "run", *TINY_MLP)
    assert error_of([str(made)]) == "a classifier needs images (C, H, W), got data of shape (3,)"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--minutes", "0"], "--minutes must be above 0, got 0.0"),
        (["--lr", "0"], "--lr must be above 0, got 0.0"),
        (["--weight-decay", "-1"], "--weight-decay must be at least 0, got -1.0"),
        (["--dropout", "1"], "--dropout must lie in [0, 1), got 1.0"),
        (["--num-heads", "3"], "--num-heads must divide the 32 channels of an attention layer, got 3"),
        (["--attention-levels", "9"], "--attention-levels must lie in 0 to"),
        (["--channel-mult", "1", "1", "1", "1", "1"], "height and width must be multiples of"),
        (["--step", "3"], "unrecognized options: --step"),
    ],
)
def test_bad_flags_give_one_line(
    runs: dict[str, Path], flags: list[str], message: str, tmp_path: Path
) -> None:
    found = error_of([str(runs["plain"]), "--out", str(tmp_path / "c"), *flags])
    assert message in found
    assert not (tmp_path / "c").exists()


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    assert error_of([str(tmp_path)]).startswith(f"{tmp_path} is no run")
