"""DPM-Solver++ (arXiv:2211.01095): x_start extrapolated over half log-SNR, lambda = log(alpha / sigma)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from perrin.denoiser import Denoiser, Time
from perrin.errors import ArgumentError
from perrin.noise import CLEAN, Level
from perrin.samplers.base import Draw, Memory, Sampler, Stepped, Visit
from perrin.samplers.grids import Grid
from perrin.samplers.multistep import along_mean, level_of, ode_shares, seen_at, within_reach
from perrin.tensors import mix

Solver = Literal["2m", "2s", "3m", "2m-sde"]


class _Rule(NamedTuple):
    order: int
    earlier: int = 0
    """How many earlier predictions it looks at."""
    amid: bool = False
    """Whether it calls the network amid the step."""
    noisy: bool = False
    """Whether it solves the SDE."""


_RULES: dict[Solver, _Rule] = {
    "2m": _Rule(2, earlier=1),
    "2s": _Rule(2, amid=True),
    "3m": _Rule(3, earlier=2),
    "2m-sde": _Rule(2, earlier=1, noisy=True),
}


@dataclass(frozen=True)
class SamplerDPM(Sampler):
    """DPM-Solver++ by the rule ``solver``.

    - ``"2m"``: second order, from the last two predictions (algorithm 2);
    - ``"2s"``: second order, from a second network call amid each step (algorithm 1);
    - ``"3m"``: third order, from the mean of a parabola through the last three predictions (the authors' code halves
      its second difference, which leaves the second order);
    - ``"2m-sde"``: the predictions of 2m in the reverse SDE, with fresh noise at each step (SDE-DPM-Solver++(2M)).

    The first steps know fewer predictions and are of lower order, and so are steps much longer than the one before
    (`perrin.samplers.multistep.REACH`). The one to the data, where lambda is infinite, gives x_start. Raises
    `ArgumentError` for another solver.
    """

    grid: Grid = field(default="log-snr", kw_only=True)
    solver: Solver = "2m"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver not in _RULES:
            raise ArgumentError(f"solver must be one of {', '.join(get_args(Solver))}, got {self.solver!r}")

    @property
    def convergence_order(self) -> int:
        """The p of an error that falls as K^-p; for 2m-sde that of the variance of Gaussian samples."""
        return _RULES[self.solver].order

    @property
    def network_calls(self) -> int:
        """One a step; with 2s another one amid each step that has a middle."""
        return len(self.times) - 1 + sum(self._middle(t, s) is not None for t, s in pairwise(self.times))

    def step(
        self, denoise: Denoiser, x: Tensor, t: Time, s: Time, draw: Draw, memory: Memory = ()
    ) -> Stepped:
        """From ``x`` at time ``t`` to the earlier time ``s``."""
        visit, rule, then = Visit(t, x, denoise(x, t)), _RULES[self.solver], level_of(denoise, s)
        seen = (
            seen_at(denoise, (visit, *self._amid(denoise, visit, s)))
            if rule.amid
            else within_reach(seen_at(denoise, (visit, *memory)), then)
        )
        now, x_start = seen[0]
        sample = along_mean(x, seen, now, then, _sde_shares if rule.noisy else ode_shares)
        if rule.noisy and then.sigma > 0:
            sample = mix(1.0, sample, then.sigma * math.sqrt(1 - _decay(now, then) ** 2), draw())
        return Stepped(sample, x_start, (visit, *memory)[: rule.earlier] if now.alpha > 0 else ())

    def _amid(self, denoise: Denoiser, visit: Visit, s: Time) -> Memory:
        """What the network says amid the step from ``visit`` to ``s``, if that has a middle (algorithm 1)."""
        middle = self._middle(visit.t, s)
        if middle is None:
            return ()
        seen = seen_at(denoise, (visit,))
        x = along_mean(visit.x, seen, seen[0].level, level_of(denoise, middle))
        return (Visit(middle, x, denoise(x, middle)),)

    def _middle(self, t: Time, s: Time) -> float | None:
        """The time amid a step of 2s in lambda; none where that is infinite, or between neighbours in whole times."""
        if not _RULES[self.solver].amid or isinstance(t, Tensor) or isinstance(s, Tensor) or s == CLEAN:
            return None
        log_snr = (self.diffusion.level_of_batch(t).log_snr + self.diffusion.level_of_batch(s).log_snr) / 2
        if log_snr == -math.inf:
            return None
        middle = self.diffusion.time_of(log_snr)
        if self.diffusion.knows_fractional_times:
            return middle
        whole = min(max(round(middle), int(s) + 1), int(t) - 1)
        return whole if whole > s else None


def _sde_shares(now: Level, then: Level) -> tuple[float, float]:
    decay = _decay(now, then)
    return then.sigma / now.sigma * decay, then.alpha * (1 - decay**2)


def _decay(now: Level, then: Level) -> float:
    """exp(-h), h the step in lambda."""
    return then.sigma / now.sigma * now.alpha / then.alpha
