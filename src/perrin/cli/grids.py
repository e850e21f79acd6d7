"""The flag ``--grid``: a grid by name, or its times themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, get_args

from tyro.constructors import PrimitiveConstructorSpec

GridFlag = Literal["uniform", "quadratic", "trailing", "log-snr", "karras"]
"""`perrin.samplers.GridName`, written out for ``--help``."""

Times = tuple[float, ...]


def read_grid(words: Sequence[str]) -> str | Times:
    """The grid that the one word of ``--grid`` gives. Raises ValueError, for tyro, where it gives none."""
    (word,) = words
    if word in get_args(GridFlag):
        return word
    try:
        return tuple(float(time) for time in word.split(","))
    except ValueError:
        raise ValueError(f"could not convert string to float: {word!r}") from None


def grid_text(grid: GridFlag | Times) -> str:
    """``grid`` as ``--grid`` takes it."""
    return grid if isinstance(grid, str) else ",".join(f"{time:g}" for time in grid)


GridOrTimes = Annotated[
    GridFlag | Times | None,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{'|'.join(get_args(GridFlag))}|T,T,...}}",
        instance_from_str=read_grid,
        is_instance=lambda grid: grid is None or isinstance(grid, str | tuple),
        str_from_instance=lambda grid: ["None" if grid is None else grid_text(grid)],
    ),
]
"""What ``--grid`` takes: a name, or times that commas part."""
