"""The run folder: atomic writes, damage that is named, and folders that are no runs."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from perrin.config import DataConfig, RunConfig, TrainingConfig
from perrin.data import Facts
from perrin.errors import RunError
from perrin.training import RunFolder
from perrin.training.checkpoint import STATE_FILE, Checkpoint
from perrin.training.metrics import MetricsLog

CONFIG = RunConfig(data=DataConfig(flip=True), training=TrainingConfig(ema=(0.9, 0.5), keep=2))
FACTS = Facts((1, 4, 4), 17, ("a", "b"), 9)


def checkpoint(step: int) -> Checkpoint:
    def weights(value: float) -> dict[str, Tensor]:
        return {"weight": torch.full((64,), value + step)}

    state = {"optimizer": {"lr": 0.1, "betas": (0.9, 0.99), "exp_avg": torch.ones(64)}, "seconds": 1.5}
    return Checkpoint(step, {"model": weights(0.0), "ema-0.9": weights(0.1), "ema-0.5": weights(0.2)}, state)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", CONFIG, FACTS)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def everything(path: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_a_run_opens_as_it_was_created(folder: RunFolder) -> None:
    assert RunFolder.open(folder.path) == folder
    record = json.loads((folder.path / "config.json").read_text())
    assert set(record) == {"perrin", "config", "data"}


def test_facts_without_levels_and_classes_survive(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG, Facts((3,), None, None, 9))
    assert RunFolder.open(tmp_path).facts == Facts((3,), None, None, 9)


def test_the_leftover_of_a_killed_creation_does_not_make_a_folder_foreign(tmp_path: Path) -> None:
    (tmp_path / ".config.tmp.json").write_text("{")
    RunFolder.create(tmp_path, CONFIG, FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_with_other_things_is_neither_made_nor_opened_as_a_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty and holds no run"):
        RunFolder.create(tmp_path, CONFIG, FACTS)
    with pytest.raises(RunError, match=r"is no run: it has no config\.json"):
        RunFolder.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_is_not_made_twice_nor_in_a_file(folder: RunFolder) -> None:
    with pytest.raises(RunError, match="already holds a run"):
        RunFolder.create(folder.path, CONFIG, FACTS)
    file = folder.path / "config.json"
    with pytest.raises(RunError, match="is a file: a run needs a folder"):
        RunFolder.create(file, CONFIG, FACTS)
    with pytest.raises(RunError, match="cannot make the run folder"):
        RunFolder.create(file / "below", CONFIG, FACTS)


@pytest.mark.parametrize("text", ['{"config": {}, "da', "[]", '{"config": {}}', '{"config": {}, "data": 3}'])
def test_a_damaged_config_is_named(folder: RunFolder, text: str) -> None:
    (folder.path / "config.json").write_text(text)
    with pytest.raises(RunError, match=r"config\.json is damaged .*; restore it from a copy"):
        RunFolder.open(folder.path)


def test_a_config_of_another_version_is_named_with_its_key(folder: RunFolder) -> None:
    record = json.loads((folder.path / "config.json").read_text())
    record["config"]["training"]["sparkle"] = 1
    (folder.path / "config.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"config\.json: unknown key training\.sparkle"):
        RunFolder.open(folder.path)


def test_revise_records_a_longer_budget_and_refuses_another_model(folder: RunFolder) -> None:
    longer = replace(CONFIG, training=replace(CONFIG.training, steps=30_000))
    assert folder.revise(longer).config == longer
    assert RunFolder.open(folder.path).config == longer
    other = replace(CONFIG, training=replace(CONFIG.training, lr=1.0))
    with pytest.raises(RunError, match=r"training\.lr is 0\.0004, asked for 1\.0"):
        folder.revise(other)
    assert RunFolder.open(folder.path).config == longer


def test_a_checkpoint_comes_back_as_it_was(folder: RunFolder) -> None:
    folder.save_checkpoint(checkpoint(1000))
    assert sorted(p.name for p in (folder.path / "checkpoints" / "step-00001000").iterdir()) == [
        "ema-0.5.safetensors",
        "ema-0.9.safetensors",
        "model.safetensors",
        "state.pt",
    ]
    found = folder.load_checkpoint()
    assert found.step == 1000
    torch.testing.assert_close(found.weights, checkpoint(1000).weights, rtol=0, atol=0)
    assert found.state["seconds"] == 1.5
    assert found.state["optimizer"]["betas"] == (0.9, 0.99)


def test_state_is_readable_without_running_code(folder: RunFolder) -> None:
    path = folder.save_checkpoint(checkpoint(1)) / STATE_FILE
    state = torch.load(path, weights_only=True)
    assert state["step"] == 1


def test_weights_that_share_memory_are_written_whole(folder: RunFolder) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    shared = {"rows": base, "columns": base.T, "first": base[0]}
    folder.save_checkpoint(Checkpoint(1, {"model": shared, "ema-0.9": shared, "ema-0.5": shared}, {}))
    found, _, _ = folder.load_weights(weights="model")
    torch.testing.assert_close(found, shared, rtol=0, atol=0)


def test_the_first_average_of_the_newest_checkpoint_is_the_default(folder: RunFolder) -> None:
    for step in (1, 2):
        folder.save_checkpoint(checkpoint(step))
    state, name, step = folder.load_weights()
    assert (name, step) == ("ema-0.9", 2)
    assert state["weight"][0].item() == pytest.approx(2.1)
    assert folder.load_weights(1, "model")[0]["weight"][0].item() == 1.0


def test_unknown_weights_and_steps_list_what_there_is(folder: RunFolder) -> None:
    folder.save_checkpoint(checkpoint(7))
    with pytest.raises(RunError, match=r"one of ema-0\.9, ema-0\.5, model, got ema-0\.99"):
        folder.load_weights(weights="ema-0.99")
    with pytest.raises(RunError, match="no checkpoint of step 8, only of 7"):
        folder.load_weights(8)


def test_a_run_without_checkpoints_says_so(folder: RunFolder) -> None:
    assert folder.checkpoints() == []
    with pytest.raises(RunError, match="has no checkpoint yet"):
        folder.load_weights()
    with pytest.raises(RunError, match="has no checkpoint yet"):
        folder.load_checkpoint()


def test_the_newest_stay_and_killed_writes_are_cleaned_up(folder: RunFolder) -> None:
    folder.save_checkpoint(checkpoint(1))
    leftover = folder.path / "checkpoints" / ".step-00000009.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_text("half")
    assert folder.checkpoints() == [1]
    for step in (2, 3):
        folder.save_checkpoint(checkpoint(step))
    names = sorted(path.name for path in (folder.path / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000003"]


def test_a_pinned_checkpoint_stays_and_is_read_like_any_other(folder: RunFolder) -> None:
    for step in (1, 2):
        folder.save_checkpoint(checkpoint(step))
    folder.pin(1)
    folder.pin(1)
    for step in (3, 4):
        folder.save_checkpoint(checkpoint(step))
    assert folder.checkpoints() == [1, 3, 4]
    found = folder.load_checkpoint(1)
    torch.testing.assert_close(found.weights, checkpoint(1).weights, rtol=0, atol=0)
    with pytest.raises(RunError, match=r"step-00000002.*cannot be written: No such file"):
        folder.pin(2)


def test_a_calibration_is_kept_before_another_takes_its_place(folder: RunFolder) -> None:
    assert folder.calibrations() == []
    assert folder.keep_calibration("one") is None
    folder.calibration_path.write_text("one")
    assert folder.keep_calibration("one") is None
    assert folder.calibrations() == [folder.calibration_path]
    kept = folder.keep_calibration("two")
    assert kept is not None
    assert kept.read_text() == folder.calibration_path.read_text() == "one"
    assert folder.calibrations() == [folder.calibration_path, kept]
    folder.calibration_path.unlink()
    assert folder.calibrations() == [kept]


def test_calibrations_are_listed_newest_first(folder: RunFolder) -> None:
    kept = []
    for age, (content, successor) in enumerate([("one", "two"), ("two", "three"), ("three", "four")]):
        folder.calibration_path.write_text(content)
        path = folder.keep_calibration(successor)
        assert path is not None
        os.utime(path, (age, age))
        kept.append(path)
    assert folder.calibrations() == [folder.calibration_path, *reversed(kept)]


def test_a_write_that_fails_leaves_the_old_checkpoints(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        folder.save_checkpoint(checkpoint(step))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=r"step-00000003: the checkpoint cannot be written.*No space left"):
        folder.save_checkpoint(checkpoint(3))
    assert folder.checkpoints() == [1, 2]
    monkeypatch.undo()
    folder.save_checkpoint(checkpoint(3))
    assert folder.checkpoints() == [2, 3]


def test_a_checkpoint_is_never_overwritten(folder: RunFolder) -> None:
    folder.save_checkpoint(checkpoint(1))
    with pytest.raises(RunError, match=r"step-00000001 exists already"):
        folder.save_checkpoint(checkpoint(1))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "ema-0.9.safetensors", "ema-0.5.safetensors", STATE_FILE]
)
def test_a_checkpoint_cut_in_half_is_named_with_the_remedy(folder: RunFolder, name: str) -> None:
    for step in (5, 10):
        cut_path = folder.save_checkpoint(checkpoint(step)) / name
    cut(cut_path)
    before = everything(folder.path)
    with pytest.raises(
        RunError, match=rf"{name} is damaged .*; delete .*step-00000010 to go back to step 5$"
    ):
        folder.load_checkpoint()
    assert everything(folder.path) == before
    assert folder.load_checkpoint(5).step == 5


@pytest.mark.parametrize("name", ["ema-0.9.safetensors", STATE_FILE])
def test_a_missing_file_of_the_only_checkpoint_is_named(folder: RunFolder, name: str) -> None:
    (folder.save_checkpoint(checkpoint(5)) / name).unlink()
    with pytest.raises(RunError, match=rf"{name} is missing; delete .*step-00000005 to start again$"):
        folder.load_checkpoint()


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"not a zip file"])
def test_any_other_damage_of_the_state_is_named_too(folder: RunFolder, content: bytes) -> None:
    (folder.save_checkpoint(checkpoint(5)) / STATE_FILE).write_bytes(content)
    with pytest.raises(RunError, match=r"state\.pt is damaged"):
        folder.load_checkpoint()


def test_damaged_weights_are_named_where_only_they_are_read(folder: RunFolder) -> None:
    cut(folder.save_checkpoint(checkpoint(5)) / "ema-0.9.safetensors")
    with pytest.raises(RunError, match=r"ema-0\.9\.safetensors is damaged"):
        folder.load_weights()
    assert folder.load_weights(weights="model")[2] == 5


def log_of(path: Path, *lines: str) -> MetricsLog:
    path.write_text("".join(lines))
    return MetricsLog(path)


def test_metrics_past_the_step_and_a_torn_line_are_dropped(tmp_path: Path) -> None:
    log = log_of(
        tmp_path / "m", '{"step": 1}\n', '{"step": 2, "loss": 3}\n', '{"step": 3}\n', '{"step": 4, "lo'
    )
    log.rewind(2)
    assert log.path.read_text() == '{"step": 1}\n{"step": 2, "loss": 3}\n'
    log.append({"step": 3, "loss": 0.5})
    assert log.rows()[-1] == {"step": 3, "loss": 0.5}


def test_metrics_torn_by_a_crash_of_the_machine_are_read(tmp_path: Path) -> None:
    log = log_of(tmp_path / "m", '{"step": 1}\n', "\x00\x00\x00\n")
    assert log.rows() == [{"step": 1}]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    log = log_of(tmp_path / "m", '{"step": 1}\n', "gone\n", '{"step": 3}\n')
    with pytest.raises(RunError, match="line 2 is damaged; delete that line"):
        log.rewind(5)
    assert log.path.read_text().count("\n") == 3


def test_metrics_stay_json_where_a_figure_is_not_finite(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m")
    log.append({"step": 1, "held_out_bpd_se": float("nan")})
    assert json.loads(log.path.read_text(), parse_constant=pytest.fail) == {
        "step": 1,
        "held_out_bpd_se": None,
    }
