"""The bound of a data set as figures: means with their errors, noise bands, a table, and the curve over timesteps."""

from __future__ import annotations

import math
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from perrin.cli.console import measured_text
from perrin.cli.measure import (
    Calls,
    Effort,
    Subject,
    batches,
    bound_of,
    calls_per_example,
    finite,
    flattered_text,
    given_class_text,
    mean_with_errors,
    pilot,
    trained_on,
)

if TYPE_CHECKING:
    from torch import Tensor

    from perrin.data import Dataset
    from perrin.evaluation.term_curve import Term
    from perrin.likelihood import Bound, NoiseBands

LEADING = ("index", "name", "bpd")
"""The first columns of every table of likelihoods."""
PARTS = ("bpd", "error_bpd", "prior_bpd", "vb_bpd", "decoder_bpd")


@dataclass(frozen=True)
class Band:
    """What the KL terms of one range of noise add to the bound."""

    name: str
    bpd: float
    bpd_se: float | None
    """None for a single example, and where no term was drawn."""
    drawn: bool
    """Whether a term was drawn for any example; the estimate is 0 otherwise."""


@dataclass(frozen=True)
class Means:
    """Means over the examples, in bits per dimension; an error that is not known is NaN."""

    bpd: float
    bpd_se: float
    """Standard error over the examples, which holds the Monte-Carlo noise; at least that noise."""
    bpd_mc_se: float
    """The Monte-Carlo noise alone: the standard error for these very examples."""
    n: int
    prior_bpd: float
    prior_se: float
    vb_bpd: float
    decoder_bpd: float
    decoder_se: float
    bands: list[Band]

    @classmethod
    def of(cls, rows: Tensor, bands: Sequence[str], drawn: Container[int]) -> Means:
        """Those of ``rows`` (N, 5 + bands), with the columns `PARTS` and ``bands``, of which some were ``drawn``."""
        from perrin.likelihood import mean_and_error

        bpd, error, noise = mean_with_errors(rows[:, 0], rows[:, 1])
        (prior, prior_se), (vb, _), (decoder, decoder_se), *others = map(mean_and_error, rows.T[2:])
        return cls(
            bpd=bpd,
            bpd_se=error,
            bpd_mc_se=noise,
            n=len(rows),
            prior_bpd=prior,
            prior_se=prior_se,
            vb_bpd=vb,
            decoder_bpd=decoder,
            decoder_se=decoder_se,
            bands=[
                Band(name, mean, finite(se) if place in drawn else None, place in drawn)
                for place, (name, (mean, se)) in enumerate(zip(bands, others, strict=True))
            ],
        )


@dataclass(frozen=True)
class Figures(Means):
    """What was measured, and how."""

    network_calls: int
    """Per example, without the pilot."""
    network_calls_total: int
    """Examples that the network saw in all, with the pilot's."""
    seconds: float
    num_timesteps: int
    """Of the chain that was measured."""
    chain: str
    calibrated: bool
    terms: int | None
    """KL terms drawn per example; None is all of them."""
    decoder_draws: int
    seed: int
    levels: int | None
    conditional: bool
    """Whether the network was told the class of each example."""
    trained_on: int | None
    """How many of the examples it was trained on; None where that is not known: its data are others."""
    clip_denoised: bool
    weights: str
    step: int
    table: str
    curve: list[str]
    """The table and the plot over timesteps, where asked for."""


def measure(
    model: Subject,
    dataset: Dataset,
    indices: list[int],
    *,
    effort: Effort,
    out: Path,
    per_timestep: bool = False,
) -> Figures:
    """Bits per dimension of the examples ``indices`` of ``dataset``; writes the table ``out``.

    ``per_timestep`` also writes the curve over timesteps, of an effort that takes all terms.
    """
    from perrin.likelihood import NoiseBands

    started, calls, bands = time.monotonic(), Calls(), NoiseBands.of(model.chain)
    moments = Moments(model.chain.num_timesteps) if per_timestep else None
    rows, drawn = _rows(model, dataset, indices, effort, bands=bands, moments=moments, calls=calls)
    _write_rows(out, dataset, indices[: len(rows)], dict(zip((*PARTS, *bands.names), rows.T, strict=True)))
    return Figures(
        **vars(Means.of(rows, bands.names, drawn)),
        network_calls=calls_per_example(model, effort),
        network_calls_total=calls.images,
        seconds=time.monotonic() - started,
        num_timesteps=model.chain.num_timesteps,
        chain=model.chain_text,
        calibrated=model.calibrated,
        terms=effort.terms_of(model.chain),
        decoder_draws=effort.decoder_draws,
        seed=effort.seed,
        levels=dataset.facts.levels,
        conditional=model.conditional(dataset),
        trained_on=trained_on(model.run, dataset, indices[: len(rows)]),
        clip_denoised=effort.clip,
        weights=model.run.weights,
        step=model.run.step,
        table=str(out),
        curve=[] if moments is None else _write_curve(moments.curve(model), out),
    )


def _write_rows(out: Path, dataset: Dataset, indices: list[int], columns: dict[str, Tensor]) -> None:
    from perrin.evaluation.tables import write_table

    values = {name: column.tolist() for name, column in columns.items()}
    write_table(out, {"index": indices, "name": [dataset.names[i] for i in indices], **values})


def _rows(
    model: Subject,
    dataset: Dataset,
    indices: list[int],
    effort: Effort,
    *,
    bands: NoiseBands,
    moments: Moments | None,
    calls: Calls,
) -> tuple[Tensor, set[int]]:
    """`PARTS` and the bands of each example, (N, 5 + bands) float64 on the CPU; and the bands with a term drawn.

    The pilot takes the first of ``indices`` whatever the limit, so that an example's figures do not depend on it.
    """
    import torch

    from perrin.cli.progress import Bar

    probabilities = pilot(model, dataset, indices, effort, calls)
    measured = indices[: effort.limit]
    rows: list[Tensor] = []
    drawn: set[int] = set()
    with (
        Bar("measuring", len(measured) * calls_per_example(model, effort)) as bar,
        calls.counted(model.run.network, bar),
    ):
        for batch in batches(measured, effort.batch_size):
            found = bound_of(model, dataset, batch, effort, probabilities)
            parts = [found.total, found.error, found.prior, found.vb, found.decoder]
            rows.append(torch.column_stack([*parts, bands.sums(found)]))
            drawn.update(bands.places[t] for t in found.times.flatten().tolist())
            if moments is not None:
                moments.add(found)
    return torch.cat(rows), drawn


class Moments:
    """Count, mean and squared deviations of each term, 0 the decoder's, over examples that come in batches."""

    def __init__(self, num_timesteps: int) -> None:
        import torch

        self._count = 0
        self._mean = torch.zeros(num_timesteps, dtype=torch.float64)
        self._squares = torch.zeros(num_timesteps, dtype=torch.float64)

    def add(self, found: Bound) -> None:
        """Take in a batch of which every term was evaluated."""
        import torch

        terms = torch.column_stack([found.decoder, found.terms.gather(1, found.times.argsort(1))])  # (B, T)
        count = self._count + len(terms)
        mean = terms.mean(0)
        gap = mean - self._mean
        # Chan, Golub and LeVeque's update: no difference of large sums of squares.
        self._squares += (terms - mean).square().sum(0) + gap.square() * (self._count * len(terms) / count)
        self._mean += gap * (len(terms) / count)
        self._count = count

    def curve(self, model: Subject) -> list[Term]:
        """The terms by timestep."""
        from perrin.evaluation.term_curve import Term

        chain, count = model.chain, self._count
        variance = self._squares / (count - 1) / count if count > 1 else self._squares * math.nan
        return [
            Term(
                t=t,
                timestep=int(chain.floats["timestep_map"][t]),
                log_snr=chain.level_of_batch(t).log_snr,
                bpd=float(self._mean[t]),
                error=float(variance[t].sqrt()),
            )
            for t in range(chain.num_timesteps)
        ]


class CurveFiles(NamedTuple):
    """Where the curve over timesteps goes."""

    table: Path
    plot: Path

    @classmethod
    def beside(cls, out: Path) -> CurveFiles:
        """The files beside the table ``out``: ``likelihood-timesteps.csv`` and ``.png``."""
        return cls(*(out.with_name(f"{out.stem}-timesteps{end}") for end in (out.suffix, ".png")))

    def claim(self) -> None:
        """Make sure, before a long measurement, that they overwrite nothing else. Raises `ArgumentError`."""
        from perrin.evaluation.plots import check_replaceable
        from perrin.evaluation.tables import claim_table
        from perrin.evaluation.term_curve import COLUMNS, is_plot

        claim_table(self.table, COLUMNS)
        check_replaceable(self.plot, is_plot)


def _write_curve(curve: list[Term], out: Path) -> list[str]:
    from perrin.evaluation.tables import write_table
    from perrin.evaluation.term_curve import columns_of, plot_terms

    files = CurveFiles.beside(out)
    write_table(files.table, columns_of(curve))
    plot_terms(curve, files.plot)
    return list(map(str, files))


def describe(figures: Figures) -> list[str]:
    """The figures for people."""
    found = figures.bpd, figures.bpd_se, figures.bpd_mc_se
    kl = "all" if figures.terms is None else "estimated from"
    draws = figures.network_calls - figures.decoder_draws
    flattered = flattered_text("the run", figures.trained_on, figures.n)
    return [
        measured_text(*found, count=figures.n, remedy=_remedy(figures)),
        *([flattered] if flattered else []),
        *_band_lines(figures),
        f"variational bound{given_class_text(figures.conditional)}, {figures.chain}; {data_text(figures.levels)}, "
        f"{clip_text(figures.clip_denoised)}",
        f"weights {figures.weights} of step {figures.step}; seed {figures.seed}; {figures.seconds:.1f} s",
        f"{figures.network_calls} network calls per example: {kl} {draws} KL terms, {figures.decoder_draws} decoder "
        f"draws; {figures.network_calls_total} in all",
        f"one row per example: {figures.table}",
        *([f"by timestep: {', '.join(figures.curve)}"] if figures.curve else []),
    ]


def _remedy(figures: Figures) -> str | None:
    """The flags that tell the Monte-Carlo error; None for a chain whose only KL term nothing can draw twice."""
    if figures.num_timesteps == 2:
        return None
    once = {"--terms 2": figures.terms == 1, "--decoder-draws 2": figures.decoder_draws == 1}
    return " ".join(flag for flag, missing in once.items() if missing)


def _band_lines(figures: Figures) -> Sequence[str]:
    """A table of the parts of the bound."""
    decoder = Band("decoder", figures.decoder_bpd, finite(figures.decoder_se), drawn=True)
    prior = Band("prior", figures.prior_bpd, finite(figures.prior_se), drawn=True)
    rows = [decoder, *figures.bands, prior]
    width = max(len(row.name) for row in rows)
    lines = [f"  {'':<{width}}  {'bits/dim':<17} {'share':>7}"]
    for row in rows:
        if not row.drawn:
            lines.append(f"  {row.name:<{width}}  {'–':>8}")
            continue
        error = "" if row.bpd_se is None else f" ± {row.bpd_se:.4f}"
        lines.append(f"  {row.name:<{width}}  {row.bpd:8.4f}{error:<9} {row.bpd / figures.bpd:7.1%}")
    return lines


def data_text(levels: int | None) -> str:
    """What the data are: ``256 levels``."""
    return "continuous data" if levels is None else f"{levels} levels"


def clip_text(clip: bool) -> str:
    """Whether predictions of x_0 were clipped."""
    return "predictions clipped to [-1, 1]" if clip else "predictions not clipped"
