"""``perrin likelihood``: bits per dimension with a standard error, and a table with one row per example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import tyro

from perrin.cli.console import DeviceName, examples, note, report
from perrin.cli.flags import parse
from perrin.cli.measure import Effort, Subject, given, held_out, marks, replacing
from perrin.cli.ode import OdeOptions
from perrin.errors import ArgumentError


@dataclass(frozen=True)
class Options:
    """Measure bits per dimension: the variational bound prior + sum of KL terms + decoder, estimated from a few
    network calls per example, from all with --exact; or log p by the probability-flow ODE with --ode.

    Nothing is augmented, and what is random of an example depends on the seed and its index alone."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    data: tyro.conf.Positional[str | None] = None
    """Data of the run's shape and levels; by default the part that the run held out."""
    effort: Effort = field(default_factory=Effort)
    per_timestep: bool = False
    """Write the mean of each term as well, as a table and a plot beside the other table; implies --exact."""
    steps: int | None = None
    """Measure the chain of so many timesteps, evenly spaced unless --calibrated; by default all T."""
    calibrated: bool = False
    """Use the variances and timesteps of `perrin calibrate`; without --steps, as many as were best."""
    weights: str | None = None
    """Which weights: `model`, or an average such as `ema-0.9999`; by default the first average."""
    checkpoint: int | None = None
    """Step of the checkpoint; by default the newest."""
    ode: bool = False
    """Measure log p by the probability-flow ODE instead of the bound: another model made of the same network."""
    with_ode: OdeOptions = field(default_factory=OdeOptions)
    out: Path | None = None
    """Table to write, .csv or .parquet; by default one in the run's folder whose name says what was measured:
    likelihood.csv, likelihood-DATA.csv, likelihood-ode.csv, likelihood-calibrated-64-steps.csv,
    likelihood-model-step-400-first-10.csv for --weights, --checkpoint and --limit."""
    device: DeviceName = "auto"
    """Where to compute."""
    json: bool = False
    """Print one JSON object instead of text."""


def run(args: Sequence[str]) -> None:
    """Measure what ``args`` ask for."""
    options = parse(Options, args, command="likelihood")
    check(options)
    from perrin.cli.bound import describe, measure

    model = Subject.load(
        options.run,
        weights=options.weights,
        checkpoint=options.checkpoint,
        steps=options.steps,
        calibrated=options.calibrated,
        device=options.device,
    )
    options.effort.check_terms(model.chain.num_timesteps - 1)
    if options.ode:
        options.with_ode.check_times(model.chain)
    out = options.out or default_table(options, model.run.folder.likelihood_path(options.data))
    files = claimed(out, curve=options.per_timestep)
    dataset = model.data(options.data)
    indices = list(range(len(dataset))) if options.data is not None else held_out(model.run, len(dataset))
    count = len(indices[: options.effort.limit])
    if options.out is None:
        replacing(files)
    note(f"measuring {examples(count)} with weights {model.run.weights} of step {model.run.step}")
    if options.ode:
        from perrin.cli.ode import measure_ode

        flow = measure_ode(
            model, dataset, indices[:count], effort=options.effort, how=options.with_ode, out=out
        )
        report(asdict(flow), flow.lines(), as_json=options.json)
        return
    effort = replace(options.effort, exact=True) if options.per_timestep else options.effort
    found = measure(model, dataset, indices, effort=effort, out=out, per_timestep=options.per_timestep)
    report(asdict(found), describe(found), as_json=options.json)


def claimed(out: Path, *, curve: bool) -> list[Path]:
    """The table ``out``, and the files of the ``curve`` beside it; sure to overwrite nothing else.

    Raises `ArgumentError` where something else is in their place.
    """
    from perrin.cli.bound import LEADING, CurveFiles
    from perrin.evaluation.tables import claim_table

    claim_table(out, LEADING)
    if not curve:
        return [out]
    files = CurveFiles.beside(out)
    files.claim()
    return [out, *files]


def default_table(options: Options, plain: Path) -> Path:
    """Where the table goes without --out: ``plain`` for the bound of the run's own chain, or a like name.

    ``likelihood-DATA.csv`` becomes ``likelihood-ode-DATA.csv``, ``likelihood-calibrated-64-steps-DATA.csv`` or
    ``likelihood-model-step-400-first-10-DATA.csv``.
    """
    wanted = {
        "-ode": options.ode,
        "-calibrated": options.calibrated,
        f"-{options.steps}-steps": options.steps,
    }
    kind = "".join(mark for mark, given in wanted.items() if given)
    kind += marks(options.weights, options.checkpoint, options.effort.limit)
    return plain.with_name(f"likelihood{kind}{plain.name.removeprefix('likelihood')}")


def check(options: Options) -> None:
    """Refuse what can be refused before anything is loaded, with `ArgumentError`."""
    options.effort.check()
    options.with_ode.check(wanted=options.ode)
    if options.per_timestep and options.effort.terms is not None:
        raise ArgumentError(
            f"--per-timestep takes all terms and --terms {options.effort.terms} some: give one"
        )
    if options.ode:
        bound_only = given(options.effort, ("terms", "exact", "decoder_draws", "clip"))
        bound_only += given(options, ("per_timestep", "steps", "calibrated"))
        if bound_only:
            raise ArgumentError(f"--ode is not the bound, to which {bound_only[0]} belongs: give one of them")
