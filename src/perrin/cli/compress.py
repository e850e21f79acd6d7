"""``perrin compress``: a data set as a file from which `perrin decompress` restores it bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from perrin.cli.console import note, report
from perrin.cli.flags import check_at_least, parse
from perrin.cli.measure import Subject, held_out
from perrin.errors import ArgumentError, RunError

if TYPE_CHECKING:
    from torch import Tensor

    from perrin.build import Run
    from perrin.codec import Compressed
    from perrin.data import Dataset


@dataclass(frozen=True)
class Options:
    """Compress images or arrays without loss, with a run as the model.

    Data like the run's take about as many bits as `perrin likelihood` says for the same steps. Keep the run: the file
    can be read only with the same weights, and the run keeps their checkpoint from now on. Computed on the CPU in
    float64, whatever device there is, so that other machines can read it."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    data: tyro.conf.Positional[str | None] = None
    """Data of the run's shape and levels; by default the part that the run held out."""
    out: Path | None = None
    """File to write; by default the name of the data with .perrin, in the current folder."""
    steps: int | None = None
    """Timesteps of the chain, evenly spaced unless --calibrated; by default all T. Fewer are faster and, unless
    calibrated, take more bits: for speed, `--calibrated --steps 16` to 64."""
    calibrated: bool = False
    """Use the variances and timesteps of `perrin calibrate`; without --steps, as many as were best."""
    limit: int | None = None
    """Compress the first so many examples only."""
    weights: str | None = None
    """Which weights: `model`, or an average such as `ema-0.9999`; by default the first average."""
    checkpoint: int | None = None
    """Step of the checkpoint; by default the newest."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class Figures:
    """What was written, and how."""

    file: str
    n: int
    file_bytes: int
    raw_bytes: int
    """Of the values, in whole bytes each."""
    file_bpd: float
    """Bits of the whole file per value."""
    net_bpd: float
    """Bits that the values took: without the initial bits, the header and the hash."""
    initial_bits: int
    header_bytes: int
    """Of names, labels and all else that is not coded values."""
    batched_network_calls: int
    """One for each batch of examples and step."""
    seconds: float
    steps: int
    num_timesteps: int
    calibrated: bool
    levels: int
    weights: str
    step: int
    pinned: bool
    """Whether the run keeps this checkpoint from now on."""


def run(args: Sequence[str]) -> None:
    """Compress what ``args`` ask for."""
    options = parse(Options, args, command="compress")
    check_at_least(options, ("limit",))
    out = options.out or Path(default_name(options))
    claim_new(out)
    from perrin.codec import require
    from perrin.files import written_aside

    require()
    model = Subject.load(
        options.run,
        weights=options.weights,
        checkpoint=options.checkpoint,
        steps=options.steps,
        calibrated=options.calibrated,
        device="cpu",
    )
    dataset = model.data(options.data)
    indices = held_out(model.run, len(dataset)) if options.data is None else list(range(len(dataset)))
    dataset = subset(dataset, indices[: options.limit])
    note(f"compressing {len(dataset)} examples with weights {model.run.weights} of step {model.run.step}")
    started = time.monotonic()
    pinned = pin(model.run)
    made = compressed(model, dataset)
    with written_aside(out) as aside:
        aside.write_bytes(made.content)
    figures = figures_of(model, dataset, made, out=out, pinned=pinned, seconds=time.monotonic() - started)
    report(asdict(figures), describe(figures, model.chain_text), as_json=options.json)


def default_name(options: Options) -> str:
    """The name of the data, with .perrin instead of its ending."""
    stem = f"{options.run.resolve().name}-held-out" if options.data is None else Path(options.data).stem
    return f"{stem or 'data'}.perrin"


def claim_new(out: Path) -> None:
    """Make sure, before long work, that ``out`` can be written and is not there yet. Nothing is left behind."""
    from perrin.files import claim

    if out.exists():
        raise ArgumentError(f"{out} exists, and nothing is overwritten: choose another --out")
    place = next(folder for folder in out.absolute().parents if folder.exists())
    claim(place / out.name)


def pin(run: Run) -> bool:
    """Have the run keep its checkpoint, without which the file is lost; whether it does."""
    try:
        run.folder.pin(run.step)
    except RunError as error:
        note(f"{error}: further training may delete the checkpoint of step {run.step}, which the file needs")
        return False
    return True


def subset(dataset: Dataset, indices: Sequence[int]) -> Dataset:
    """The examples ``indices`` of ``dataset``."""
    rows = list(indices)
    labels = None if dataset.labels is None else dataset.labels[rows]
    facts = replace(dataset.facts, count=len(rows))
    return replace(
        dataset,
        values=dataset.values[rows],
        labels=labels,
        names=[dataset.names[i] for i in rows],
        facts=facts,
    )


def compressed(model: Subject, dataset: Dataset) -> Compressed:
    """The file of ``dataset``, with a bar while it is made."""
    from perrin.cli.progress import Bar
    from perrin.codec import Recipe, compress

    with Bar("compressing", 1.0) as bar:
        return compress(
            model.chain,
            model.run.network,
            dataset,
            recipe=Recipe(model.run.weights, model.run.step, model.calibrated),
            classes=classes_of(model.run, dataset),
            advance=shown_on(bar.update),
        )


def shown_on(update: Callable[[float], None]) -> Callable[[int, int], None]:
    """What tells a bar of total 1 how many of all network calls were made."""
    return lambda calls, total: update(calls / total)


def classes_of(run: Run, dataset: Dataset) -> Tensor | None:
    """What the network is told of the examples, (N,); None if it is unconditional."""
    import torch

    from perrin.build import told_classes

    labels = None if dataset.labels is None else torch.from_numpy(dataset.labels)
    return told_classes(run, dataset, labels, dataset.facts.count)


def figures_of(
    model: Subject, dataset: Dataset, made: Compressed, *, out: Path, pinned: bool, seconds: float
) -> Figures:
    """The figures of the file ``made``."""
    values = dataset.values.size
    return Figures(
        file=str(out),
        n=len(dataset),
        file_bytes=len(made.content),
        raw_bytes=dataset.values.nbytes,
        file_bpd=8 * len(made.content) / values,
        net_bpd=made.coded.net_bits / values,
        initial_bits=made.coded.initial_bits,
        header_bytes=len(made.content) - len(made.coded.payload),
        batched_network_calls=made.coded.network_calls,
        seconds=seconds,
        steps=model.chain.num_timesteps,
        num_timesteps=model.run.diffusion.num_timesteps,
        calibrated=model.calibrated,
        levels=dataset.facts.levels or 0,
        weights=model.run.weights,
        step=model.run.step,
        pinned=pinned,
    )


def describe(figures: Figures, chain: str) -> list[str]:
    """The figures for people."""
    initial = -(-figures.initial_bits // 8)
    kept = ["the run keeps this checkpoint from now on: the file needs it"] if figures.pinned else []
    return [
        f"{figures.file}: {figures.file_bytes} bytes for {figures.n} examples of {figures.raw_bytes} bytes",
        f"  {figures.file_bpd:.3f} bits/dim in the file, {figures.net_bpd:.3f} net",
        f"  beside the net bits: {figures.header_bytes + initial} bytes of header and initial bits "
        f"({figures.header_bytes} + {initial}), shared by all examples",
        f"{chain}, {figures.levels} levels; weights {figures.weights} of step {figures.step}; "
        f"{figures.batched_network_calls} batched network calls; {figures.seconds:.1f} s",
        *kept,
    ]
