"""``perrin calibrate``: the variances and timesteps with which a run, as it is, has the best bound."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import tyro

from perrin.cli.bound import data_text
from perrin.cli.console import DeviceName, note, report, with_error
from perrin.cli.flags import check_at_least, parse
from perrin.cli.measure import Calls, Effort, Subject, batches, bound_of, finite, held_out, told_alike

if TYPE_CHECKING:
    from perrin.build import Run
    from perrin.data import Dataset
    from perrin.evaluation.step_curve import Cell
    from perrin.likelihood.calibration import Calibration, Kind, Plan
    from perrin.likelihood.costs import Levels
    from perrin.likelihood.covariance import Covariance
    from perrin.likelihood.statistics import Statistics

CHECKED_STEPS = 64
"""The number of steps at which the calibrated chain is always measured itself."""


@dataclass(frozen=True)
class Options:
    """Find the variances and timesteps with which a run, as it is, has the best bound: bits per dimension for free.

    One pass over the timesteps with training images gives the best variance of every jump, and from it the best K
    timesteps for every K up to 256; a pass with held-out images says what they gain. `--calibrated` then uses them.
    It is the bound that gets better, not the looks: for samples few, evenly spaced steps are often the better choice.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    data: tyro.conf.Positional[str | None] = None
    """Data of the run's shape and levels to fit to; by default the part that the run was trained on."""
    images: int = 128
    """Examples to fit to, spread evenly over the data."""
    limit: int = 128
    """Held-out examples to report on, the first so many."""
    weights: str | None = None
    """Which weights: `model`, or an average such as `ema-0.9999`; by default the first average."""
    checkpoint: int | None = None
    """Step of the checkpoint; by default the newest."""
    seed: int = 0
    """Seed of the noise."""
    batch_size: int = 64
    """Examples of one network call; it does not change the figures."""
    device: DeviceName = "auto"
    """Where to compute."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class Measured:
    """A calibrated chain, measured step by step."""

    steps: int
    bpd: float
    bpd_se: float | None
    """Standard error over the examples; None for a single one."""


@dataclass(frozen=True)
class Figures:
    """What was found, and what it gains on held-out examples."""

    kind: str
    """Which variance the calibrated chain has."""
    best_steps: int
    """The number of steps, up to 256, with the best bound on the examples of the fit."""
    timesteps: list[int]
    """Those of so many steps."""
    measured: list[Measured]
    curve: list[dict[str, object]]
    """The bound for each variance, spacing and number of steps."""
    images: int
    n: int
    """Held-out examples."""
    num_timesteps: int
    levels: int | None
    weights: str
    step: int
    seed: int
    network_calls_total: int
    seconds: float
    calibration: str
    table: str
    plot: str


class Fitted(NamedTuple):
    """What the examples of the fit gave."""

    images: int
    statistics: Statistics
    levels: Levels
    covariances: dict[str, Covariance]
    plans: dict[str, Plan]


def run(args: Sequence[str]) -> None:
    """Calibrate what ``args`` ask for."""
    options = parse(Options, args, command="calibrate")
    check_at_least(options, ("images", "limit", "batch_size"))
    subject = Subject.load(
        options.run, weights=options.weights, checkpoint=options.checkpoint, device=options.device
    )
    figures = Calibrating(subject, options).figures()
    report(asdict(figures), describe(figures), as_json=options.json)


@dataclass(frozen=True)
class Calibrating:
    """The work of the command, in its parts."""

    subject: Subject
    options: Options
    calls: Calls = field(default_factory=Calls)

    def figures(self) -> Figures:
        """Fit, compare on held-out examples, and write calibration, table and plot into the run's folder."""
        from perrin.evaluation.step_curve import curve
        from perrin.likelihood.costs import rules

        started, run = time.monotonic(), self.subject.run
        own = self.subject.data()
        data = own if self.options.data is None else self.subject.data(self.options.data)
        own, data = told_alike([own, data])
        shown = held_out(run, len(own))[: self.options.limit]
        found = self.fit(data, examples_to_fit(run, own, data, self.options.images))
        seen = self.passage("measuring", own, shown, widths=found.statistics.widths)
        cells = curve(seen, found.levels, rules(found.covariances), found.plans)
        calibration = self.calibration(found, better_kind(found, seen))
        path, table, plot = self.written(calibration, cells)
        steps = sorted({min(CHECKED_STEPS, len(calibration.paths)), calibration.best_steps})
        return Figures(
            kind=calibration.kind,
            best_steps=calibration.best_steps,
            timesteps=calibration.timesteps(),
            measured=[self.measured(calibration, own, shown, k) for k in steps],
            curve=[row_of(cell) for cell in cells],
            images=found.images,
            n=len(shown),
            num_timesteps=calibration.num_timesteps,
            levels=calibration.levels,
            weights=run.weights,
            step=run.step,
            seed=self.options.seed,
            network_calls_total=self.calls.images,
            seconds=time.monotonic() - started,
            calibration=str(path),
            table=str(table),
            plot=str(plot),
        )

    def fit(self, data: Dataset, chosen: list[int]) -> Fitted:
        """The variances and the best timesteps for the examples ``chosen``."""
        from perrin.cli.progress import Bar
        from perrin.likelihood.calibration import plan
        from perrin.likelihood.costs import Levels, fitted_covariances, rules

        weights, step = self.subject.run.weights, self.subject.run.step
        note(f"calibrating weights {weights} of step {step} with {len(chosen)} examples")
        statistics = self.passage("fitting", data, chosen)
        levels = Levels.of(self.subject.chain)
        covariances = fitted_covariances(statistics, levels)
        plans: dict[str, Plan] = {}
        known = rules(covariances)
        with Bar("timesteps", len(known)) as bar:
            for name, rule in known.items():
                plans[name] = plan(statistics, levels, rule)
                bar.advance()
        return Fitted(len(chosen), statistics, levels, covariances, plans)

    def passage(
        self, label: str, data: Dataset, indices: list[int], widths: Mapping[str, Covariance] | None = None
    ) -> Statistics:
        """The statistics of the examples ``indices`` at every timestep."""
        from perrin.cli.progress import Bar
        from perrin.likelihood.statistics import collect

        chain, network = self.subject.chain, self.subject.run.network
        x, told = self.subject.batch(data, indices)
        with Bar(label, len(indices) * chain.num_timesteps) as bar, self.calls.counted(network, bar):
            return collect(
                chain,
                network,
                x,
                indices=indices,
                seed=self.options.seed,
                batch_size=self.options.batch_size,
                widths=widths,
                model_kwargs=told,
            )

    def calibration(self, found: Fitted, kind: Kind) -> Calibration:
        """What is saved."""
        from perrin.likelihood.calibration import Calibration, Fit

        chain, run, plan = self.subject.chain, self.subject.run, found.plans[kind]
        widths = found.statistics.widths
        return Calibration(
            weights=run.weights,
            step=run.step,
            num_timesteps=chain.num_timesteps,
            levels=chain.levels,
            images=found.images,
            seed=self.options.seed,
            kind=kind,
            covariances={name: Fit.of(covariance) for name, covariance in found.covariances.items()},
            decoders={name: Fit.of(width) for name, width in widths.items()},
            paths=tuple(map(tuple, plan.paths)),
            curve=tuple(plan.curve),
        )

    def written(self, calibration: Calibration, cells: Sequence[Cell]) -> tuple[Path, Path, Path]:
        """The files in the run's folder: the calibration, the table and the plot of ``cells``."""
        from perrin.evaluation.step_curve import columns_of, plot_curve
        from perrin.evaluation.tables import write_table

        path = self.subject.run.folder.calibration_path
        table, plot = path.with_suffix(".csv"), path.with_suffix(".png")
        kept = self.subject.run.folder.keep_calibration(calibration.to_json())
        if kept is not None:
            note(f"the run's calibration so far is kept as {kept}: files compressed with it need it")
        calibration.write(path)
        write_table(table, columns_of(cells))
        plot_curve(cells, plot)
        return path, table, plot

    def measured(self, calibration: Calibration, own: Dataset, shown: list[int], steps: int) -> Measured:
        """The bound of the calibrated chain of ``steps``, term by term on the chain itself."""
        import torch

        from perrin.cli.progress import Bar
        from perrin.likelihood import mean_and_error

        effort = Effort(exact=True, decoder_draws=1, seed=self.options.seed)
        calibrated = Subject(self.subject.run, calibration.chain(self.subject.chain, steps), True)
        with Bar("checking", len(shown) * steps) as bar, self.calls.counted(calibrated.run.network, bar):
            found = [
                bound_of(calibrated, own, batch, effort, None).total
                for batch in batches(shown, self.options.batch_size)
            ]
        mean, error = mean_and_error(torch.cat(found))
        return Measured(steps, mean, finite(error))


def examples_to_fit(run: Run, own: Dataset, data: Dataset, count: int) -> list[int]:
    """``count`` examples of ``data``, evenly spread; of the run's own data only those that it was trained on."""
    from perrin.data import spread

    same = data.facts.fingerprint == own.facts.fingerprint
    aside = set(held_out(run, len(own))) if same else set()
    return spread([i for i in range(len(data)) if i not in aside], count)


def better_kind(found: Fitted, seen: Statistics) -> Kind:
    """The variance for each state where it is at least as good on held-out examples, each at its own best K."""
    from perrin.evaluation.step_curve import cell
    from perrin.likelihood.costs import rules

    if not seen.learned:
        return "calibrated"
    known = rules(found.covariances)

    def bpd(kind: Kind) -> float:
        curve, paths = found.plans[kind].curve, found.plans[kind].paths
        best = paths[curve.index(min(curve))]
        return cell(seen, found.levels, (kind, known[kind]), "", best).bpd

    return "per-state" if bpd("per-state") <= bpd("calibrated") else "calibrated"


def row_of(cell: Cell) -> dict[str, object]:
    """A row of the table for JSON, which knows no NaN."""
    return {
        "variance": cell.variance,
        "spacing": cell.spacing,
        "steps": cell.steps,
        "bpd": finite(cell.bpd),
        "bpd_se": finite(cell.error),
    }


def describe(figures: Figures) -> list[str]:
    """The figures for people."""
    measured = [
        f"{with_error(found.bpd, found.bpd_se)} with {found.steps} calibrated steps, measured on that chain"
        for found in figures.measured
    ]
    return [
        f"bits/dim of n = {figures.n} held-out examples ({data_text(figures.levels)}, predictions clipped), "
        "by number of steps",
        *table_lines(figures.curve),
        "every row ends in the decoder of calibrated width; `DP` timesteps are those that suit the row's variance",
        errors_text(figures),
        *measured,
        f"saved: variance {figures.kind}; timesteps for every number of steps, {figures.best_steps} being best "
        f"on the examples of the fit",
        "this optimises the bound, not the looks: of samples it promises nothing",
        f"weights {figures.weights} of step {figures.step}, fitted to {figures.images} examples; "
        f"{figures.network_calls_total} network calls in all; {figures.seconds:.1f} s",
        f"to use them: --calibrated; files: {figures.calibration}, {figures.table}, {figures.plot}",
    ]


def errors_text(figures: Figures) -> str:
    """Where standard errors are, and of which rows there are none."""
    if figures.n == 1:
        return "a single example has no standard errors"
    without = dict.fromkeys(str(row["variance"]) for row in figures.curve if row["bpd_se"] is None)
    but = f", but for {', '.join(without)}, whose variance depends on the state: they have none"
    return f"standard errors are in {figures.table}{but if without else ''}"


def table_lines(curve: Sequence[Mapping[str, object]]) -> list[str]:
    """A line for each variance and spacing, a column for each number of steps."""
    steps = sorted({int(str(row["steps"])) for row in curve})
    lines = [f"{'variance':<12} {'spacing':<10} " + " ".join(f"{k:>7}" for k in steps)]
    for variance, spacing in dict.fromkeys((row["variance"], row["spacing"]) for row in curve):
        found = {
            row["steps"]: row["bpd"]
            for row in curve
            if (row["variance"], row["spacing"]) == (variance, spacing)
        }
        lines.append(f"{variance:<12} {spacing:<10} " + " ".join(_figure(found[k]) for k in steps))
    return lines


def _figure(bpd: object) -> str:
    """A figure in 7 places."""
    if not isinstance(bpd, float):
        return f"{'-':>7}"
    return f"{bpd:7.3f}" if bpd < 100 else f"{bpd:7.0f}"
