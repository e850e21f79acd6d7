"""Which times a sampler visits: grids by name, or a list of the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, get_args

from perrin.errors import ArgumentError
from perrin.forward import ForwardProcess
from perrin.noise import CLEAN
from perrin.schedules import space_timesteps

GridName = Literal["uniform", "quadratic", "trailing", "log-snr", "karras"]
Grid = GridName | Sequence[float]

MAX_SIGMA = 80.0
"""Where ``log-snr`` and ``karras`` begin, as sigma / alpha (EDM, arXiv:2206.00364 table 1), if the chain goes beyond:
more noise is all the same, and cosine's last sigma, 20,291, would take half of the steps."""

RHO = 7.0
"""EDM's exponent (arXiv:2206.00364 section 3)."""


def grid_times(
    diffusion: ForwardProcess, grid: Grid, steps: int | None = None, *, whole: bool = False
) -> tuple[float, ...]:
    """The ``steps`` times of ``grid`` in 0..T - 1, falling; all timesteps if None, whole numbers if ``whole``.

    - ``"uniform"``: even in time, with both ends; K = 1 is T - 1.
    - ``"quadratic"``: even in the root of time, with both ends (DDIM, arXiv:2010.02502 appendix D.2).
    - ``"trailing"``: even strides down from T - 1; the last step is as long as the others
      (arXiv:2305.08891 table 2).
    - ``"log-snr"``: even in log-SNR (DPM-Solver, arXiv:2206.00927 section 4.1); ``"karras"``: even in
      (sigma / alpha)^(1 / 7) (arXiv:2206.00364 eq. 5). Both give fractional times between `MAX_SIGMA` and the
      first timestep; on a chain that ends without signal they begin at T - 1 and go on from there.
    - times of the user's own, strictly falling, whole or not; CLEAN at the end may be left out.

    Raises `ArgumentError` for another name, steps out of range, or times that do not fall within 0..T - 1.
    """
    total = diffusion.num_timesteps
    if not isinstance(grid, str):
        return _own(grid, steps, total, whole)
    if grid not in get_args(GridName):
        raise ArgumentError(
            f"grid must be one of {', '.join(get_args(GridName))} or a list of times, got {grid!r}"
        )
    count = total if steps is None else steps
    if count != int(count) or not 1 <= count <= total:
        raise ArgumentError(f"steps must be from 1 to {total}, got {steps}")
    times = _GRIDS[grid](diffusion, int(count))
    return _rounded(times, total) if whole else times


def _own(grid: Sequence[float], steps: int | None, total: int, whole: bool) -> tuple[float, ...]:
    given = list(grid)
    given = given[:-1] if given and given[-1] == CLEAN else given
    falling = all(s < t for t, s in pairwise(given))
    if not given or not falling or not 0 <= given[-1] <= given[0] <= total - 1:
        raise ArgumentError(f"grid must hold falling times from 0 to {total - 1}, got {_listed(grid)}")
    times = tuple(int(t) if t == int(t) else float(t) for t in given)
    if steps is not None and steps != len(times):
        raise ArgumentError(f"steps must be {len(times)}, the number of times in grid, or None, got {steps}")
    if whole and any(isinstance(t, float) for t in times):
        raise ArgumentError(f"grid must hold whole times for this sampler and network, got {_listed(grid)}")
    return times


def _listed(grid: Sequence[float]) -> str:
    shown = ", ".join(f"{t:g}" for t in list(grid)[:8])
    return f"[{shown}{', ...' if len(grid) > 8 else ''}]"


def _uniform(diffusion: ForwardProcess, count: int) -> tuple[float, ...]:
    return tuple(sorted(space_timesteps(diffusion.num_timesteps, count), reverse=True))


def _quadratic(diffusion: ForwardProcess, count: int) -> tuple[float, ...]:
    total = diffusion.num_timesteps
    places = [1 - i / max(count - 1, 1) for i in range(count)]
    return _rounded(tuple((total - 1) * place**2 for place in places), total)


def _trailing(diffusion: ForwardProcess, count: int) -> tuple[float, ...]:
    total = diffusion.num_timesteps
    return tuple(round(total * (count - i) / count) - 1 for i in range(count))


def _log_snr(diffusion: ForwardProcess, count: int) -> tuple[float, ...]:
    return _by_level(diffusion, count, lambda log_snr: log_snr, lambda place: place)


def _karras(diffusion: ForwardProcess, count: int) -> tuple[float, ...]:
    return _by_level(
        diffusion,
        count,
        lambda log_snr: math.exp(-log_snr / (2 * RHO)),
        lambda place: -2 * RHO * math.log(place),
    )


def _by_level(
    diffusion: ForwardProcess,
    count: int,
    place_of: Callable[[float], float],
    log_snr_of: Callable[[float], float],
) -> tuple[float, ...]:
    """Times whose places, functions of log-SNR, are even."""
    last = diffusion.num_timesteps - 1
    noisiest = diffusion.log_snr(last)
    if noisiest > -math.inf or last == 0:
        return _even(diffusion, count, place_of, log_snr_of, noisiest=noisiest)
    # Pure noise has no place among the others: it takes that of the first.
    return last, *_even(diffusion, count, place_of, log_snr_of, noisiest=diffusion.log_snr(last - 1))[1:]


def _even(
    diffusion: ForwardProcess,
    count: int,
    place_of: Callable[[float], float],
    log_snr_of: Callable[[float], float],
    *,
    noisiest: float,
) -> tuple[float, ...]:
    """Those from log-SNR ``noisiest``, or from `MAX_SIGMA` if that is less noise, to the first timestep."""
    farthest = -2 * math.log(MAX_SIGMA)
    start = max(noisiest, farthest) if farthest < diffusion.log_snr(0) else noisiest
    first, last = place_of(start), place_of(diffusion.log_snr(0))
    inner = (first + (last - first) * i / (count - 1) for i in range(1, count - 1))
    return (diffusion.time_of(start), *(diffusion.time_of(log_snr_of(place)) for place in inner), 0)[:count]


def _rounded(times: Sequence[float], total: int) -> tuple[float, ...]:
    """``times`` (falling) as as many different whole numbers, each as near as the earlier ones leave it."""
    kept: list[int] = []
    for i, t in enumerate(times):
        upper = kept[-1] - 1 if kept else total - 1
        kept.append(max(min(round(t), upper), len(times) - 1 - i))
    return tuple(kept)


_GRIDS: dict[str, Callable[[ForwardProcess, int], tuple[float, ...]]] = {
    "uniform": _uniform,
    "quadratic": _quadratic,
    "trailing": _trailing,
    "log-snr": _log_snr,
    "karras": _karras,
}
