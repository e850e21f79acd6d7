"""``perrin train-classifier``: a classifier of a run's noisy images, which then guides its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from perrin.cli.console import DeviceName, examples, note, pick_device, report
from perrin.cli.flags import check_at_least, named_as_flags, parse
from perrin.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from perrin.build import Run
    from perrin.cli.progress import Bar
    from perrin.data import Dataset
    from perrin.training.classifier import ClassifierFacts
    from perrin.training.classifier_loop import ClassifierConfig, ClassifierProgress, ClassifierTask

DEFAULT_STEPS = 2000


@dataclass(frozen=True)
class Options:
    """Train a classifier of a run's noisy images, by which its samples can be guided to a class.

    The run may be unconditional; its data, or DATA, must have classes. The same command again goes on where it
    stopped, and a larger budget goes on from what was reached.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run whose chain makes the noise."""
    data: tyro.conf.Positional[str | None] = None
    """Data with classes, of the run's shape and levels; by default what the run was trained on."""
    out: Path | None = None
    """Folder of the classifier; by default `classifier` in the run's."""
    steps: int | None = None
    """Budget in optimizer steps; by default 2000, unless --minutes is given."""
    minutes: float | None = None
    """Budget in minutes of training; whichever of the two ends first."""
    batch_size: int = 64
    """Examples per optimizer step."""
    lr: float = 1e-3
    """Learning rate."""
    weight_decay: float = 0.05
    """Weight decay of AdamW."""
    channels: int = 32
    """Width of the first level."""
    channel_mult: tuple[int, ...] | None = None
    """Width of each level, in multiples of --channels; by size if absent."""
    num_res_blocks: int = 1
    """Residual blocks per level."""
    attention_levels: tuple[int, ...] | None = None
    """Levels (0 is full size) with self-attention; those of at most 16 x 16 pixels if absent."""
    num_heads: int = 4
    """Attention heads."""
    dropout: float = 0.1
    """Share of activations dropped in training."""
    patch: int | None = None
    """Side of the squares of pixels that the first level takes as one position; by default 2 for images with even
    sides from 16 pixels on, else 1."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and the noise."""
    device: DeviceName = "auto"
    """Where to compute."""
    json: bool = False
    """Print one JSON object instead of text."""


def run(args: Sequence[str]) -> None:
    """Train the classifier that ``args`` ask for."""
    options = parse(Options, args, command="train-classifier")
    check(options)
    from perrin.build import load_run
    from perrin.cli.progress import Bar
    from perrin.files import claim
    from perrin.training.classifier import FACTS_FILE
    from perrin.training.classifier_loop import train_classifier
    from perrin.training.schedule import Budget

    model = load_run(options.run, device=pick_device(options.device))
    task = task_of(options, model)
    check_task(task)
    claim(task.folder / FACTS_FILE)
    unlimited = options.steps is None and options.minutes is None
    budget = Budget(DEFAULT_STEPS if unlimited else options.steps, options.minutes)
    held_out = len(task.batches().held_out)
    note(
        f"classifier {task.folder}: {len(task.classes)} classes; {examples(len(task.dataset))}, of which {held_out} "
        f"{'is' if held_out == 1 else 'are'} held out; on {model.device}"
    )
    with Bar("training", 1.0) as bar:
        facts = train_classifier(task, budget, partial(show, bar))
    figures = figures_of(options, task.folder, facts)
    report(figures, describe(figures), as_json=options.json)


def check(options: Options) -> None:
    """Refuse what can be refused before anything is loaded, with `ArgumentError`."""
    check_at_least(options, ("steps", "batch_size"))
    if options.minutes is not None and not options.minutes > 0:
        raise ArgumentError(f"--minutes must be above 0, got {options.minutes}")
    if not options.lr > 0:
        raise ArgumentError(f"--lr must be above 0, got {options.lr}")
    if not options.weight_decay >= 0:
        raise ArgumentError(f"--weight-decay must be at least 0, got {options.weight_decay}")


def check_task(task: ClassifierTask) -> None:
    """Raise what training would, before anything is written, with the flags' names for the network's arguments."""
    from perrin.training.classifier import EncoderConfig

    with named_as_flags(*(field.name for field in fields(EncoderConfig))):
        task.check()


def task_of(options: Options, model: Run) -> ClassifierTask:
    """What is to be trained. Raises `DataError` where the data do not fit the run or have no classes."""
    from perrin.build import run_data
    from perrin.training.classifier_loop import ClassifierTask

    dataset, classes = classified(model, run_data(model, options.data), options.data)
    return ClassifierTask(
        folder=options.out or model.folder.path / "classifier",
        config=config_of(options, dataset.facts.shape),
        run=model.folder.config,
        dataset=dataset,
        classes=classes,
        diffusion=model.diffusion,
        device=model.device,
    )


def classified(model: Run, dataset: Dataset, source: str | None) -> tuple[Dataset, tuple[str, ...]]:
    """``dataset`` with labels that are numbers of the classes given: a conditional run's own, else the data's."""
    import torch

    from perrin.build import class_numbers

    names = dataset.facts.class_names
    if dataset.labels is None or names is None:
        raise DataError(
            f"{source or model.folder.config.data.path} has no classes, which a classifier needs "
            "(folders of classes, or labels in a file)"
        )
    numbers = class_numbers(model, dataset, torch.from_numpy(dataset.labels))
    if numbers is None:
        return dataset, names
    return replace(dataset, labels=numbers.numpy()), model.folder.facts.class_names or names


def config_of(options: Options, shape: tuple[int, ...]) -> ClassifierConfig:
    """The network and its training, for data of ``shape``."""
    from perrin.presets import patch_of
    from perrin.training.classifier import EncoderConfig
    from perrin.training.classifier_loop import ClassifierConfig

    return ClassifierConfig(
        encoder=EncoderConfig(
            channels=options.channels,
            channel_mult=options.channel_mult,
            num_res_blocks=options.num_res_blocks,
            attention_levels=options.attention_levels,
            num_heads=options.num_heads,
            dropout=options.dropout,
            patch=patch_of(shape) if options.patch is None else options.patch,
        ),
        batch_size=options.batch_size,
        lr=options.lr,
        weight_decay=options.weight_decay,
        seed=options.seed,
    )


def show(bar: Bar, now: ClassifierProgress) -> None:
    """Take one report of training into ``bar``."""
    figures = f"step {now.step}, cross entropy {now.loss:.3f} nats"
    bar.update(now.progress, figures, left=now.eta_seconds)
    if now.progress >= 1:
        bar.say(f"{figures}; measuring on held-out examples")


def figures_of(options: Options, folder: Path, facts: ClassifierFacts) -> dict[str, Any]:
    """What the classifier reached, as plain values."""
    return {
        "classifier": str(folder),
        "run": str(options.run),
        "step": facts.step,
        "classes": list(facts.classes),
        "accuracy": facts.accuracy,
        "bands": [asdict(band) for band in facts.bands],
    }


def describe(figures: dict[str, Any]) -> list[str]:
    """The figures for people."""
    rows = [
        f"{band['band']:<20} {band['timesteps']:>9} {band['accuracy']:>9.3f} ± {band['standard_error']:.3f}"
        for band in figures["bands"]
    ]
    return [
        f"accuracy on n = {figures['bands'][0]['count']} held-out examples, by noise (nats of log alpha²/sigma²)",
        f"{'noise':<20} {'timesteps':>9} {'accuracy':>9}",
        *rows,
        f"{figures['accuracy']:.3f} at uniform times; {len(figures['classes'])} classes; step {figures['step']}",
        f"classifier {figures['classifier']}: classifier.json and its weights",
    ]
