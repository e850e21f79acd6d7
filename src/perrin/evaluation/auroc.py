"""How well a score tells two groups apart: the area under the ROC curve, with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from perrin.errors import ArgumentError
from perrin.evaluation.plots import figure_of, has_title, save_figure
from perrin.randomness import seed_of

TITLE = "Scores of the examples inside and outside"
"""By which a plot is known as one of these."""


@dataclass(frozen=True)
class AUROC:
    """P(score outside > score inside) + P(equal) / 2, and an interval around it."""

    value: float
    low: float
    high: float


def auroc(
    inside: Tensor, outside: Tensor, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> AUROC:
    """The area under the ROC curve of scores ``inside`` (n,) against ``outside`` (m,), higher being less typical.

    The interval lies between the percentiles of ``resamples`` bootstrap samples, in which both groups are drawn
    anew with replacement; where the groups do not overlap it has no width. Raises `ArgumentError` for an empty
    group or a score that is not finite.
    """
    for name, group in (("inside", inside), ("outside", outside)):
        if group.numel() == 0 or not bool(group.isfinite().all()):
            raise ArgumentError(f"the scores {name} must be at least one number, all finite, got {group}")
    groups = inside.double().cpu().numpy(), outside.double().cpu().numpy()
    values, places = np.unique(np.concatenate(groups), return_inverse=True)
    halves = places[: len(groups[0])], places[len(groups[0]) :]
    draw = np.random.default_rng(seed_of("bootstrap", seed))
    drawn = [
        _area(*(np.bincount(draw.choice(half, len(half)), minlength=len(values)) for half in halves))
        for _ in range(resamples)
    ]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return AUROC(
        _area(*(np.bincount(half, minlength=len(values)) for half in halves)), float(low), float(high)
    )


def _area(inside: np.ndarray, outside: np.ndarray) -> float:
    """The share of pairs in which the outside score is higher, from how often each group has each value (V,)."""
    below = np.cumsum(inside) - inside / 2
    return float((outside * below).sum() / (inside.sum() * outside.sum()))


def plot_groups(panels: Mapping[str, Sequence[Tensor]], path: Path) -> None:
    """Draw histograms of (inside, outside) for each measure by its name into the PNG at ``path``.

    The axis ends at the 99th percentile of each group, beyond which values are drawn in the last bin.
    """
    figure = figure_of(len(panels))
    for place, (name, groups) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), place)
        values = [group.double().cpu().numpy() for group in groups]
        low = min(np.quantile(group, 0.01) for group in values)
        high = max(np.quantile(group, 0.99) for group in values)
        edges = np.linspace(low, high if high > low else low + 1, 41)
        for label, group in zip(("inside", "outside"), values, strict=True):
            axes.hist(
                group.clip(edges[0], edges[-1]), bins=edges.tolist(), density=True, alpha=0.6, label=label
            )
        axes.set(xlabel=name, ylabel="density")
        axes.legend()
    save_figure(figure, path, TITLE)


def is_plot(path: Path) -> bool:
    """Whether ``path`` is a picture that `plot_groups` has drawn."""
    return has_title(path, TITLE)
