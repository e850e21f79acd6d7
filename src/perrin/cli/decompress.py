"""``perrin decompress``: the data set in a file of `perrin compress`, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from perrin.cli.compress import claim_new, classes_of, shown_on
from perrin.cli.console import note, report
from perrin.cli.flags import parse
from perrin.cli.measure import Subject
from perrin.errors import DataError, PerrinError

if TYPE_CHECKING:
    from torch import Tensor

    from perrin.build import Run
    from perrin.codec import File, Header
    from perrin.data import Dataset
    from perrin.diffusion import GaussianDiffusion


@dataclass(frozen=True)
class Options:
    """Restore what `perrin compress` wrote, with the same run as the model.

    Which weights and which chain it was, the file says. Nothing is written unless every value was verified."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    file: tyro.conf.Positional[Path]
    """The .perrin file."""
    out: Path | None = None
    """.npy or .npz file to write, or a new folder for PNG files; by default the file's name with .npz if it holds
    labels or names, else .npy, in the current folder. Values come back bit for bit, as uint8 or uint16 whatever the
    type was (bool is uint8), images in arrays as (N, C, H, W): what was given as (N, H, W) is (N, 1, H, W)."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class Figures:
    """What was restored."""

    out: str
    n: int
    shape: tuple[int, ...]
    levels: int
    dtype: str
    seconds: float


def run(args: Sequence[str]) -> None:
    """Restore what ``args`` ask for."""
    options = parse(Options, args, command="decompress")
    from perrin.codec import read, require
    from perrin.codec.restore import write

    require()
    file = read(options.file)
    out = options.out or Path(default_name(options.file, file.header))
    check_out(out, file.header)
    model = model_of(options.run, file.header, options.file)
    started = time.monotonic()
    dataset = decompressed(model, file)
    write(out, dataset, file.header)
    figures = Figures(
        out=str(out),
        n=len(dataset),
        shape=dataset.facts.shape,
        levels=file.header.levels,
        dtype=dataset.values.dtype.name,
        seconds=time.monotonic() - started,
    )
    report(asdict(figures), describe(figures), as_json=options.json)


def default_name(file: Path, header: Header) -> str:
    """The file's name, ending as what it holds asks for."""
    return file.stem + (".npz" if header.labels or header.names else ".npy")


def check_out(out: Path, header: Header) -> None:
    """Raise `ArgumentError` where the data cannot be written to ``out``; tell what it will not hold."""
    from perrin.codec.restore import check_target

    check_target(out, header)
    if out.suffix:
        claim_new(out)
    if header.labels and out.suffix != ".npz":
        note(f"{out} will not hold the labels as numbers: .npz does")


def model_of(path: Path, header: Header, file: Path) -> Subject:
    """The run at ``path`` with the weights and the chain that the file names. Raises `DataError` if it is another."""
    from perrin.build import load_run, run_chain
    from perrin.training import RunFolder

    folder = RunFolder.open(path)
    facts = folder.facts
    for name, found, expected in (
        ("shape", header.shape[1:], facts.shape),
        ("levels", header.levels, facts.levels),
    ):
        if found != expected:
            raise DataError(f"{file} does not fit the run {path}: {name} must be {expected}, got {found}")
    if header.step not in folder.checkpoints():
        raise DataError(
            f"{file} was compressed with step {header.step} of another run, or that checkpoint was deleted: "
            f"{path} has {', '.join(map(str, folder.checkpoints())) or 'none'}"
        )
    run = load_run(path, weights=header.weights, step=header.step)
    chain = calibrated_chain(run, header) if header.calibrated else run_chain(run, steps=header.steps)
    return Subject(run, chain, header.calibrated)


def calibrated_chain(run: Run, header: Header) -> GaussianDiffusion:
    """The chain of that calibration of the run with which the file was compressed. `DataError` if none is it."""
    from perrin.build import run_calibration
    from perrin.codec import fits, other_model

    for path in run.folder.calibrations():
        try:
            chain = run_calibration(run, path)[1].chain(run.diffusion, header.steps)
        except PerrinError:  # damaged, or for other weights
            continue
        if fits(header, chain, run.network):
            return chain
    raise DataError(other_model(header))


def decompressed(model: Subject, file: File) -> Dataset:
    """The data set in ``file``, with a bar while it is decoded."""
    from perrin.cli.progress import Bar
    from perrin.codec import decompress

    note(f"decompressing {file.header.shape[0]} examples")
    with Bar("decompressing", 1.0) as bar:
        return decompress(
            model.chain,
            model.run.network,
            file,
            classes=known_classes(model.run, file.header),
            advance=shown_on(bar.update),
        )


def known_classes(run: Run, header: Header) -> Tensor | None:
    """What the network is told, (N,); None if it is unconditional. Raises `DataError` for classes that it has not."""
    from perrin.codec import dataset_of

    if not run.folder.config.data.conditional:
        return None
    known, withheld = run.folder.facts.class_names or (), run.folder.config.training.label_drop > 0
    if not set(header.class_names) <= set(known) or not (header.class_names or withheld):
        raise DataError(f"the file's classes are not those of the run {run.folder.path}")
    return classes_of(run, dataset_of(header))


def describe(figures: Figures) -> list[str]:
    """The figures for people."""
    shape = "x".join(str(size) for size in figures.shape)
    return [
        f"{figures.out}: {figures.n} examples of {shape}, {figures.levels} levels, {figures.dtype}",
        f"every value verified; {figures.seconds:.1f} s",
    ]
