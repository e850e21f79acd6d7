"""Closed forms as networks: ideal ones in every mean and variance type, and one that is ideal for nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from perrin.diffusion import GaussianDiffusion
from perrin.oracles.data import Data
from perrin.parameterization import ModelMeanType
from perrin.tensors import append_dims, widest_dtype
from perrin.variance import ModelVarType


@dataclass(frozen=True)
class Oracle:
    """The ideal network for ``data`` under ``diffusion``, in its mean type; ``extra`` gives its variance half.

    ``diffusion`` is the whole chain, whose respaced ones have the same network. Levels are computed from its betas
    alone. A fractional time, or a rescaled one, lies between two steps linearly in log-SNR.
    """

    data: Data
    diffusion: GaussianDiffusion
    extra: Callable[[Tensor, Tensor], Tensor] | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The output for ``x`` (B, C, ...) at the times ``t`` (B,) that a network is told."""
        step, signal = _steps(self.diffusion, t), _on(t.device, self._signal)
        now = _between(signal[1:], step)
        before = signal[step.round().long() if step.is_floating_point() else step]
        alpha, sigma = (append_dims(level, x.ndim).to(x.dtype) for level in (now.sqrt(), (1 - now).sqrt()))
        output = {
            ModelMeanType.START_X: lambda: self.data.x_start(x, alpha, sigma),
            ModelMeanType.EPSILON: lambda: self.data.eps(x, alpha, sigma),
            ModelMeanType.VELOCITY: lambda: (
                alpha * self.data.eps(x, alpha, sigma) - sigma * self.data.x_start(x, alpha, sigma)
            ),
            ModelMeanType.PREVIOUS_X: lambda: self._previous(x, alpha, sigma, now / before, before),
        }[self.diffusion.model_mean_type]()
        return output if self.extra is None else torch.cat([output, self.extra(x, t)], 1)

    def _previous(self, x: Tensor, alpha: Any, sigma: Any, decay: Tensor, before: Tensor) -> Tensor:
        """E[x_{t-1} | x_t] (DDPM eq. 7), with coefficients in float64: 1 - decay is a small beta."""
        coef1, coef2 = before.sqrt() * (1 - decay), decay.sqrt() * (1 - before)
        coef1, coef2 = (append_dims(c / (1 - decay * before), x.ndim).to(x.dtype) for c in (coef1, coef2))
        return coef1 * self.data.x_start(x, alpha, sigma) + coef2 * x

    @cached_property
    def _signal(self) -> Tensor:
        return signal_of(self.diffusion)


@dataclass(frozen=True)
class OptimalVariance:
    """The ``extra`` of an `Oracle` whose reverse steps have the best variance, Var[x_s | x_t] in each dimension.

    s is the timestep before t among ``kept``, those of the respaced chain, ascending; None keeps all. For LEARNED
    and LEARNED_RANGE networks. For Gaussian data the reverse process is then exact, and the bound is the entropy.
    """

    data: Data
    diffusion: GaussianDiffusion
    kept: Sequence[int] | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The variance half (B, C, ...) for ``x`` at the times ``t`` (B,)."""
        times = self._times.to(t.device)
        place = torch.searchsorted(times, _steps(self.diffusion, t).round().long())
        signal = _on(t.device, self._signal)
        now, before = (_level(append_dims(signal[i], x.ndim)) for i in (place + 1, place))
        log_variance = self.data.previous(x.to(signal.dtype), now, before)[1].log()
        if self.diffusion.model_var_type is ModelVarType.LEARNED_RANGE:
            small, large = (append_dims(_on(t.device, end)[place], x.ndim) for end in self._ends)
            span = torch.where(
                large > small, large - small, 1.0
            )  # of a chain of one step the range is a point
            log_variance = (2 * log_variance - small - large) / span
        return log_variance.to(x.dtype)

    @cached_property
    def _times(self) -> Tensor:
        return torch.tensor(range(self.diffusion.num_timesteps) if self.kept is None else list(self.kept))

    @cached_property
    def _signal(self) -> Tensor:
        whole = signal_of(self.diffusion)
        return torch.cat([whole[:1], whole[1:][self._times]])

    @cached_property
    def _ends(self) -> tuple[Tensor, Tensor]:
        """The logs of the posterior's variance, whose first is clipped to the second, and of beta."""
        before, now = self._signal[:-1], self._signal[1:]
        beta = 1 - now / before
        small = beta * (1 - before) / (1 - now)
        small[0] = small[1] if len(small) > 1 else beta[0]
        return small.log(), beta.log()


def arbitrary(channels: int) -> Callable[..., Tensor]:
    """A smooth network that is ideal for nothing, with ``channels`` times the data's channels."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        phase = append_dims(t, x.ndim).to(x.dtype) * 0.37
        halves = [torch.sin(1.3 * x + phase), 0.7 * torch.cos(2.1 * x - phase)]
        return torch.cat(halves[:channels], 1)

    return network


def signal_of(diffusion: GaussianDiffusion) -> Tensor:
    """alphas_cumprod (T + 1,) from the betas alone, float64 on the CPU; the first is that of the data, 1."""
    betas = diffusion.betas.detach().cpu().double()
    return torch.cat([betas.new_ones(1), torch.cumprod(1 - betas, 0)])


def _on(device: torch.device, table: Tensor) -> Tensor:
    return table.to(device, widest_dtype(device))


def _steps(diffusion: GaussianDiffusion, t: Tensor) -> Tensor:
    """The timesteps, whole or fractional, of which a network is told ``t``."""
    return (
        t.to(widest_dtype(t.device)) * (diffusion.original_num_timesteps / 1000)
        if diffusion.rescale_timesteps
        else t
    )


def _between(signal: Tensor, t: Tensor) -> Tensor:
    """Entries ``t`` (B,) of ``signal`` (T,), of fractional ones that between its neighbours in log-SNR."""
    if not t.is_floating_point():
        return signal[t]
    before = t.floor().long().clamp(0, len(signal) - 1)
    log_snr = signal.logit().clamp(min=-80)  # a last level may hold no signal
    after = log_snr[(before + 1).clamp(max=len(signal) - 1)]
    return torch.lerp(log_snr[before], after, t.to(signal.dtype) - before).sigmoid()


def _level(signal: Tensor) -> tuple[Tensor, Tensor]:
    return signal.sqrt(), (1 - signal).sqrt()
