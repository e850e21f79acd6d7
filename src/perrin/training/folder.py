"""The folder of a run: the only place that knows the names of its files."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from perrin.config import RunConfig, decode, differences, encode
from perrin.data import Facts
from perrin.errors import ConfigError, RunError
from perrin.files import is_leftover, write_text, written_aside
from perrin.training.checkpoint import Checkpoint, DamagedFileError, read_state, read_weights
from perrin.training.metrics import MetricsLog
from perrin.training.storage import clear_leftovers, new_directory, remove_directory

_STEP = re.compile(r"step-(\d{8,})")
_PINNED = "pinned"


@dataclass(frozen=True)
class RunFolder:
    """A run on disk: ``config.json``, ``checkpoints/step-00001000/``, ``metrics.jsonl``, ``samples/``, plots."""

    path: Path
    config: RunConfig
    facts: Facts

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, facts: Facts) -> RunFolder:
        """A new run. Raises `RunError` where ``path`` is a file, holds a run, or is not empty."""
        path = Path(path)
        if cls.holds_run(path):
            raise RunError(f"{path} already holds a run: choose another folder, or resume it")
        _refuse_foreign(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            clear_leftovers(path)
        except OSError as error:
            raise RunError(f"{path}: cannot make the run folder: {error.strerror}") from None
        folder = cls(path, config, facts)
        folder._write_config()
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The run at ``path``. Raises `RunError` if there is none, or its ``config.json`` is damaged."""
        path = Path(path)
        if not cls.holds_run(path):
            raise RunError(f"{path} is no run: it has no config.json; `perrin train --out` makes one")
        file = _config_file(path)
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            facts = record["data"]
            names = None if facts["class_names"] is None else tuple(facts["class_names"])
            shape, mark = tuple(facts["shape"]), facts.get("fingerprint", "")
            known = Facts(shape, facts["levels"], names, facts["count"], mark)
            return cls(path, decode(record["config"], str(file)), known)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error) if isinstance(error, ConfigError) else f"{file} is damaged ({error})"
            raise RunError(f"{reason}; restore it from a copy, or train into another folder") from None

    @classmethod
    def holds_run(cls, path: str | Path) -> bool:
        """Whether ``path`` is the folder of a run."""
        return _config_file(Path(path)).exists()

    def revise(self, config: RunConfig) -> RunFolder:
        """The same run under ``config``, which is written; see `check_revision`."""
        self.check_revision(config)
        folder = RunFolder(self.path, config, self.facts)
        if config != self.config:
            folder._write_config()
        return folder

    def check_revision(self, config: RunConfig) -> None:
        """Raise `RunError` where ``config`` differs in more than `RESUMABLE` fields and the place of the data."""
        changes = differences(self.config, config)
        if changes:
            raise RunError(f"{self.path} cannot be resumed with another configuration: {'; '.join(changes)}")

    @property
    def metrics_path(self) -> Path:
        """The figures of training, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def metrics(self) -> MetricsLog:
        """The figures of training, to read and to write."""
        return MetricsLog(self.metrics_path)

    @property
    def samples_dir(self) -> Path:
        """Where sample grids are kept."""
        return self.path / "samples"

    def grid_path(self, step: int) -> Path:
        """The grid of samples drawn after ``step`` steps."""
        return self.samples_dir / f"{_step_name(step)}.png"

    @property
    def loss_plot_path(self) -> Path:
        """The picture of the loss and the held-out bits/dim against the step."""
        return self.path / "loss.png"

    @property
    def samples_plot_path(self) -> Path:
        """The picture of the latest samples."""
        return self.path / "samples.png"

    def likelihood_path(self, data: str | None = None) -> Path:
        """The table of bits per dimension, one row per example of ``data``, by default the held-out part."""
        return self.path / ("likelihood.csv" if data is None else f"likelihood-{Path(data).stem}.csv")

    @property
    def calibration_path(self) -> Path:
        """The variances and timesteps that `perrin calibrate` found."""
        return self.path / "calibration.json"

    def calibrations(self) -> list[Path]:
        """The calibration, if there is one, and behind it those that were set aside, the newest first."""
        present = [self.calibration_path] if self.calibration_path.exists() else []
        aside = sorted(self.path.glob("calibration-*.json"))
        return present + sorted(aside, key=lambda path: path.stat().st_mtime_ns, reverse=True)

    def keep_calibration(self, successor: str) -> Path | None:
        """Copy the calibration, which files may need, before another ``successor`` takes its place; None if same."""
        path = self.calibration_path
        content = path.read_bytes() if path.exists() else b""
        if not content or content == successor.encode():
            return None
        kept = path.with_stem(f"{path.stem}-{blake2b(content, digest_size=4).hexdigest()}")
        with written_aside(kept) as hidden:
            hidden.write_bytes(content)
        return kept

    def report_path(self, suffix: str) -> Path:
        """What was reached, in words (``.md``) or figures (``.json``)."""
        return self.path / f"report{suffix}"

    @property
    def weights_names(self) -> tuple[str, ...]:
        """What `load_weights` knows: the averages, the first one leading, and ``model``, the last weights."""
        return (*(ema_name(rate) for rate in self.config.training.ema), "model")

    def checkpoints(self) -> list[int]:
        """The steps of which there is a checkpoint, ascending."""
        if not self._checkpoints_dir.is_dir():
            return []
        found = (_STEP.fullmatch(path.name) for path in self._checkpoints_dir.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def checkpoint_path(self, step: int) -> Path:
        """The folder of the checkpoint of ``step``."""
        return self._checkpoints_dir / _step_name(step)

    def pin(self, step: int) -> None:
        """Keep the checkpoint of ``step`` whatever is trained later. Raises `RunError` where it cannot."""
        mark = self.checkpoint_path(step) / _PINNED
        try:
            if not mark.exists():
                mark.touch()
        except OSError as error:
            raise RunError(f"{mark} cannot be written: {error.strerror}") from None

    def load_weights(
        self, step: int | None = None, weights: str | None = None
    ) -> tuple[dict[str, Tensor], str, int]:
        """The state dict on the CPU, the name and the step of one set of weights.

        By default the first average of the newest checkpoint. Raises `RunError` when there is no such
        checkpoint or no such name, or when the file is damaged.
        """
        name = self.weights_names[0] if weights is None else weights
        if name not in self.weights_names:
            raise RunError(f"weights must be one of {', '.join(self.weights_names)}, got {name}")
        step = self._known_step(step)
        try:
            return read_weights(self.checkpoint_path(step), name), name, step
        except DamagedFileError as error:
            raise self._damage(step, error) from None

    def load_checkpoint(self, step: int | None = None) -> Checkpoint:
        """A whole checkpoint (the newest by default), on the CPU; raises `RunError` like `load_weights`."""
        step = self._known_step(step)
        folder = self.checkpoint_path(step)
        try:
            weights = {name: read_weights(folder, name) for name in self.weights_names}
            return Checkpoint(step, weights, read_state(folder))
        except DamagedFileError as error:
            raise self._damage(step, error) from None

    def save_checkpoint(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, then delete all but the newest ``keep`` and the pinned. `RunError` where it cannot."""
        target = self.checkpoint_path(checkpoint.step)
        if target.exists():
            raise RunError(f"{target} exists already: does another process train in {self.path}?")
        try:
            self._checkpoints_dir.mkdir(exist_ok=True)
            clear_leftovers(self._checkpoints_dir)
            with new_directory(target) as hidden:
                checkpoint.write(hidden)
            for step in self.checkpoints()[: -self.config.training.keep]:
                if not (self.checkpoint_path(step) / _PINNED).exists():
                    remove_directory(self.checkpoint_path(step))
        except (OSError, SafetensorError) as error:
            raise RunError(f"{target}: the checkpoint cannot be written: {error}") from None
        return target

    @property
    def _checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    def _write_config(self) -> None:
        facts: dict[str, Any] = asdict(self.facts)
        record = {"perrin": _version(), "config": encode(self.config), "data": facts}
        write_text(_config_file(self.path), json.dumps(record, indent=2) + "\n")

    def _known_step(self, step: int | None) -> int:
        steps = self.checkpoints()
        if not steps:
            raise RunError(
                f"{self.path} has no checkpoint yet: the same `perrin train` command goes on with it"
            )
        if step is not None and step not in steps:
            raise RunError(
                f"{self.path} has no checkpoint of step {step}, only of {', '.join(map(str, steps))}"
            )
        return steps[-1] if step is None else step

    def _damage(self, step: int, error: DamagedFileError) -> RunError:
        earlier = [other for other in self.checkpoints() if other < step]
        remedy = f"go back to step {earlier[-1]}" if earlier else "start again"
        return RunError(f"{error}; delete {self.checkpoint_path(step)} to {remedy}")


def ema_name(rate: float) -> str:
    """The name of the average of one rate: ``ema-0.9999``."""
    return f"ema-{rate}"


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def _config_file(path: Path) -> Path:
    return path / "config.json"


def _version() -> str:
    try:
        return version("perrin")
    except PackageNotFoundError:
        return "not installed"


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file: a run needs a folder")
    if path.exists() and any(not is_leftover(entry) for entry in path.iterdir()):
        raise RunError(f"{path} is not empty and holds no run: choose a new folder")
