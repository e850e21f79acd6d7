"""``perrin inspect``: what a run is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from perrin.cli.console import note, report
from perrin.cli.flags import parse
from perrin.errors import RunError

if TYPE_CHECKING:
    from perrin.diffusion import GaussianDiffusion
    from perrin.training import RunFolder


@dataclass(frozen=True)
class Options:
    """Show a run: configuration, data, size, checkpoints, calibration, ends of the schedule, last metrics."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    json: bool = False
    """Print one JSON object instead of text."""


def run(args: Sequence[str]) -> None:
    """Show the run that ``args`` name."""
    options = parse(Options, args, command="inspect")
    from perrin.training import RunFolder

    figures = figures_of(RunFolder.open(options.run))
    report(figures, describe(figures), as_json=options.json)


def figures_of(folder: RunFolder) -> dict[str, Any]:
    """What the run is, as plain values; levels of log-SNR that are infinite are None."""
    from perrin.build import build_model
    from perrin.config import encode

    diffusion, network = build_model(folder.config, folder.facts)
    rows = folder.metrics.rows()
    last = {key: value for row in rows for key, value in row.items()}
    return {
        "run": str(folder.path),
        "config": encode(folder.config),
        "data": asdict(folder.facts),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "checkpoints": folder.checkpoints(),
        "weights": list(folder.weights_names),
        "calibration": calibration_of(folder),
        **schedule_ends(diffusion, folder.facts.levels),
        "metrics": last,
    }


def calibration_of(folder: RunFolder) -> dict[str, Any] | None:
    """What the run's calibration is for, stale if not for the newest checkpoint; None if there is none to use."""
    from perrin.likelihood.calibration import Calibration

    if not folder.calibration_path.exists():
        return None
    try:
        found = Calibration.read(folder.calibration_path)
    except RunError as error:
        note(str(error))
        return None
    return {
        "weights": found.weights,
        "step": found.step,
        "best_steps": found.best_steps,
        "stale": folder.checkpoints()[-1:] != [found.step],
    }


def schedule_ends(diffusion: GaussianDiffusion, levels: int | None) -> dict[str, float | None]:
    """log-SNR (nats) at both ends, and the first step's sigma, also in halves of the distance of two levels.

    A sigma well below 1 half-bin leaves the rounding to the network; above it, to the decoder.
    """
    from perrin.noise import Level

    ends = zip(
        diffusion.sqrt_alphas_cumprod[[0, -1]], diffusion.sqrt_one_minus_alphas_cumprod[[0, -1]], strict=True
    )
    first, last = (Level(float(alpha), float(sigma)) for alpha, sigma in ends)
    return {
        "log_snr_first": first.log_snr,
        "log_snr_last": last.log_snr if last.alpha > 0 else None,
        "sigma_first": first.sigma,
        "sigma_first_half_bins": None if levels is None else first.sigma * (levels - 1),
    }


def describe(figures: dict[str, Any]) -> list[str]:
    """The figures for people."""
    data, last = figures["data"], figures["metrics"]
    names = data["class_names"]
    half_bins = figures["sigma_first_half_bins"]
    lines = [f"run          {figures['run']}"]
    for section, values in figures["config"].items():
        lines.append(f"{section:<13}{', '.join(f'{key} {value}' for key, value in values.items())}")
    lines += [
        f"shape        {tuple(data['shape'])}, {data['levels'] or 'continuous'} levels, "
        f"{len(names) if names else 'no'} classes",
        f"parameters   {figures['parameters']:,}",
        f"log-SNR      {figures['log_snr_first']:.2f} at first, "
        f"{'-inf' if figures['log_snr_last'] is None else _shown(figures['log_snr_last'])} at last",
        f"first sigma  {figures['sigma_first']:.5f}"
        + ("" if half_bins is None else f" = {half_bins:.2f} half-bins"),
        f"checkpoints  {', '.join(map(str, figures['checkpoints'])) or 'none yet'}",
        f"weights      {', '.join(figures['weights'])}",
        f"calibration  {_calibration(figures['calibration'])}",
        "last         "
        + (", ".join(f"{key} {_shown(value)}" for key, value in last.items()) or "no metrics yet"),
    ]
    return lines


def _calibration(found: dict[str, Any] | None) -> str:
    if found is None:
        return "none"
    state = "stale: not of the newest checkpoint" if found["stale"] else "of the newest checkpoint"
    return (
        f"weights {found['weights']} of step {found['step']}, {state}; best with {found['best_steps']} steps"
    )


def _shown(value: float | int | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
