"""What each part of the likelihood preset is worth: held-out bits/dim of the 8x8 digits at equal CPU-seconds.

Four choices are crossed: the schedule, how the network tells levels apart, the variance of the reverse step, and the
loss; all else is the preset's. A row ends after so many seconds of this process's CPU time in training, in which time
spent waiting for a core does not count, and is then measured with the same noise as every other row.

    python benchmarks/ablation.py [--seconds 60] [--changes 1] [--loss bound] [--out ablation.json] [--json]

``--changes N`` keeps the rows that differ from the preset in at most N choices, ``--schedule`` and so on those with
the values named. Rows that ``--out`` already holds for the same settings are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perrin.build import build_model
from perrin.config import DataConfig, RunConfig
from perrin.data import Dataset, load
from perrin.diffusion import GaussianDiffusion
from perrin.files import write_text
from perrin.likelihood import bound, mean_and_error
from perrin.presets import LIKELIHOOD, resolved
from perrin.training.state import TrainingState
from perrin.training.step import Batches, StepRecord, backward, network_call, seed_dropout

CHOICES: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "schedule": {
        "log-snr-linear": {},
        "cosine": {"diffusion": {"schedule": "cosine"}},
    },
    "input": {
        "beliefs": {},
        "fourier": {
            "network": {"level_basis": 0, "fourier": None, "input_skip": True},
            "diffusion": {"mean_type": "epsilon"},
        },
        "plain": {
            "network": {"level_basis": 0, "fourier": (), "input_skip": True},
            "diffusion": {"mean_type": "epsilon"},
        },
    },
    "variance": {
        "learned-range": {},
        "fixed-small": {"diffusion": {"var_type": "fixed-small"}},
    },
    "loss": {
        "bound": {},
        "hybrid": {"diffusion": {"loss": "rescaled-mse"}},
    },
}
"""Choice → value → what it changes in the configuration; the first value of each is the preset's."""

TERMS = 60
"""Terms of the bound drawn for each image."""


@dataclass(frozen=True)
class Settings:
    """What rows must share to be compared."""

    seconds: float
    seed: int
    timesteps: int


@dataclass(frozen=True)
class Row:
    """One model: its choices, what training it took, and its bits/dim with the standard error over images."""

    choices: dict[str, str]
    settings: Settings
    steps: int
    bpd: float
    bpd_se: float
    train_bpd: float
    """Of as many training images."""


def changes(choices: dict[str, str]) -> int:
    """In how many choices a row differs from the preset."""
    return sum(value != next(iter(CHOICES[name])) for name, value in choices.items())


def asked_rows(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """The choices of the rows that the flags ask for, the preset first."""
    values = [getattr(args, name) or list(known) for name, known in CHOICES.items()]
    rows = [dict(zip(CHOICES, row, strict=True)) for row in product(*values)]
    return (row for row in sorted(rows, key=changes) if changes(row) <= args.changes)


def config_of(choices: dict[str, str], settings: Settings) -> RunConfig:
    """The preset with a row's choices."""
    config = replace(LIKELIHOOD, data=DataConfig(path="digits", held_out=0.2))
    config = replace(config, training=replace(config.training, seed=settings.seed))
    config = replace(config, diffusion=replace(config.diffusion, num_timesteps=settings.timesteps))
    for name, value in choices.items():
        for section, changed in CHOICES[name][value].items():
            config = replace(config, **{section: replace(getattr(config, section), **changed)})
    return config


def run(choices: dict[str, str], settings: Settings, dataset: Dataset) -> Row:
    """Train one row and measure it."""
    config = resolved(config_of(choices, settings), dataset.facts.shape, dataset.facts.levels)
    diffusion, network = build_model(config, dataset.facts)
    batches = Batches(dataset, config, torch.device("cpu"))
    state = TrainingState(network.train(), diffusion, config.training)
    train(state, diffusion, batches, settings.seconds)
    averaged = state.averaged_network()
    held_out = batches.held_out.tolist()
    bpd, error = mean_and_error(bits(diffusion, averaged, dataset, held_out))
    trained = bits(diffusion, averaged, dataset, batches.train[: len(held_out)].tolist())
    return Row(choices, settings, state.step, bpd, error, trained.mean().item())


def train(state: TrainingState, diffusion: GaussianDiffusion, batches: Batches, seconds: float) -> None:
    """Steps as ``perrin train`` takes them, with a budget in CPU time."""
    config, device = batches.config.training, batches.device
    model = network_call(state.network, config.precision, device)
    began = time.process_time()
    while (spent := (time.process_time() - began) / seconds) < 1:
        warm = min(1.0, (state.step + 1) / config.warmup_steps)
        draw = batches.draw(state.step, state.t_sampler)
        seed_dropout(device, config.seed, state.step)
        state.network.zero_grad(set_to_none=True)
        terms = backward(diffusion, model, draw, config.microbatch)
        record = StepRecord.of(state.step + 1, draw, terms, state.network)
        state.apply(config.lr * warm * 0.5 * (1 + math.cos(math.pi * spent)), record)


@torch.no_grad()
def bits(
    diffusion: GaussianDiffusion, network: nn.Module, dataset: Dataset, indices: list[int]
) -> torch.Tensor:
    """Bits/dim of each image."""
    x_start, _ = dataset.batch(indices, "cpu")
    return bound(diffusion, network, x_start, indices=indices, terms=TERMS).total


def saved_rows(path: Path | None) -> list[Row]:
    """The rows in a file of an earlier call, if there is one."""
    if path is None or not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [Row(**{**row, "settings": Settings(**row["settings"])}) for row in rows]


def markdown(rows: list[Row]) -> str:
    """The table, best first."""
    head = [*CHOICES, "steps", "held-out bits/dim", "train"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in sorted(rows, key=lambda row: row.bpd):
        values = [
            *row.choices.values(),
            row.steps,
            f"{row.bpd:.3f} ± {row.bpd_se:.3f}",
            f"{row.train_bpd:.3f}",
        ]
        lines.append(f"| {' | '.join(map(str, values))} |")
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="CPU-seconds of training for each row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timesteps", type=int, default=LIKELIHOOD.diffusion.num_timesteps)
    parser.add_argument("--changes", type=int, default=len(CHOICES), help="most choices unlike the preset's")
    for name, values in CHOICES.items():
        parser.add_argument(f"--{name}", nargs="+", choices=list(values), help="all of them by default")
    parser.add_argument("--out", type=Path, help="JSON file that keeps the rows")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


def main() -> None:
    args = parsed()
    torch.set_num_threads(1)
    settings = Settings(args.seconds, args.seed, args.timesteps)
    dataset, kept, asked = load("digits"), saved_rows(args.out), list(asked_rows(args))
    for choices in asked:
        if not any((row.choices, row.settings) == (choices, settings) for row in kept):
            kept.append(run(choices, settings, dataset))
            if args.out is not None:
                write_text(args.out, json.dumps([asdict(row) for row in kept], indent=2) + "\n")
    rows = [row for row in kept if row.choices in asked and row.settings == settings]
    print(json.dumps([asdict(row) for row in rows]) if args.json else markdown(rows))


if __name__ == "__main__":
    main()
