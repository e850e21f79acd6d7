"""``perrin anomaly``: how unlike its training data each example is, with a p-value and a rough bound beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import tyro

from perrin.cli.console import DeviceName, examples, many, note, report, with_error
from perrin.cli.flags import check_at_least, parse
from perrin.cli.measure import Calls, Subject, batches, finite, marks, replacing, told_alike, trained_on

if TYPE_CHECKING:
    from torch import Tensor

    from perrin.cli.progress import Bar
    from perrin.data import Dataset
    from perrin.evaluation.anomaly import Errors, Typical
    from perrin.evaluation.auroc import AUROC

LEADING = ("index", "name", "outside", "score", "p_value", "rough_bpd")
"""The first columns of every table of anomalies."""
RANKED_SHARE = 1 / 3
"""Of --reference data, the share that p-values rank among; the rest is fitted."""
FEWEST_REFERENCES = 16
"""Half as many are ranked, and of those `perrin.evaluation.anomaly.FEWEST` are needed."""


@dataclass(frozen=True)
class Options:
    """Score how unlike the reference each example is, from 10 network calls per example.

    The reference is what the run was trained on, with p-values that rank among what it held out. A rough bound from
    the same calls stands beside the score for comparison: it is biased (`perrin likelihood` measures the bound), and
    no anomaly score, since plain examples of another kind have a low one."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    data: tyro.conf.Positional[str]
    """Data of the run's shape and levels to score."""
    reference: str | None = None
    """Data that are typical, in the place of those that the run was trained on and held out."""
    outside: str | None = None
    """Data known not to be typical, if DATA are known to be: scored too, to give the area under the ROC curve."""
    reference_size: int = 3000
    """Fit to so many reference examples at most, and rank among half as many others."""
    limit: int | None = None
    """Score the first so many examples only, of DATA and of --outside."""
    seed: int = 0
    """Seed of the noise."""
    batch_size: int = 64
    """Examples in memory at a time; it does not change the figures."""
    weights: str | None = None
    """Which weights: `model`, or an average such as `ema-0.9999`; by default the first average."""
    checkpoint: int | None = None
    """Step of the checkpoint; by default the newest."""
    out: Path | None = None
    """Table to write, .csv or .parquet; by default anomaly-DATA.csv in the run's folder, or
    anomaly-model-step-400-first-10-DATA.csv for --weights, --checkpoint and --limit."""
    device: DeviceName = "auto"
    """Where to compute."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class Group:
    """What was found in one data set."""

    data: str
    n: int
    score_median: float
    p_below_01: float | None
    """Share of the examples with p < 0.01; None where no p-value can be."""
    p_below_05: float | None
    rough_bpd_mean: float
    """A rough, biased estimate of the bound, bits per dimension."""
    rough_bpd_se: float | None
    """Its standard error over the examples, all with the same noise; None for one."""
    fitted: int
    """How many of the examples the density was fitted to as well: their p-values do not hold."""
    trained_on: int | None
    """How many the run was trained on, whose p-values do not hold either; None where its data are others."""


@dataclass(frozen=True)
class Figures:
    """What was measured, and how."""

    data: Group
    outside: Group | None
    auroc: AUROC | None
    """Of the score, with a 95% bootstrap interval; None without data known to be outside."""
    auroc_rough_bpd: AUROC | None
    """Of the rough bound."""
    reference: str
    fitted: int
    ranked: int
    smallest_p: float
    """1 / (1 + ranked): no p-value is less."""
    clusters: int
    """Gaussians of the density that was fitted to the reference."""
    log_snrs: list[float]
    """Where the network was called."""
    network_calls: int
    """Per example."""
    network_calls_total: int
    """Examples that the network saw in all, with the reference."""
    seconds: float
    seed: int
    weights: str
    step: int
    table: str
    plot: str | None


class Part(NamedTuple):
    """Examples of a data set."""

    name: str
    dataset: Dataset
    indices: list[int]


class Scores(NamedTuple):
    """What was found of each example of a part, (n,) or (n, S)."""

    part: Part
    score: Tensor
    p_value: Tensor
    rough_bpd: Tensor
    bands: Tensor


class Outputs(NamedTuple):
    """Where the results go."""

    table: Path
    plot: Path | None
    """Beside the table, ``TABLE-groups.png``; None without a second data set."""

    @classmethod
    def of(cls, options: Options, folder: Path) -> Outputs:
        """As ``options`` say, by default in the run's ``folder``."""
        kind = marks(options.weights, options.checkpoint, options.limit)
        table = options.out or folder / f"anomaly{kind}-{Path(options.data).stem}.csv"
        return cls(table, table.with_name(f"{table.stem}-groups.png") if options.outside else None)

    def claim(self, *, told: bool) -> None:
        """Make sure, before long work, that they overwrite nothing else; unless ``told`` to, say what they replace.

        Raises `ArgumentError` where something else is in their place.
        """
        from perrin.evaluation.auroc import is_plot
        from perrin.evaluation.plots import check_replaceable
        from perrin.evaluation.tables import claim_table

        claim_table(self.table, LEADING)
        if self.plot:
            check_replaceable(self.plot, is_plot)
        if not told:
            replacing(self)


def run(args: Sequence[str]) -> None:
    """Score what ``args`` ask for."""
    options = parse(Options, args, command="anomaly")
    check(options)
    model = Subject.load(
        options.run, weights=options.weights, checkpoint=options.checkpoint, device=options.device
    )
    parts = [
        _part(model, name, options.limit) for name in (options.data, options.outside) if name is not None
    ]
    fitted, ranked = reference(model, options.reference, options.reference_size)
    *parts, fitted, ranked = parts_told_alike([*parts, fitted, ranked])
    outputs = Outputs.of(options, model.run.folder.path)
    outputs.claim(told=options.out is not None)
    counts = [len(part.indices) for part in parts]
    note(
        f"scoring {' + '.join([*map(str, counts[:-1]), examples(counts[-1])])} against {len(fitted.indices)} + "
        f"{len(ranked.indices)} of {fitted.name}, with weights {model.run.weights} of step {model.run.step}"
    )
    figures = measure(model, parts, fitted, ranked, outputs=outputs, options=options)
    report(asdict(figures), describe(figures), as_json=options.json)


def check(options: Options) -> None:
    """Refuse what can be refused before anything is loaded, with `ArgumentError`."""
    check_at_least(options, ("limit", "batch_size"))
    check_at_least(options, ("reference_size",), FEWEST_REFERENCES)


def _part(model: Subject, name: str, limit: int | None) -> Part:
    dataset = model.data(name)
    return Part(name, dataset, list(range(len(dataset)))[:limit])


def parts_told_alike(parts: Sequence[Part]) -> list[Part]:
    """The ``parts``, all without their classes if one has none: see `told_alike`."""
    datasets = told_alike([part.dataset for part in parts])
    return [part._replace(dataset=dataset) for part, dataset in zip(parts, datasets, strict=True)]


def reference(model: Subject, name: str | None, size: int) -> tuple[Part, Part]:
    """The examples to fit, at most ``size``, and others to rank among, at most half as many, spread evenly.

    By default what the run was trained on and what it held out; of ``name``, a random two thirds and the rest.
    """
    from perrin.data import split, spread

    config = model.run.folder.config.data
    dataset = model.data(name)
    halves = split(len(dataset), config.held_out if name is None else RANKED_SHARE)
    fitted, ranked = (
        Part(name or config.path, dataset, spread([int(i) for i in half], most))
        for half, most in zip(halves, (size, size // 2), strict=True)
    )
    return fitted, ranked


def measure(
    model: Subject, parts: Sequence[Part], fitted: Part, ranked: Part, *, outputs: Outputs, options: Options
) -> Figures:
    """The scores of ``parts``, one or two, against the reference; writes the ``outputs``."""
    from perrin.cli.progress import Bar
    from perrin.evaluation.anomaly import Typical, visited
    from perrin.evaluation.auroc import auroc

    started, calls, times = time.monotonic(), Calls(), visited(model.chain)
    count = sum(len(part.indices) for part in (fitted, ranked, *parts))
    with Bar("scoring", len(times) * count) as bar:
        base = [_errors(model, part, options, calls, bar) for part in (fitted, ranked)]
        typical = Typical.fit(*base)
        found = [_scores(model, part, typical, options, calls, bar) for part in parts]
    log_snrs = [model.chain.level_of_batch(t).log_snr for t in times]
    _write(outputs, found, band_names(times, log_snrs))
    smallest, two = 1 / (1 + len(ranked.indices)), len(found) == 2
    seen = [(shared(p, fitted), trained_on(model.run, p.dataset, p.indices)) for p in parts]
    groups = [group(f, smallest, *counts) for f, counts in zip(found, seen, strict=True)]
    return Figures(
        data=groups[0],
        outside=groups[1] if two else None,
        auroc=auroc(*(f.score for f in found)) if two else None,
        auroc_rough_bpd=auroc(*(f.rough_bpd for f in found)) if two else None,
        reference=fitted.name,
        fitted=len(fitted.indices),
        ranked=len(ranked.indices),
        smallest_p=smallest,
        clusters=len(typical.features.shares),
        log_snrs=log_snrs,
        network_calls=len(times),
        network_calls_total=calls.images,
        seconds=time.monotonic() - started,
        seed=options.seed,
        weights=model.run.weights,
        step=model.run.step,
        table=str(outputs.table),
        plot=str(outputs.plot) if outputs.plot else None,
    )


def _errors(model: Subject, part: Part, options: Options, calls: Calls, bar: Bar) -> Errors:
    import torch

    from perrin.evaluation.anomaly import Errors, errors

    found = []
    with calls.counted(model.run.network, bar):
        for batch in batches(part.indices, options.batch_size):
            x, told = model.batch(part.dataset, batch)
            found.append(errors(model.chain, model.run.network, x, seed=options.seed, model_kwargs=told))
    return Errors(*(torch.cat(column) for column in zip(*found, strict=True)))


def _scores(model: Subject, part: Part, typical: Typical, options: Options, calls: Calls, bar: Bar) -> Scores:
    found = _errors(model, part, options, calls, bar)
    score = typical.score(found)
    return Scores(
        part, score, typical.p_values(score), found.rough_bpd, typical.bands.standardised(found.bands)
    )


def band_names(times: Sequence[int], log_snrs: Sequence[float]) -> list[str]:
    """A column for each visited timestep; two of them may share a rounded log-SNR, but no time."""
    return [f"z at t={t}, log-SNR {log_snr:.1f}" for t, log_snr in zip(times, log_snrs, strict=True)]


def _write(outputs: Outputs, found: Sequence[Scores], names: Sequence[str]) -> None:
    import torch

    from perrin.evaluation.auroc import plot_groups
    from perrin.evaluation.tables import write_table

    rows = [torch.column_stack([f.score, f.p_value, f.rough_bpd, f.bands]) for f in found]
    numbers = torch.cat(rows).T.tolist()
    if outputs.plot:
        panels = {"score": [f.score for f in found], "rough bound, bits/dim": [f.rough_bpd for f in found]}
        plot_groups(panels, outputs.plot)
    write_table(
        outputs.table,
        {
            "index": [index for f in found for index in f.part.indices],
            "name": [f.part.dataset.names[index] for f in found for index in f.part.indices],
            "outside": [place for place, f in enumerate(found) for _ in f.part.indices],
            **dict(zip((*LEADING[3:], *names), numbers, strict=True)),
        },
    )


def group(scores: Scores, smallest: float, fitted: int = 0, trained: int | None = None) -> Group:
    """The figures of one data set, none of whose p-values can be less than ``smallest``.

    ``fitted`` and ``trained`` are how many of its examples the reference was fitted to, and the run trained on.
    """
    from perrin.likelihood.bound import mean_and_error

    shares = [
        float((scores.p_value < level).double().mean()) if smallest < level else None
        for level in (0.01, 0.05)
    ]
    mean, error = mean_and_error(scores.rough_bpd)
    return Group(
        scores.part.name,
        len(scores.score),
        float(scores.score.median()),
        p_below_01=shares[0],
        p_below_05=shares[1],
        rough_bpd_mean=mean,
        rough_bpd_se=finite(error),
        fitted=fitted,
        trained_on=trained,
    )


def shared(part: Part, fitted: Part) -> int:
    """How many examples of ``part`` are among those ``fitted``, as far as both are known to be of the same data."""
    mark = part.dataset.facts.fingerprint
    same = mark and mark == fitted.dataset.facts.fingerprint
    return len(set(part.indices) & set(fitted.indices)) if same else 0


def describe(figures: Figures) -> list[str]:
    """The figures for people."""
    lines = [_line(figures.data), *_seen(figures.data)]
    if figures.outside and figures.auroc and figures.auroc_rough_bpd:
        lines += [
            _line(figures.outside),
            *_seen(figures.outside),
            f"AUROC {_area(figures.auroc)} of the score; {_area(figures.auroc_rough_bpd)} of the rough bound "
            "(95% bootstrap intervals)",
            f"histograms: {figures.plot}",
        ]
    levels = ", ".join(f"{log_snr:.1f}" for log_snr in figures.log_snrs)
    return [
        *lines,
        f"score: how unlikely the example and its errors at log-SNR {levels} are, beside typical ones",
        f"reference {figures.reference}: fitted to {figures.fitted} examples, p-values among {figures.ranked} others"
        f", smallest possible p {figures.smallest_p:.2g}",
        "the rough bound is from the same calls, with one noise for all, and biased: `perrin likelihood` is the "
        "number; it is no anomaly score",
        f"weights {figures.weights} of step {figures.step}; {many(figures.network_calls, 'network call')} per "
        f"example; {figures.seconds:.1f} s",
        f"one row per example: {figures.table}",
    ]


def _line(found: Group) -> str:
    return (
        f"{found.data}: n = {found.n}, median score {found.score_median:.2f}, p < 0.01 for "
        f"{_share(found.p_below_01)}, p < 0.05 for {_share(found.p_below_05)}, rough bound "
        f"{with_error(found.rough_bpd_mean, found.rough_bpd_se)}"
    )


def _seen(found: Group) -> list[str]:
    """A warning where the reference was fitted to scored examples, or the run trained on them."""
    counts = {"the run was trained on": found.trained_on, "the reference fitted to": found.fitted}
    seen = " and ".join(f"{what} {count}" for what, count in counts.items() if count)
    return [f"  of these {examples(found.n)} {seen}: their p-values do not hold"] if seen else []


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _area(area: AUROC) -> str:
    return f"{area.value:.4f} [{area.low:.4f}, {area.high:.4f}]"
