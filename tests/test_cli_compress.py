"""``perrin compress`` and ``perrin decompress``."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli_helpers import TINY, TINY_MLP, error_of, figures_of, image_file, train
from perrin.cli.main import main
from perrin.data import load, split
from perrin.training import RunFolder


@pytest.fixture(scope="module")
def file(run):
    out = run.parent / "images.perrin"
    assert main(["compress", str(run), str(run.parent / "images.npz"), "--out", str(out)]) == 0
    return out


def pictures(folder, *, mode="L", size=(8, 8), count=3):
    random = np.random.default_rng(1)
    for index in range(count):
        path = folder / "xyz"[index % 3] / f"{index}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (*size, 3) if mode == "RGB" else size, np.uint8)
        Image.fromarray(pixels, mode=None).save(path)
    return folder


def test_the_default_is_the_held_out_part_at_all_steps(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures = figures_of(["compress", str(run)], capsys)
    written = tmp_path / "run-held-out.perrin"
    assert figures["file"] == written.name
    assert figures["file_bytes"] == written.stat().st_size
    assert (figures["n"], figures["raw_bytes"], figures["levels"]) == (6, 6 * 64, 256)
    assert (figures["steps"], figures["num_timesteps"], figures["calibrated"]) == (12, 12, False)
    assert (figures["weights"], figures["step"], figures["batched_network_calls"]) == ("ema-0.9", 4, 12 * 6)
    assert figures["file_bpd"] == pytest.approx(figures["file_bytes"] * 8 / (6 * 64))
    rest = 8 * (figures["file_bytes"] - figures["header_bytes"]) - figures["initial_bits"]
    assert figures["net_bpd"] * 6 * 64 == pytest.approx(rest, abs=64)
    assert figures["seconds"] > 0
    restored = figures_of(["decompress", str(run), written.name], capsys)
    assert restored["out"] == "run-held-out.npz"
    found = load(tmp_path / restored["out"])
    data = load(run.parent / "images.npz")
    rows = split(20, 0.3)[1]
    np.testing.assert_array_equal(found.values, data.values[rows])
    np.testing.assert_array_equal(found.labels, data.labels[rows])
    assert (restored["n"], restored["shape"], restored["dtype"]) == (6, [1, 8, 8], "uint8")


def test_the_chain_and_the_weights_are_in_the_file(run, tmp_path, capsys):
    flags = ["--steps", "3", "--limit", "2", "--weights", "model", "--checkpoint", "4"]
    out = tmp_path / "some.perrin"
    figures = figures_of(
        ["compress", str(run), str(run.parent / "images.npz"), "--out", str(out), *flags], capsys
    )
    assert (figures["n"], figures["steps"], figures["weights"], figures["step"]) == (2, 3, "model", 4)
    figures_of(["decompress", str(run), str(out), "--out", str(tmp_path / "some.npy")], capsys)
    found = np.load(tmp_path / "some.npy")
    np.testing.assert_array_equal(found, load(run.parent / "images.npz").values[:2])
    assert found.dtype == np.uint8


def test_people_are_told_the_rates(run, tmp_path, capsys):
    assert main(["compress", str(run), "--limit", "1", "--out", str(tmp_path / "a.perrin")]) == 0
    output = capsys.readouterr()
    assert "bytes for 1 examples of 64 bytes" in output.out
    assert "bits/dim in the file" in output.out
    assert re.search(
        r"beside the net bits: (\d+) bytes of header and initial bits \(\d+ \+ \d+\), shared", output.out
    )
    assert "the run keeps this checkpoint from now on" in output.out
    assert "T = 12, 256 levels; weights ema-0.9 of step 4; 12 batched network calls" in output.out
    assert "compressing 1 examples with weights ema-0.9 of step 4" in output.err
    assert main(["decompress", str(run), str(tmp_path / "a.perrin"), "--out", str(tmp_path / "a.npy")]) == 0
    output = capsys.readouterr()
    assert "1 examples of 1x8x8, 256 levels, uint8" in output.out
    assert "every value verified" in output.out
    assert "will not hold the labels" in output.err


def test_a_folder_of_images_keeps_its_names_and_classes(run, tmp_path, capsys):
    data = pictures(tmp_path / "photos")
    figures_of(["compress", str(run), str(data), "--out", str(tmp_path / "p.perrin")], capsys)
    figures_of(["decompress", str(run), str(tmp_path / "p.perrin"), "--out", str(tmp_path / "back")], capsys)
    found, expected = load(tmp_path / "back"), load(data)
    assert found.names == ["x/0.png", "y/1.png", "z/2.png"]
    np.testing.assert_array_equal(found.values, expected.values)
    assert found.facts.class_names == expected.facts.class_names
    figures_of(["decompress", str(run), str(tmp_path / "p.perrin"), "--out", str(tmp_path / "p.npz")], capsys)
    with np.load(tmp_path / "p.npz") as archive:
        assert archive["names"].tolist() == ["x/0.bmp", "y/1.bmp", "z/2.bmp"]
        assert archive["class_names"].tolist() == ["x", "y", "z"]
        assert archive["labels"].tolist() == [0, 1, 2]


def test_a_folder_of_images_that_came_back_as_a_file_fits_its_run(tmp_path, capsys):
    data = pictures(tmp_path / "photos", count=9)
    run = train(data, tmp_path / "run", *TINY, "--conditional")
    file, back = str(tmp_path / "p.perrin"), str(tmp_path / "p.npz")
    figures_of(["compress", str(run), str(data), "--out", file, "--steps", "2"], capsys)
    figures_of(["decompress", str(run), file, "--out", back], capsys)
    own, restored = (figures_of(["likelihood", str(run), str(one)], capsys) for one in (data, back))
    assert restored["bpd"] == own["bpd"]
    assert restored["trained_on"] == own["trained_on"] == 8


def test_arrays_can_become_numbered_pictures_in_an_empty_folder(run, file, tmp_path, capsys):
    (tmp_path / "all").mkdir()
    figures_of(["decompress", str(run), str(file), "--out", str(tmp_path / "all")], capsys)
    found = load(tmp_path / "all")
    assert found.names[:2] == ["00000.png", "00001.png"]
    np.testing.assert_array_equal(found.values, load(run.parent / "images.npz").values)
    assert [path.name for path in tmp_path.iterdir()] == ["all"]


def test_nothing_is_overwritten(run, file, tmp_path, capsys):
    existing = tmp_path / "a.perrin"
    existing.write_bytes(b"precious")
    message = error_of(["compress", str(run), "--out", str(existing)], capsys)
    assert message == f"{existing} exists, and nothing is overwritten: choose another --out"
    for out in (tmp_path / "a.npz", tmp_path / "folder"):
        if out.suffix:
            out.write_bytes(b"precious")
        else:
            pictures(out)
        assert "nothing is overwritten" in error_of(
            ["decompress", str(run), str(file), "--out", str(out)], capsys
        )
    assert existing.read_bytes() == (tmp_path / "a.npz").read_bytes() == b"precious"


def test_a_conditional_run_is_told_the_classes(tmp_path, capsys):
    data = image_file(tmp_path)
    run = train(data, tmp_path / "run", *TINY, "--conditional")
    out = tmp_path / "images.perrin"
    figures_of(["compress", str(run), str(data), "--out", str(out), "--steps", "2"], capsys)
    figures_of(["decompress", str(run), str(out), "--out", str(tmp_path / "back.npz")], capsys)
    found, expected = load(tmp_path / "back.npz"), load(data)
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.labels, expected.labels)


def test_vectors_of_levels_come_back(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = np.random.default_rng(0).integers(0, 65536, (20, 3), np.uint16)
    np.save("vectors.npy", values)
    run = train(tmp_path / "vectors.npy", tmp_path / "run", *TINY_MLP)
    figures = figures_of(["compress", str(run), "vectors.npy", "--steps", "4"], capsys)
    assert figures["file"] == "vectors.perrin"
    message = error_of(["decompress", str(run), "vectors.perrin"], capsys)
    assert message == "vectors.npy exists, and nothing is overwritten: choose another --out"
    message = error_of(["decompress", str(run), "vectors.perrin", "--out", "pictures"], capsys)
    assert "PNG files keep images of 256 levels, or of 65536 and one channel" in message
    figures_of(["decompress", str(run), "vectors.perrin", "--out", "back.npz"], capsys)
    np.testing.assert_array_equal(load("back.npz").values, values)


def test_low_values_of_many_levels_come_back(tmp_path, capsys):
    values = np.arange(60).reshape(20, 3)
    np.save(tmp_path / "wide.npy", values * 16)
    np.save(tmp_path / "low.npy", values)
    run = train(tmp_path / "wide.npy", tmp_path / "run", *TINY_MLP, "--levels", "1000")
    file, back = str(tmp_path / "x.perrin"), str(tmp_path / "back.npy")
    figures_of(["compress", str(run), str(tmp_path / "low.npy"), "--out", file, "--steps", "2"], capsys)
    assert figures_of(["decompress", str(run), file, "--out", back], capsys)["dtype"] == "uint16"
    np.testing.assert_array_equal(np.load(back), values)


def test_another_run_is_refused(run, file, tmp_path, capsys):
    data = str(run.parent / "images.npz")
    other = train(data, tmp_path / "other", *TINY, "--seed", "1")
    out = ["--out", str(tmp_path / "x.npz")]
    assert "compressed with another model" in error_of(["decompress", str(other), str(file), *out], capsys)
    np.savez(tmp_path / "small.npz", images=np.zeros((20, 6, 6), np.uint8))
    small = train(tmp_path / "small.npz", tmp_path / "small", *TINY)
    message = error_of(["decompress", str(small), str(file), *out], capsys)
    assert message == f"{file} does not fit the run {small}: shape must be (1, 6, 6), got (1, 8, 8)"
    longer = train(data, tmp_path / "longer", *TINY, "--steps", "6")
    assert error_of(["decompress", str(longer), str(file), *out], capsys) == (
        f"{file} was compressed with step 4 of another run, or that checkpoint was deleted: {longer} has 6"
    )
    renamed = train(data, tmp_path / "renamed", *TINY, "--ema", "0.8")
    assert "weights must be one of" in error_of(["decompress", str(renamed), str(file), *out], capsys)
    assert not (tmp_path / "x.npz").exists()


def test_a_damaged_file_is_refused(run, file, tmp_path, capsys):
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    damaged = tmp_path / "damaged.perrin"
    damaged.write_bytes(content)
    message = error_of(["decompress", str(run), str(damaged)], capsys)
    assert message == f"{damaged}: damaged, its content does not match its hash"
    message = error_of(["decompress", str(run), str(run / "config.json")], capsys)
    assert "no .perrin file" in message
    assert "no such file" in error_of(["decompress", str(run), str(tmp_path / "none.perrin")], capsys)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((3, 8, 8), 300, np.uint16), "values must lie in 0..255 for 256 levels, the largest is 300"),
        (np.zeros((3, 9, 9), np.uint8), "shape must be (1, 8, 8), got (1, 9, 9)"),
        (np.zeros((3, 8, 8, 3), np.uint8), "shape must be (1, 8, 8), got (3, 8, 8)"),
        (np.zeros((0, 8, 8), np.uint8), "got (0, 8, 8)"),
        (np.full((3, 8, 8), np.nan), "nan at index (0, 0, 0, 0)"),
        (np.zeros((3, 8, 8)), "levels must be 256, got None"),
    ],
)
def test_data_that_do_not_fit_the_run_are_refused(run, tmp_path, capsys, array, message):
    path = tmp_path / "data.npy"
    np.save(path, array)
    found = error_of(["compress", str(run), str(path), "--out", str(tmp_path / "x.perrin")], capsys)
    assert message in found
    assert not (tmp_path / "x.perrin").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--steps", "13"], "13"),
        (["--steps", "0"], "0"),
        (["--weights", "ema-1"], "weights must be one of ema-0.9, ema-0.5, model, got ema-1"),
        (["--checkpoint", "3"], "no checkpoint of step 3"),
        (["--calibrated"], "calibrate"),
    ],
)
def test_wrong_flags_are_refused(run, tmp_path, capsys, flags, message):
    out = tmp_path / "new" / "sub" / "x.perrin"
    found = error_of(["compress", str(run), "--out", str(out), *flags], capsys)
    assert message in found
    assert list(tmp_path.iterdir()) == []


def test_folders_of_the_file_are_made(run, tmp_path, capsys):
    out = tmp_path / "new" / "sub" / "x.perrin"
    figures_of(["compress", str(run), "--out", str(out), "--limit", "1", "--steps", "1"], capsys)
    assert [path.name for path in out.parent.iterdir()] == ["x.perrin"]
    below = out / "y" / "z.perrin"
    assert str(out) in error_of(["compress", str(run), "--out", str(below), "--steps", "999"], capsys)


def test_training_on_keeps_the_checkpoint_that_a_file_needs(tmp_path, capsys):
    data = image_file(tmp_path)
    run = train(data, tmp_path / "run", *TINY, "--keep", "1")
    out = tmp_path / "x.perrin"
    flags = ["--limit", "2", "--steps", "2"]
    assert figures_of(["compress", str(run), "--out", str(out), *flags], capsys)["pinned"] is True
    for steps in ("6", "8"):
        train(data, run, *TINY, "--keep", "1", "--steps", steps)
    figures = figures_of(["inspect", str(run)], capsys)
    assert figures["checkpoints"] == [4, 8]
    restored = figures_of(["decompress", str(run), str(out), "--out", str(tmp_path / "x.npy")], capsys)
    assert restored["n"] == 2


def test_a_run_that_cannot_be_written_is_told_in_a_note(run, tmp_path, capsys, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("pinned"))
    touch = Path.touch

    def refused(path, *args, **kwargs):
        if path.is_relative_to(copy):
            raise OSError(30, "Read-only file system")
        touch(path, *args, **kwargs)

    monkeypatch.setattr(Path, "touch", refused)
    out = str(tmp_path / "x.perrin")
    assert main(["compress", str(copy), "--out", out, "--limit", "1", "--steps", "1"]) == 0
    output = capsys.readouterr()
    assert "pinned cannot be written: Read-only file system: further training may delete" in output.err
    assert "keeps this checkpoint" not in output.out
    assert not list(copy.rglob("pinned"))


def test_a_calibrated_file_is_read_after_the_run_was_calibrated_again(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "copy")
    out, back = str(tmp_path / "x.perrin"), tmp_path / "x.npy"
    figures_of(["calibrate", str(copy)], capsys)
    figures = figures_of(["compress", str(copy), "--out", out, "--calibrated", "--limit", "2"], capsys)
    assert figures["calibrated"] is True
    for seed in ("1", "2"):
        assert main(["calibrate", str(copy), "--images", "7", "--seed", seed]) == 0
    (copy / "calibration-00000000.json").write_text("{}")  # damaged: not the one
    kept = RunFolder.open(copy).calibrations()
    assert len(kept) == 4
    figures_of(["decompress", str(copy), out, "--out", str(back)], capsys)
    rows = split(20, 0.3)[1][:2]
    np.testing.assert_array_equal(np.load(back), load(run.parent / "images.npz").values[rows])
    for path in kept[1:]:
        path.unlink()
    message = error_of(["decompress", str(copy), out, "--out", str(tmp_path / "y.npy")], capsys)
    assert message.endswith("are not those of this run, or the run was calibrated again since")
    figures_of(["compress", str(copy), "--out", f"{out}.perrin", "--steps", "2", "--limit", "1"], capsys)


def test_a_run_of_continuous_data_cannot_compress(tmp_path, capsys):
    np.save(tmp_path / "v.npy", np.random.default_rng(0).uniform(-1, 1, (20, 3)))
    run = train(tmp_path / "v.npy", tmp_path / "run", *TINY_MLP)
    message = error_of(["compress", str(run), "--out", str(tmp_path / "x.perrin")], capsys)
    assert message == "the model is one of continuous data: only data with levels can be compressed"


@pytest.mark.parametrize("out", ["x.png", "x.txt"])
def test_another_kind_of_output_is_refused(run, file, tmp_path, capsys, out):
    message = error_of(["decompress", str(run), str(file), "--out", str(tmp_path / out)], capsys)
    assert message == f"--out must end in .npy or .npz, or name a folder, got {tmp_path / out}"


def test_without_the_coder_one_line_says_how_to_get_it(run, file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    out = ["--out", str(tmp_path / "x.perrin")]
    for command in (["compress", str(run), *out], ["decompress", str(run), str(file)]):
        assert error_of(command, capsys).endswith("pip install 'perrin[codec]'")
