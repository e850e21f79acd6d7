"""``perrin demo``: train, sample and measure a model of handwritten digits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perrin.cli.console import DeviceName, duration, pick_device, report, with_error
from perrin.cli.flags import parse
from perrin.errors import ArgumentError

if TYPE_CHECKING:
    from perrin.build import Run
    from perrin.cli.bound import Figures
    from perrin.config import RunConfig
    from perrin.data import Dataset
    from perrin.training import RunFolder, TrainEvent

SAMPLES = 100


@dataclass(frozen=True)
class Options:
    """Train a small model of the 8x8 handwritten digits, draw a hundred of them, and measure held-out bits/dim.

    Run again, it only draws and measures."""

    out: Path = Path("runs/digits")
    """Folder of the run."""
    seconds: float | None = None
    """Seconds of training; by default 57."""
    device: DeviceName = "auto"
    """Where to compute."""
    json: bool = False
    """Print one JSON object instead of text."""


def run(args: Sequence[str]) -> None:
    """Run the demonstration."""
    options = parse(Options, args, command="demo")
    if options.seconds is not None and options.seconds <= 0:
        raise ArgumentError(f"--seconds must be above 0, got {options.seconds}")
    from perrin.build import load_run, start_run
    from perrin.cli.bound import measure
    from perrin.cli.measure import Effort, Subject
    from perrin.cli.train import train_session
    from perrin.data import split

    device = pick_device(options.device)
    session = start_run(demo_config(options), options.out)
    event = train_session(session, device=device)
    model = load_run(options.out, device=device)
    draw_digits(model)
    train, held_out = split(len(session.dataset), model.folder.config.data.held_out)
    found = measure(
        Subject(model, model.diffusion),
        session.dataset,
        held_out.tolist(),
        effort=Effort(exact=True),
        out=model.folder.likelihood_path(),
    )
    figures = figures_of(model, event, found, baseline(session.dataset, train.tolist(), held_out.tolist()))
    lines = describe(figures)
    _write_report(model.folder, figures, lines)
    report(figures, lines, as_json=options.json)


def demo_config(options: Options) -> RunConfig:
    """The demonstration's configuration, or that of the digits run which is there already."""
    from perrin.cli.train import saved_config
    from perrin.presets import DEMO

    base = saved_config(options.out) or DEMO
    if base.data.path != DEMO.data.path:
        raise ArgumentError(
            f"--out {options.out} holds a run of {base.data.path}, not of digits: choose another folder"
        )
    if options.seconds is None:
        return base
    return replace(base, training=replace(base.training, minutes=options.seconds / 60))


def draw_digits(model: Run) -> None:
    """Write a grid of digits, the same for the same weights."""
    from perrin.data import to_levels, write_grid
    from perrin.samplers import SamplerDDPM

    shape = (SAMPLES, *model.folder.facts.shape)
    x = SamplerDDPM(model.diffusion).sample(model.network, shape, seed=0, device=model.device)
    levels = model.folder.facts.levels
    write_grid(model.folder.samples_plot_path, to_levels(x, levels), levels, columns=10)


def baseline(dataset: Dataset, train: list[int], held_out: list[int]) -> tuple[float, float]:
    """Bits/dim of the held-out digits under a histogram per pixel, and its standard error."""
    from perrin.evaluation.baseline import histogram_bpd

    return histogram_bpd(dataset.values[train], dataset.values[held_out], int(dataset.values.max()) + 1)


def figures_of(
    model: Run, event: TrainEvent, found: Figures, histogram: tuple[float, float]
) -> dict[str, Any]:
    """What the demonstration reached, as plain values."""
    return {
        **asdict(found),
        "histogram_bpd": histogram[0],
        "histogram_bpd_se": histogram[1],
        "train_steps": event.step,
        "train_seconds": event.seconds,
        "run": str(model.folder.path),
    }


def describe(figures: dict[str, Any]) -> list[str]:
    """The figures for people."""
    return [
        f"held-out     {with_error(figures['bpd'], figures['bpd_se'])} (n = {figures['n']}): "
        f"{figures['prior_bpd']:.4f} prior + {figures['vb_bpd']:.3f} KL + {figures['decoder_bpd']:.3f} decoder",
        f"histograms   {with_error(figures['histogram_bpd'], figures['histogram_bpd_se'])}: one per pixel, "
        "the simplest model",
        f"training     {figures['train_steps']} steps in {duration(figures['train_seconds'])}; measured over all "
        f"T = {figures['num_timesteps']} steps in {duration(figures['seconds'])}, weights {figures['weights']}",
        f"pictures     {figures['run']}/samples.png, {figures['run']}/loss.png",
    ]


def _write_report(folder: RunFolder, figures: dict[str, Any], lines: list[str]) -> None:
    from perrin.files import write_text

    write_text(folder.report_path(".json"), json.dumps(figures, indent=2) + "\n")
    picture = f"![samples]({folder.samples_plot_path.name})"
    text = ["# Handwritten digits", "", picture, "", *(f"- {line}" for line in lines)]
    write_text(folder.report_path(".md"), "\n".join(text) + "\n")
