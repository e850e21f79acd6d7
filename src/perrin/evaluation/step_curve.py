"""Bits per dimension against the number of steps, for every variance and spacing: what calibration gains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from perrin.evaluation.plots import figure_of
from perrin.evaluation.tables import Columns
from perrin.files import written_aside
from perrin.likelihood import mean_and_error
from perrin.likelihood.calibration import Plan
from perrin.likelihood.costs import Levels, Rule, image_nats, path_nats
from perrin.likelihood.statistics import Statistics
from perrin.likelihood.timesteps import SPACINGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS = (4, 8, 16, 32, 64, 128, 256)
"""The numbers of steps that are reported, besides all T."""

BEST = "DP"
"""The spacing by dynamic programming."""

COLUMNS = ("variance", "spacing", "steps", "bpd", "error_bpd")

SHOWN = 3.0
"""The plot ends at so many times the best figure."""


class Cell(NamedTuple):
    """The bound of one chain."""

    variance: str
    spacing: str
    steps: int
    bpd: float
    """Mean over the images, bits per dimension."""
    error: float
    """Standard error over the images; NaN where the variance depends on the state, and for a single image."""


def curve(
    statistics: Statistics, levels: Levels, rules: Mapping[str, Rule], plans: Mapping[str, Plan]
) -> list[Cell]:
    """The expected bound on the images of ``statistics`` for each rule, every spacing and number of steps.

    ``plans`` hold the best timesteps under each rule, found on other images. All T steps have the spacing `BEST`
    too, whether or not a plan goes so far.
    """
    total = statistics.num_timesteps
    return [
        cell(statistics, levels, (name, rule), spacing, timesteps)
        for name, rule in rules.items()
        for spacing in (*SPACINGS, BEST)
        for timesteps in _chains(total, spacing, plans[name])
    ]


def _chains(total: int, spacing: str, plan: Plan) -> list[list[int]]:
    counts = [steps for steps in STEPS if steps < total]
    some = [plan.paths[k - 1] if spacing == BEST else SPACINGS[spacing](total, k) for k in counts]
    return [*some, list(range(total))]


def cell(
    statistics: Statistics, levels: Levels, named: tuple[str, Rule], spacing: str, timesteps: Sequence[int]
) -> Cell:
    """The bound of the chain over ``timesteps`` under one rule and its name."""
    name, rule = named
    nats = float(path_nats(statistics, levels, rule, timesteps).sum() + statistics.prior.mean())
    error = math.nan
    if not rule.by_state:
        error = mean_and_error(image_nats(statistics, levels, rule, timesteps))[1] / math.log(2)
    return Cell(name, spacing, len(timesteps), nats / math.log(2), error)


def columns_of(cells: Sequence[Cell]) -> Columns:
    """``cells`` as a table."""
    return dict(zip(COLUMNS, map(list, zip(*cells, strict=True)), strict=True))


def plot_curve(cells: Sequence[Cell], path: Path) -> None:
    """Draw bits/dim against the number of steps into the PNG at ``path``: a panel per spacing, a line per variance.

    What lies above `SHOWN` times the best figure is cut off.
    """
    spacings = list(dict.fromkeys(cell.spacing for cell in cells))
    figure = figure_of(len(spacings), width=3.6)
    best = min(cell.bpd for cell in cells)
    for place, spacing in enumerate(spacings, start=1):
        axes = figure.add_subplot(1, len(spacings), place)
        _panel(axes, [cell for cell in cells if cell.spacing == spacing])
        axes.axhline(best, color="black", linewidth=0.8, linestyle=":")
        room = 0.05 * abs(best) + 0.01
        axes.set(title=f"{spacing} spacing", xlabel="steps", ylim=(best - room, best + SHOWN * abs(best) + 1))
        axes.tick_params(labelleft=place == 1)
        if place == 1:
            axes.set_ylabel("bits per dimension")
        if place == len(spacings):  # which is the emptiest, being the best
            axes.legend()
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=120)


def _panel(axes: Axes, cells: Sequence[Cell]) -> None:
    for variance in dict.fromkeys(cell.variance for cell in cells):
        line = [cell for cell in cells if cell.variance == variance]
        axes.plot([c.steps for c in line], [c.bpd for c in line], marker=".", label=variance)
    axes.set_xscale("log", base=2)
    steps = sorted({c.steps for c in cells})
    axes.set_xticks(steps, [str(k) for k in steps], fontsize="small")
    axes.grid(alpha=0.3)
