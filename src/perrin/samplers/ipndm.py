"""iPNDM: Adams-Bashforth in eps (PNDM, arXiv:2202.09778), begun with its lower orders (arXiv:2204.13902)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from perrin.denoiser import Denoiser, Time
from perrin.samplers.base import Draw, Memory, Sampler, Stepped
from perrin.samplers.grids import Grid
from perrin.samplers.multistep import along_eps, level_of, visit_with_eps

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""The weights of the last 1, 2, 3 or 4 slopes, newest first, for steps of one length (arXiv:2202.09778 eq. 9)."""


@dataclass(frozen=True)
class SamplerIPNDM(Sampler):
    """iPNDM in up to four predictions of eps; one network call a step.

    It weighs them as if all steps were of one length in sigma / alpha, which is crude but steady in few steps
    (arXiv:2312.00094). The step to the data gives x_start.
    """

    grid: Grid = field(default="log-snr", kw_only=True)

    @property
    def convergence_order(self) -> int:
        """The p of an error that falls as K^-p: not 4, since the steps differ in length."""
        return 2

    def step(
        self, denoise: Denoiser, x: Tensor, t: Time, s: Time, draw: Draw, memory: Memory = ()
    ) -> Stepped:
        """From ``x`` at time ``t`` to the earlier time ``s``."""
        now, then = level_of(denoise, t), level_of(denoise, s)
        visits = (visit_with_eps(denoise, x, t), *memory)
        known = visits[: len(ADAMS_BASHFORTH) - 1] if now.alpha > 0 else ()
        if then.sigma == 0:
            visits = visits[:1]
        sample = along_eps(x, visits, ADAMS_BASHFORTH[len(visits) - 1], now, then)
        return Stepped(sample, visits[0].denoised.x_start, known)
