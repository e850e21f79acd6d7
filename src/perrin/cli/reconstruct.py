"""``perrin reconstruct``: what comes back of inverted data, against the number of steps; or of a file of latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import tyro

from perrin.cli.console import examples, note, plain, report
from perrin.cli.flags import parse
from perrin.cli.invert import (
    METHODS,
    Given,
    How,
    Journey,
    Method,
    class_number,
    journey_of,
    load,
    settings_of,
    told,
)
from perrin.cli.measure import batches, finite, given
from perrin.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from perrin.build import Run
    from perrin.evaluation.latents import Latents
    from perrin.evaluation.round_trips import RoundTrips

DEFAULT_STEPS = (10, 20, 50, 100)

SHOWN = 10
"""Examples in the grid."""


@dataclass(frozen=True)
class Options:
    """Invert data and bring them back, with several numbers of steps and methods: a table, a plot, and a grid of the
    data with what came back below. With --latents, bring back what `perrin invert` has kept instead."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    data: tyro.conf.Positional[str | None] = None
    """Data of the run's shape and levels; by default the part that the run held out."""
    steps: tuple[int, ...] = ()
    """Numbers of steps, 1 to T; by default 10, 20, 50 and 100, as far as T goes."""
    method: tuple[Method, ...] = get_args(Method)
    """Methods, see `perrin invert`."""
    latents: Path | None = None
    """File of `perrin invert`, of the same run: how and by which weights it was made, it says itself. Of the other
    flags it takes --out, --label, another class for what comes back, --batch-size and --device."""
    how: How = field(default_factory=How)
    out: Path | None = None
    """Table to write, .csv or .parquet, with plot and grid beside it under the same name; by default
    reconstruct.csv in the run's folder. With --latents, a folder of PNG files, or an .npz file; by default one
    below the run's samples/, a folder for images."""
    json: bool = False
    """Print one JSON object instead of text."""


def run(args: Sequence[str]) -> None:
    """Reconstruct what ``args`` ask for."""
    options = parse(Options, args, command="reconstruct")
    options.how.check()
    if options.latents is not None:
        bring_back(options, options.latents)
        return
    if not options.method:
        raise ArgumentError("--method must name one or more, got none")
    from perrin.evaluation.round_trips import columns_of, plot_round_trips
    from perrin.evaluation.tables import write_table

    run = load(options.run, options.how)
    total = run.diffusion.num_timesteps
    counts = options.steps or [steps for steps in DEFAULT_STEPS if steps <= total] or [total]
    journeys = [journey_of(run, method, steps, options.how) for method in options.method for steps in counts]
    out = options.out or run.folder.path / "reconstruct.csv"
    claim_files(out, run)
    chosen = Given.load(run, options.data, options.how)
    note(f"reconstructing {examples(len(chosen.indices))} with weights {run.weights} of step {run.step}")
    trips = [chosen.travel(journey, options.how.batch_size) for journey in journeys]
    found = [trip.figures for trip in trips]
    write_table(out, columns_of(found))
    plot_round_trips(found, plot_beside(out))
    paths = {"table": str(out), "plot": str(plot_beside(out))}
    paths |= write_rows(out, run, [trips[0].x, *(trip.back for trip in trips)])
    rows = [plain(asdict(each)) for each in found]
    report(
        {"round_trips": rows, "tolerance": options.how.tolerance, **paths},
        describe(found, paths),
        as_json=options.json,
    )


def plot_beside(out: Path) -> Path:
    """Where the plot of the table ``out`` goes."""
    return out.with_suffix(".png")


def grid_beside(out: Path) -> Path:
    """Where the grid of the table ``out`` goes."""
    return out.with_name(f"{out.stem}-grid.png")


def claim_files(out: Path, run: Run) -> None:
    """Make sure, before long work, that the table ``out`` and its pictures can be written, over nothing else.

    Raises `ArgumentError` where something that this command did not make is in the place of one of them.
    """
    from perrin.evaluation.round_trips import COLUMNS, claim_picture
    from perrin.evaluation.samples import has_pictures
    from perrin.evaluation.tables import claim_table

    claim_table(out, COLUMNS)
    claim_picture(plot_beside(out))
    if has_pictures(run.folder.facts):
        claim_picture(grid_beside(out))


def write_rows(out: Path, run: Run, rows: Sequence[Tensor]) -> dict[str, str]:
    """Draw the first examples of ``rows`` (N, C, H, W) beside the table ``out``, if they are images."""
    from itertools import chain

    from perrin.data import to_levels, write_grid
    from perrin.evaluation.round_trips import TITLE
    from perrin.evaluation.samples import has_pictures

    facts = run.folder.facts
    if not has_pictures(facts):
        return {}
    import torch

    grid = grid_beside(out)
    shown = torch.stack(list(chain.from_iterable(row[:SHOWN].double() for row in rows)))
    columns = min(SHOWN, len(rows[0]))
    write_grid(grid, to_levels(shown, facts.levels), facts.levels, columns=columns, title=TITLE)
    return {"grid": str(grid)}


def describe(found: Sequence[RoundTrips], paths: dict[str, str]) -> list[str]:
    """The figures for people."""
    lines = [f"{'method':<12}{'steps':>6}{'rmse':>10}{'levels':>10}{'exact':>9}{'calls':>7}  converged"]
    for each in found:
        levels = "–" if finite(each.rmse_levels) is None else f"{each.rmse_levels:.2g}"
        exact = "–" if finite(each.exact_share) is None else f"{each.exact_share:.2%}"
        known = finite(each.largest_residual) is not None
        verdict = (
            "–"
            if not known
            else "all"
            if each.converged == each.n
            else f"NOT: {each.converged:g} of {each.n}"
        )
        lines.append(
            f"{each.method:<12}{each.steps:>6}{each.rmse:>10.2g}{levels:>10}{exact:>9}"
            f"{each.network_calls:>7}  {verdict}"
        )
    rows = ", the data first and then the rows of this table" if "grid" in paths else ""
    return [*lines, f"{', '.join(paths.values())}{rows}"]


def bring_back(options: Options, path: Path) -> None:
    """Sample from the latents in ``path``. Raises `DataError` where they are of another model."""
    clashing = [f"--{name}" for name in ("steps", "method") if given(options, [name])]
    clashing += given(
        options.how, ["count", "grid", "iterations", "tolerance", "precision", "weights", "checkpoint"]
    )
    if clashing or options.data is not None:
        raise ArgumentError(
            f"--latents says itself how it was made: leave out {', '.join(clashing) or options.data}"
        )
    from perrin.data import to_levels
    from perrin.evaluation.latents import Latents
    from perrin.evaluation.samples import has_pictures, open_store

    latents = Latents.read(path)
    made = latents.settings
    check_step(options.run, made.step, path)
    run = load(options.run, replace(options.how, weights=made.weights, checkpoint=made.step))
    journey = journey_back(latents, run, path)
    classes = classes_back(latents, run, options.how.label)
    count = len(latents.indices)
    name = path.stem if has_pictures(run.folder.facts) else f"{path.stem}.npz"
    out = options.out or run.folder.samples_dir / name
    settings = asdict(made) | {"latents": path.name, "label": options.how.label}
    store = open_store(out, settings, run.folder.facts)
    note(f"reconstructing {examples(count)} with weights {run.weights} of step {run.step} into {out}")
    for places in batches(range(count), options.how.batch_size):
        states = tuple(state[list(places)].to(run.device) for state in latents.states)
        labels = None if classes is None else classes[list(places)].to(run.device)
        back = journey.down(states, told(labels))
        for i, values in zip(places, to_levels(back, run.folder.facts.levels), strict=True):
            store.write(i, values)
    paths = store.finish(count, None if classes is None else classes.tolist())
    report(
        settings | {"n": count} | paths,
        [f"{examples(count)}: {', '.join(paths.values())}"],
        as_json=options.json,
    )


def check_step(run: Path, step: int, path: Path) -> None:
    """Raise `DataError` unless ``run`` has the checkpoint that the latents in ``path`` were made by."""
    from perrin.training import RunFolder

    known = RunFolder.open(run).checkpoints()
    if step not in known:
        raise DataError(
            f"{path} was made by step {step} of another run, or that checkpoint was deleted: {run} has "
            f"{', '.join(map(str, known)) or 'none'}"
        )


def journey_back(latents: Latents, run: Run, path: Path) -> Journey:
    """The way back of ``latents`` from ``path``. Raises `DataError` where ``run`` is another model."""
    made = latents.settings
    if made.method not in METHODS or len(latents.states) != METHODS[made.method].states:
        raise DataError(
            f"{path} is damaged: {len(latents.states)} states do not belong to method {made.method}"
        )
    journey = Journey(run, made.method, made.steps, made.grid, made.precision)  # type: ignore[arg-type]  # checked below
    journey.check()
    found = settings_of(journey)
    if found.model != made.model:
        raise DataError(
            f"{path} was made by weights {made.weights} of step {made.step} of another model than "
            f"{run.folder.path}, {run.weights} of step {run.step}"
        )
    if latents.states[0].shape[1:] != run.folder.facts.shape:
        raise DataError(
            f"{path} is damaged: shape must be {run.folder.facts.shape}, got {tuple(latents.states[0].shape[1:])}"
        )
    return journey


def classes_back(latents: Latents, run: Run, label: str | None) -> Tensor | None:
    """The class numbers (N,) that the network is told: those of the file, or ``label``."""
    import torch

    if label is None:
        return latents.classes
    return torch.full((len(latents.indices),), class_number(label, run))
