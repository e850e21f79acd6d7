"""How samples come about: a strip of states, or an animation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from perrin.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

    from perrin.data import Facts
    from perrin.samplers import Sample

STRIP_SAMPLES, STRIP_COLUMNS = 4, 10
ANIMATED_SAMPLES = 16
TITLE = "perrin trajectory"
SUFFIXES = (".png", ".gif", ".webp")


def check_trajectory(path: Path) -> None:
    """Raise `ArgumentError` for a name that no picture or animation has."""
    if path.suffix.lower() not in SUFFIXES:
        raise ArgumentError(f"--trajectory must end in {', '.join(SUFFIXES)}, got {path.name}")


def claim_trajectory(path: Path, out: Path, facts: Facts) -> None:
    """Make sure, before long work, that ``path`` can be written and overwrites no other picture than such a one.

    Raises `ArgumentError` for what has no pictures, and where something else is there.
    """
    from perrin.data.images import title_of
    from perrin.evaluation.samples import has_pictures
    from perrin.files import claim

    if not has_pictures(facts):
        raise ArgumentError(f"--trajectory needs a run of images, got data of shape {facts.shape}")
    among_samples = path.resolve().parent == out.resolve() and (path.stem.isdecimal() or path.stem == "grid")
    if among_samples or (path.exists() and title_of(path) != TITLE):
        raise ArgumentError(f"--trajectory {path} is another picture's place: choose another name")
    claim(path)


def shown(path: Path, count: int) -> int:
    """How many of ``count`` samples the file is to show."""
    return min(count, STRIP_SAMPLES if path.suffix.lower() == ".png" else ANIMATED_SAMPLES)


def write_trajectory(path: Path, start: Tensor, states: Sequence[Sample], facts: Facts) -> None:
    """Write what `Sampler.sample_progressive` went through from ``start`` (B, C, H, W) on.

    An animation shows x_t. A strip has two rows for each sample: x_t from noise to data, and below it the x_0 that
    was predicted there.
    """
    from perrin.data import to_levels, write_animation

    levels = facts.levels
    if path.suffix.lower() == ".png":
        _write_strip(path, start, states, levels)
    else:
        frames = [to_levels(x, levels) for x in (start, *(state["sample"] for state in states))]
        write_animation(path, frames, levels, title=TITLE)


def _write_strip(path: Path, start: Tensor, states: Sequence[Sample], levels: int | None) -> None:
    import torch

    from perrin.data import to_levels, write_grid

    columns = min(STRIP_COLUMNS, len(states))
    chosen = [round((len(states) - 1) * i / max(columns - 1, 1)) for i in range(columns)]
    before = [start, *(state["sample"] for state in states[:-1])]  # the x_t that each prediction is made of
    last = states[-1]["sample"]
    noisy = torch.stack([*(before[i] for i in chosen), last], 1)
    predicted = torch.stack([*(states[i]["pred_xstart"] for i in chosen), last], 1)
    rows = torch.stack([noisy, predicted], 1).flatten(0, 2)  # from (B, 2, columns + 1, C, H, W)
    write_grid(path, to_levels(rows, levels), levels, columns=columns + 1, title=TITLE)
