"""How far data are from what comes back of them: per example, against the number of steps, and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from perrin.data import to_levels
from perrin.errors import ArgumentError
from perrin.evaluation.plots import figure_of, has_title, save_figure
from perrin.evaluation.tables import Columns
from perrin.files import claim

TITLE = "perrin reconstruct"
"""Of the pictures that the command writes."""

COLUMNS = (
    "method",
    "steps",
    "rmse",
    "rmse_levels",
    "exact_share",
    "largest_error",
    "largest_residual",
    "converged",
    "n",
    "network_calls",
)


@dataclass(frozen=True)
class RoundTrips:
    """The errors of examples that were inverted and sampled again, all by one method with one number of steps."""

    method: str
    steps: int
    rmse: float
    """Root mean square over all values, data in [-1, 1]."""
    rmse_levels: float
    """The same in steps of one level; NaN for continuous data."""
    exact_share: float
    """Share of the values that come back as the same level; NaN for continuous data."""
    largest_error: float
    """Of any value, in [-1, 1]."""
    largest_residual: float
    """Of any step of any example, NaN where the method knows none."""
    converged: float
    """Number of examples of which every step converged, NaN where the method knows no residuals."""
    n: int
    network_calls: int
    """Up and down, for the batch that needed most."""


def round_trips(
    method: str,
    steps: int,
    x: Tensor,
    back: Tensor,
    *,
    levels: int | None,
    residuals: Tensor,
    tolerance: float,
    network_calls: int,
) -> RoundTrips:
    """The figures of ``back`` against the data ``x``, both (N, ...) in [-1, 1]; ``residuals`` (N,), NaN if unknown.

    Raises `ArgumentError` where ``back`` is not finite.
    """
    error = (back - x).double()
    rmse = float(error.square().mean().sqrt())
    same = to_levels(back, levels) == to_levels(x, levels)
    return RoundTrips(
        method=method,
        steps=steps,
        rmse=rmse,
        rmse_levels=math.nan if levels is None else rmse * (levels - 1) / 2,
        exact_share=math.nan if levels is None else float(same.mean()),
        largest_error=float(error.abs().max()),
        largest_residual=float(residuals.max()),
        converged=math.nan if residuals.isnan().all() else float((residuals <= tolerance).sum()),
        n=len(x),
        network_calls=network_calls,
    )


def columns_of(found: Sequence[RoundTrips]) -> Columns:
    """``found`` as a table."""
    return {name: [getattr(each, name) for each in found] for name in COLUMNS}


def plot_round_trips(found: Sequence[RoundTrips], path: Path) -> None:
    """Draw the error against the number of steps into the PNG at ``path``, a line a method.

    Hollow marks, which the legend explains, are examples that did not all converge.
    """
    figure = figure_of(1)
    axes = figure.add_subplot(1, 1, 1)
    for method in dict.fromkeys(each.method for each in found):
        line = [each for each in found if each.method == method]
        steps, errors = [each.steps for each in line], [max(each.rmse, 1e-17) for each in line]
        (drawn,) = axes.plot(steps, errors, marker="o", label=method)
        short = [(each.steps, max(each.rmse, 1e-17)) for each in line if each.converged < each.n]
        if short:
            axes.plot(*zip(*short, strict=True), "o", markerfacecolor="white", color=drawn.get_color())
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="root mean square error, data in [-1, 1]")
    if any(each.converged < each.n for each in found):
        axes.plot([], [], "o", markerfacecolor="white", color="grey", label="hollow: not all converged")
    ticks = sorted({each.steps for each in found})
    axes.set_xticks(ticks, [str(steps) for steps in ticks])
    axes.set_xticks([], minor=True)
    axes.set_title("Round trip: inverted and sampled again")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path, TITLE)


def claim_picture(path: Path) -> None:
    """Make sure, before long work, that a picture can be written to ``path``, over none but the command's own.

    Raises `ArgumentError` where something else is there, `OSError` where nothing can be written.
    """
    if path.exists() and not has_title(path, TITLE):
        raise ArgumentError(f"{path} exists and was not made by {TITLE}: choose another --out")
    claim(path)
