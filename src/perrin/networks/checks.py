"""What the networks refuse, in one line each."""

from collections.abc import Sequence

from torch import Tensor

from perrin.errors import ArgumentError, ShapeError


def require_positive(**values: int | None) -> None:
    """Raises `ArgumentError` that names the first of ``values`` below 1; None is allowed."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ArgumentError(f"{name} must be at least 1, got {value}")


def require_share(**values: float) -> None:
    """Raises `ArgumentError` that names the first of ``values`` outside [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ArgumentError(f"{name} must lie in [0, 1), got {value}")


def require_input(x: Tensor, channels: int, axes: Sequence[str]) -> None:
    """Raises unless ``x`` is floating-point of shape (B, channels, *axes)."""
    if x.ndim != 2 + len(axes) or x.shape[1] != channels:
        expected = ", ".join(["B", str(channels), *axes])
        raise ShapeError(f"x must have shape ({expected}), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ArgumentError(f"x must be floating-point values in [-1, 1], got {x.dtype}")


def require_divisible(size: Sequence[int], levels: int, patch: int = 1) -> None:
    """Raises `ShapeError`, naming the nearest sizes that do, unless ``size`` (H, W) divides into patches whose
    number halves at each level."""
    step = patch * 2 ** (levels - 1)
    if all(side % step == 0 for side in size):
        return
    smaller = tuple(max(side // step, 1) * step for side in size)
    larger = tuple(-(-side // step) * step for side in size)
    allowed = " or ".join(dict.fromkeys(f"{height} x {width}" for height, width in (smaller, larger)))
    height, width = size
    raise ShapeError(
        f"height and width must be multiples of {step} for {levels} levels"
        f"{f' of patches of {patch}' if patch > 1 else ''}, "
        f"got {height} x {width}; the nearest that are: {allowed}"
    )
