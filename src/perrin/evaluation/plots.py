"""Pictures of training; matplotlib is imported only when one is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perrin.data.images import title_of
from perrin.errors import ArgumentError
from perrin.files import written_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


def figure_of(panels: int, *, width: float = 5.5) -> Figure:
    """An empty figure with room for ``panels`` side by side, each ``width`` inches, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * max(1, panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path, title: str) -> None:
    """Write ``figure`` into the PNG at ``path``, with the ``title`` that `has_title` looks for."""
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=120, metadata={"Title": title})


def has_title(path: Path, title: str) -> bool:
    """Whether ``path`` is a picture that `save_figure` wrote with ``title``."""
    return title_of(path) == title


def check_replaceable(path: Path, is_plot: Callable[[Path], bool]) -> None:
    """Raise `ArgumentError` where something is at ``path`` that ``is_plot`` does not know for a plot of its kind."""
    if path.exists() and not is_plot(path):
        raise ArgumentError(f"{path} exists and is no such plot: choose another --out")


def plot_training(rows: Sequence[Row], path: Path) -> None:
    """Draw the loss and the held-out bits/dim against the step into the PNG at ``path``.

    ``rows`` are those of ``metrics.jsonl``: each has ``step``, and ``loss``, a mean over ``steps``, or
    ``held_out_bpd`` with its standard error. A panel without a figure to show is left out.
    """
    losses = _full_windows([row for row in rows if row.get("loss") is not None])
    measured = [row for row in rows if row.get("held_out_bpd") is not None]
    panels = [panel for panel in ((_loss, losses), (_held_out, measured)) if panel[1]]
    figure = figure_of(len(panels))
    for place, (panel, found) in enumerate(panels, start=1):
        panel(figure.add_subplot(1, len(panels), place), found)
    save_figure(figure, path, "perrin training")


def _full_windows(rows: Sequence[Row]) -> Sequence[Row]:
    """``rows`` without the means over few ``steps``, which a run's end leaves and which are mostly noise."""
    most = max((row.get("steps", 1) for row in rows), default=1)
    return [row for row in rows if 2 * row.get("steps", 1) >= most]


def _loss(axes: Axes, rows: Sequence[Row]) -> None:
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    axes.plot(steps, losses)
    if min(losses) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="optimizer step", ylabel="training loss", title="Training loss")
    axes.grid(alpha=0.3, which="both")


def _held_out(axes: Axes, rows: Sequence[Row]) -> None:
    steps, bpd = [row["step"] for row in rows], [row["held_out_bpd"] for row in rows]
    errors = [row["held_out_bpd_se"] or 0.0 for row in rows]
    axes.errorbar(steps, bpd, yerr=errors, marker="o", markersize=3, capsize=2)
    axes.set(xlabel="optimizer step", ylabel="bits per dimension", title="Held-out bound (± standard error)")
    axes.grid(alpha=0.3)
