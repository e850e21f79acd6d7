"""``perrin compare``: the difference of two bounds on the same examples and the same noise, with its error."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from perrin.cli.bound import clip_text, data_text
from perrin.cli.console import DeviceName, examples, note, report, with_error
from perrin.cli.flags import parse
from perrin.cli.measure import (
    Calls,
    Effort,
    Subject,
    batches,
    bound_of,
    calls_per_example,
    flattered_text,
    held_out,
    mean_with_errors,
    pilot,
    trained_on,
)
from perrin.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

    from perrin.build import Run
    from perrin.data import Dataset

LEADING = ("index", "name", "bpd_a", "bpd_b", "difference")
CLEAR = 2.0
"""Standard errors from which on a difference is called one."""


@dataclass(frozen=True)
class Options:
    """Measure how much the bound of B differs from that of A, in bits per dimension.

    Both see the same examples, timesteps and noise, so that most of the noise cancels. A and B may be one run, with
    other weights, checkpoints or chains."""

    a: tyro.conf.Positional[Path]
    """Folder of a run."""
    b: tyro.conf.Positional[Path]
    """Folder of a run of the same shape and levels, or the same folder."""
    data: tyro.conf.Positional[str | None] = None
    """Data of their shape and levels; by default those of A, as far as both runs held them out."""
    effort: Effort = field(default_factory=Effort)
    weights_a: str | None = None
    """Which weights of A: `model`, or an average such as `ema-0.9999`; by default the first average."""
    weights_b: str | None = None
    """Which weights of B."""
    checkpoint_a: int | None = None
    """Step of the checkpoint of A; by default the newest."""
    checkpoint_b: int | None = None
    """Step of the checkpoint of B."""
    steps_a: int | None = None
    """Measure A in the chain of so many timesteps, evenly spaced unless --calibrated-a; by default all T."""
    steps_b: int | None = None
    """Timesteps of the chain of B."""
    calibrated_a: bool = False
    """Use the variances and timesteps of `perrin calibrate` for A; without --steps-a, as many as were best."""
    calibrated_b: bool = False
    """Use those of B."""
    out: Path | None = None
    """Table to write, one row per example, .csv or .parquet; by default none."""
    device: DeviceName = "auto"
    """Where to compute."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class Side:
    """One of the two."""

    run: str
    bpd: float
    bpd_se: float | None
    """Standard error over the examples, at least the Monte-Carlo error; None for a single one."""
    weights: str
    step: int
    chain: str
    num_timesteps: int
    calibrated: bool
    terms: int | None
    """KL terms drawn per example; None is all of them."""
    network_calls: int
    """Per example, without the pilot."""
    conditional: bool
    """Whether the network was told the class of each example."""
    trained_on: int | None
    """How many of the examples it was trained on; None where that is not known: its data are others."""


@dataclass(frozen=True)
class Figures:
    """What was measured, and how; an error that is not known is NaN."""

    difference: float
    """B - A, in bits per dimension: below 0 where B is better."""
    difference_se: float
    """Standard error of the mean of paired differences."""
    unpaired_se: float
    """What it would be with other examples and noise for each."""
    ratio: float
    """``unpaired_se / difference_se``."""
    better: str | None
    """a or b, where the difference exceeds two standard errors."""
    n: int
    a: Side
    b: Side
    same_timesteps: bool
    """Whether the same timesteps were drawn for both, not only the same noise at each."""
    levels: int | None
    clip_denoised: bool
    seed: int
    network_calls_total: int
    """Examples that the networks saw in all, with the pilots'."""
    seconds: float
    table: str | None


def run(args: Sequence[str]) -> None:
    """Compare what ``args`` ask for."""
    options = parse(Options, args, command="compare")
    options.effort.check()
    from perrin.evaluation.tables import claim_table

    a, b = load_pair(options)
    options.effort.check_terms(max(one.chain.num_timesteps for one in (a, b)) - 1)
    if options.out is not None:
        claim_table(options.out, LEADING)
    dataset = a.data(options.data)
    if b.run.folder.config.data.conditional and b.run.folder.path != a.run.folder.path:
        b.data(options.data or a.run.folder.config.data.path)  # refused without the classes that B knows
    indices = (
        list(range(len(dataset))) if options.data is not None else held_out_of_both(a.run, b.run, dataset)
    )
    note(f"comparing on {examples(len(indices[: options.effort.limit]))}")
    found = compare(a, b, dataset, indices, effort=options.effort, out=options.out)
    report(asdict(found), describe(found), as_json=options.json)


def load_pair(options: Options) -> tuple[Subject, Subject]:
    """A and B as the flags ask for. Raises `RunError` where they are not models of the same kind of data."""
    a = Subject.load(
        options.a,
        weights=options.weights_a,
        checkpoint=options.checkpoint_a,
        steps=options.steps_a,
        calibrated=options.calibrated_a,
        device=options.device,
    )
    b = Subject.load(
        options.b,
        weights=options.weights_b,
        checkpoint=options.checkpoint_b,
        steps=options.steps_b,
        calibrated=options.calibrated_b,
        device=options.device,
    )
    for name in ("shape", "levels"):
        one, other = getattr(a.run.folder.facts, name), getattr(b.run.folder.facts, name)
        if one != other:
            raise RunError(
                f"{options.b} cannot be compared with {options.a}: {name} must be {one}, got {other}"
            )
    return a, b


def held_out_of_both(a: Run, b: Run, dataset: Dataset) -> list[int]:
    """The places in ``dataset``, that of ``a``, which ``a`` held out, and ``b`` as well where it has the same data.

    A split depends on the number of examples and the share alone, and a smaller held-out part lies in a larger.
    """
    indices = held_out(a, len(dataset))
    if not trained_on(b, dataset, indices):
        return indices
    kept = set(held_out(b, len(dataset)))
    return [i for i in indices if i in kept]


def compare(
    a: Subject, b: Subject, dataset: Dataset, indices: list[int], *, effort: Effort, out: Path | None
) -> Figures:
    """The bounds of the examples ``indices`` under both models; writes the table ``out``."""
    from perrin.evaluation.tables import write_table
    from perrin.likelihood import mean_and_error

    started, calls = time.monotonic(), Calls()
    measured = indices[: effort.limit]
    totals, shared = _totals(a, b, dataset, indices, effort, calls)
    bpd_a, bpd_b = (one[:, 0] for one in totals)
    if out is not None:
        values = [bpd_a.tolist(), bpd_b.tolist(), (bpd_b - bpd_a).tolist()]
        names = [dataset.names[i] for i in measured]
        write_table(out, dict(zip(LEADING, [measured, names, *values], strict=True)))
    difference, error = mean_and_error(bpd_b - bpd_a)
    sides = [_side(one, found, dataset, measured, effort) for one, found in zip((a, b), totals, strict=True)]
    unpaired = math.hypot(*(mean_and_error(bpd)[1] for bpd in (bpd_a, bpd_b)))
    return Figures(
        difference=difference,
        difference_se=error,
        unpaired_se=unpaired,
        ratio=unpaired / error if error else math.nan,
        better=("b" if difference < 0 else "a") if abs(difference) > CLEAR * error else None,
        n=len(measured),
        a=sides[0],
        b=sides[1],
        same_timesteps=shared,
        levels=dataset.facts.levels,
        clip_denoised=effort.clip,
        seed=effort.seed,
        network_calls_total=calls.images,
        seconds=time.monotonic() - started,
        table=None if out is None else str(out),
    )


def _totals(
    a: Subject, b: Subject, dataset: Dataset, indices: list[int], effort: Effort, calls: Calls
) -> tuple[tuple[Tensor, Tensor], bool]:
    """Bits per dimension and Monte-Carlo errors (N, 2) of each; and whether both were given the same timesteps."""
    import torch

    from perrin.cli.progress import Bar

    pilots = [pilot(one, dataset, indices, effort, calls) for one in (a, b)]
    shared = a.chain.floats["timestep_map"] == b.chain.floats["timestep_map"]
    if shared and pilots[0] is not None and pilots[1] is not None:
        pilots = [(pilots[0] + pilots[1]) / 2] * 2  # each sums to 1
    measured = indices[: effort.limit]
    totals: list[list[Tensor]] = [[], []]
    work = len(measured) * sum(calls_per_example(one, effort) for one in (a, b))
    with (
        Bar("measuring", work) as bar,
        calls.counted(a.run.network, bar),
        calls.counted(b.run.network, bar),
    ):
        for batch in batches(measured, effort.batch_size):
            for one, probabilities, parts in zip((a, b), pilots, totals, strict=True):
                found = bound_of(one, dataset, batch, effort, probabilities)
                parts.append(torch.column_stack([found.total, found.error]))
    return (torch.cat(totals[0]), torch.cat(totals[1])), shared


def _side(model: Subject, totals: Tensor, dataset: Dataset, indices: list[int], effort: Effort) -> Side:
    mean, error, _ = mean_with_errors(totals[:, 0], totals[:, 1])
    return Side(
        run=str(model.run.folder.path),
        bpd=mean,
        bpd_se=None if math.isnan(error) else error,
        weights=model.run.weights,
        step=model.run.step,
        chain=model.chain_text,
        num_timesteps=model.chain.num_timesteps,
        calibrated=model.calibrated,
        terms=effort.terms_of(model.chain),
        network_calls=calls_per_example(model, effort),
        conditional=model.conditional(dataset),
        trained_on=trained_on(model.run, dataset, indices),
    )


def describe(figures: Figures) -> list[str]:
    """The figures for people."""
    noise = (
        "examples, timesteps and noise" if figures.same_timesteps else "examples, and noise at each timestep"
    )
    unpaired = "unknown" if math.isnan(figures.unpaired_se) else f"{figures.unpaired_se:.4f}"
    times = "" if math.isnan(figures.ratio) else f", {figures.ratio:.1f} times as much"
    sides = {"A": figures.a, "B": figures.b}
    width = max(len(side.run) for side in sides.values())
    return [
        f"B - A = {_signed(figures)} bits/dim (mean and standard error of n = {figures.n} paired differences)",
        verdict(figures),
        *(
            f"  {name}  {with_error(side.bpd, side.bpd_se)}  {side.run:<{width}}  {side.chain}; weights "
            f"{side.weights} of step {side.step}; {side.network_calls} network calls per example"
            f"{', given its class' if side.conditional else ''}"
            for name, side in sides.items()
        ),
        f"the same {noise} for both; unpaired, the error of the difference would be {unpaired}{times}",
        *(seen for name, side in sides.items() if (seen := _seen(name, side, figures.n))),
        f"variational bound, {data_text(figures.levels)}, {clip_text(figures.clip_denoised)}; seed {figures.seed}; "
        f"{figures.network_calls_total} network calls in all, {figures.seconds:.1f} s",
        *([f"one row per example: {figures.table}"] if figures.table else []),
    ]


def _signed(figures: Figures) -> str:
    error = "unknown" if math.isnan(figures.difference_se) else f"{figures.difference_se:.4f}"
    return f"{figures.difference:+.4f} ± {error}"


def verdict(figures: Figures) -> str:
    """Which is better, in words."""
    if figures.n == 1:
        return "one example cannot tell which is better"
    if figures.better is None:
        return f"no difference beyond {CLEAR:g} standard errors"
    return f"{figures.better.upper()} is better: the difference exceeds {CLEAR:g} standard errors"


def _seen(name: str, side: Side, count: int) -> str | None:
    """A warning where the examples are not held out of a run, as far as that is known."""
    if side.trained_on is None:
        return f"{name} was trained on other data: whether they hold these examples is not known"
    return flattered_text(name, side.trained_on, count)
