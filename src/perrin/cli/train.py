"""``perrin train``: a new run, or the next stretch of one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import tyro

from perrin.cli.console import DeviceName, duration, note, pick_device, report, with_error
from perrin.cli.flags import check_at_least, parse, parse_known
from perrin.cli.overrides import ConfigFlags, registry, short_flags, with_network
from perrin.config import RunConfig, decode, read_toml
from perrin.presets import PRESETS

if TYPE_CHECKING:
    import torch

    from perrin.build import Session
    from perrin.training import RunFolder, TrainEvent

Preset = Literal["likelihood"]
"""The keys of `PRESETS`, written out for ``--help``."""


@dataclass(frozen=True)
class Options:
    """Train a model on DATA. The same command again goes on with the run, whose saved configuration then gives the
    defaults. Keys may also be written as in a TOML file: training.lr=1e-3."""

    run: Annotated[ConfigFlags, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder of the run; by default `runs/` and the name of DATA."""
    config: Path | None = None
    """TOML file with the sections [data], [diffusion], [network] and [training]; flags go before it."""
    preset: Preset | None = None
    """Named defaults: likelihood, for the fewest bits/dim in a few minutes. Flags and the file go before it; what it
    leaves open (None) is chosen by the data when the run begins."""
    device: DeviceName = "auto"
    """Where to compute."""
    stop_at: int | None = None
    """End this session after so many steps in all, with a checkpoint; the run can go on later."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class Origin:
    """The flags that decide where the defaults of all others come from."""

    out: Path | None = None
    config: Path | None = None
    preset: Preset | None = None
    kind: str | None = None


def run(args: Sequence[str]) -> None:
    """Train what ``args`` ask for."""
    args = short_flags(args)
    out = parse_known(Origin, args).out or default_folder(read(args, None))
    options = read(args, out)
    check_at_least(options, ("stop_at",))
    config = with_absolute_path(decode(options.run.values, "command line"))
    from perrin.build import start_run

    device = pick_device(options.device)
    session = start_run(config, out)
    event = train_session(session, device=device, stop_at=options.stop_at)
    report(figures_of(session.folder, event), describe(session.folder, event), as_json=options.json)


def read(args: Sequence[str], out: Path | None) -> Options:
    """The options in ``args``, over the configuration of the file they name, else of a run in ``out``."""
    flags = parse_known(Origin, args)
    saved = saved_config(out)
    rules = registry(
        with_network(base_config(flags, saved), flags.kind),
        require_data=saved is None and flags.config is None,
    )
    return parse(Options, args, command="train", registry=rules)


def base_config(flags: Origin, saved: RunConfig | None) -> RunConfig:
    """The defaults of all flags: the file's over the preset's; without either those of the ``saved`` run."""
    base = saved if flags.config is None else None
    if flags.preset is not None:
        preset = PRESETS[flags.preset]
        base = preset if saved is None else replace(preset, data=saved.data)
    if flags.config is not None:
        return read_toml(flags.config, base)
    return base or RunConfig()


def default_folder(options: Options) -> Path:
    """Where the run goes that was not told: ``runs/`` and the name of the data, less suffixes."""
    return Path("runs") / Path(options.run.values["data"]["path"]).expanduser().absolute().name.split(".")[0]


def with_absolute_path(config: RunConfig) -> RunConfig:
    """``config`` with a data path that means the same in every working directory."""
    if config.data.path == "digits":
        return config
    path = Path(config.data.path).expanduser().absolute()
    return replace(config, data=replace(config.data, path=str(path)))


def saved_config(out: Path | None) -> RunConfig | None:
    """The configuration of the run in ``out``, if there is one."""
    if out is None or not out.exists():
        return None
    from perrin.training import RunFolder

    return RunFolder.open(out).config if RunFolder.holds_run(out) else None


def train_session(session: Session, *, device: torch.device, stop_at: int | None = None) -> TrainEvent:
    """Train, with the progress on standard error; leaves ``loss.png`` and ``samples.png`` in the run's folder."""
    from perrin.training import train

    folder = session.folder
    note(f"run {folder.path}: {len(session.dataset)} examples of shape {folder.facts.shape}, on {device}")
    with Display(folder) as display:
        event = train(
            folder,
            diffusion=session.diffusion,
            network=session.network,
            dataset=session.dataset,
            device=device,
            report=display.follow,
            stop_at=stop_at,
        )
    display.draw(event)
    return event


class Display:
    """Shows the events of training."""

    def __init__(self, folder: RunFolder) -> None:
        from perrin.cli.progress import Bar

        self.folder = folder
        self.bar = Bar("training", 1.0)
        self.drawn: int | None = None

    def __enter__(self) -> Self:
        self.bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.__exit__()

    def follow(self, event: TrainEvent) -> None:
        """Take in one event."""
        if event.kind == "start" and event.step > 0:
            self.bar.say(f"going on from the checkpoint of step {event.step}")
        if event.kind == "evaluation":
            self.bar.say(figures_line(event))
            self.draw(event)
        self.bar.update(event.progress, figures_line(event), left=event.eta_seconds)

    def draw(self, event: TrainEvent) -> None:
        """Bring the pictures of the run up to date."""
        from perrin.evaluation.plots import plot_training

        rows = self.folder.metrics.rows()
        if rows and event.step != self.drawn:
            plot_training(rows, self.folder.loss_plot_path)
        if event.grid is not None:
            shutil.copyfile(event.grid, self.folder.samples_plot_path)
        self.drawn = event.step


def figures_line(event: TrainEvent) -> str:
    """Step, loss and speed."""
    total = "" if event.total_steps is None else f"/{event.total_steps}"
    parts = [f"step {event.step}{total}"]
    parts += [] if event.loss is None else [f"loss {event.loss:.4g}"]
    parts += [] if event.images_per_second is None else [f"{event.images_per_second:.0f} examples/s"]
    if event.held_out_bpd is not None:
        parts.append(f"held-out {with_error(event.held_out_bpd, event.held_out_bpd_se)}")
    return ", ".join(parts)


def figures_of(folder: RunFolder, event: TrainEvent) -> dict[str, Any]:
    """What training reached, as plain values."""
    return {
        "run": str(folder.path),
        "step": event.step,
        "finished": event.progress >= 1,
        "seconds": event.seconds,
        "loss": event.loss,
        "held_out_bpd": event.held_out_bpd,
        "held_out_bpd_se": event.held_out_bpd_se,
        "checkpoints": folder.checkpoints(),
    }


def describe(folder: RunFolder, event: TrainEvent) -> list[str]:
    """What training reached, for people."""
    state = "finished" if event.progress >= 1 else "stopped: the same command without --stop-at goes on"
    return [
        f"{figures_line(event)}; {duration(event.seconds)} of training; {state}",
        f"run {folder.path}: loss.png, samples/, checkpoints of step {', '.join(map(str, folder.checkpoints()))}",
    ]
