"""The bound by timestep: how much each term adds, and at which noise level."""

from __future__ import annotations

from itertools import accumulate
from math import isfinite, isnan
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from perrin.evaluation.plots import figure_of, has_title, save_figure
from perrin.evaluation.tables import Columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLOOR = 1e-5
"""Share of the largest term below which terms are not drawn: nobody could see them in the sum."""

TITLE = "Terms of the variational bound by timestep"

COLUMNS = ("t", "timestep", "log_snr", "bpd", "error_bpd")


class Term(NamedTuple):
    """One term of the bound, as a mean over examples."""

    t: int
    """Its place in the chain; 0 is the decoder's."""
    timestep: int
    """The time that the network is told."""
    log_snr: float
    """log(alpha^2 / sigma^2), in nats."""
    bpd: float
    """Bits per dimension."""
    error: float
    """Standard error over the examples; NaN for a single one."""


def columns_of(curve: list[Term]) -> Columns:
    """``curve`` as a table."""
    return dict(zip(COLUMNS, map(list, zip(*curve, strict=True)), strict=True))


def plot_terms(curve: list[Term], path: Path) -> None:
    """Draw each term with its error, and their sum from the least noise on, against log-SNR into the PNG at ``path``.

    Noise grows to the right; a timestep without signal is left out.
    """
    shown = [term for term in curve if isfinite(term.log_snr)]
    figure = figure_of(2)
    for place, panel in enumerate((_terms, _sums), start=1):
        axes = figure.add_subplot(1, 2, place)
        panel(axes, shown)
        axes.set(xlabel="log-SNR (noise grows to the right)")
        axes.invert_xaxis()
        axes.grid(alpha=0.3, which="both")
    save_figure(figure, path, TITLE)


def is_plot(path: Path) -> bool:
    """Whether ``path`` is a picture that `plot_terms` has drawn."""
    return has_title(path, TITLE)


def _terms(axes: Axes, curve: list[Term]) -> None:
    log_snr, bpd = [term.log_snr for term in curve], [term.bpd for term in curve]
    errors = [0.0 if isnan(term.error) else term.error for term in curve]
    low, high = ([mean + sign * error for mean, error in zip(bpd, errors, strict=True)] for sign in (-1, 1))
    axes.fill_between(log_snr, low, high, alpha=0.3, linewidth=0)
    axes.plot(log_snr, bpd, marker=".", markersize=3)
    if min(bpd) > 0:
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(min(bpd) / 2, max(bpd) * FLOOR), top=2 * max(bpd))
    axes.set(ylabel="bits per dimension", title="Terms of the bound (± standard error)")


def _sums(axes: Axes, curve: list[Term]) -> None:
    axes.plot([term.log_snr for term in curve], list(accumulate(term.bpd for term in curve)))
    axes.set(ylabel="bits per dimension", title="Sum of the terms up to this noise level")
