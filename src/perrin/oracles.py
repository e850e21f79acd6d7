"""Data whose best denoiser is known in closed form, as networks: what the samplers and the bound are held against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from perrin.diffusion import GaussianDiffusion
from perrin.parameterization import ModelMeanType
from perrin.tensors import append_dims


class Data(Protocol):
    """A distribution of x_0 with independent, equal dimensions."""

    def x_start(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_t]."""
        ...


@dataclass(frozen=True)
class GaussianData:
    """x_0 ~ N(mean, std^2) in each dimension."""

    mean: float = 0.0
    std: float = 0.5

    def x_start(self, x_t: Tensor, alpha: Any, sigma: Any) -> Tensor:
        gain = alpha * self.std**2 / self.total_variance(alpha, sigma)
        x_start: Tensor = self.mean + gain * (x_t - alpha * self.mean)
        return x_start

    def total_variance(self, alpha: Any, sigma: Any) -> Any:
        """Var[x_t]."""
        return alpha**2 * self.std**2 + sigma**2

    def remaining_variance(self, alpha: Any, sigma: Any) -> Any:
        """Var[x_0 | x_t]."""
        return self.std**2 * sigma**2 / self.total_variance(alpha, sigma)

    def flow(self, x: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
        """The probability-flow ODE's exact solution from level ``start`` (alpha, sigma) to ``end``."""
        stretch = math.sqrt(self.total_variance(*end) / self.total_variance(*start))
        return end[0] * self.mean + stretch * (x - start[0] * self.mean)

    def nll_bpd(self, x_start: Tensor) -> Tensor:
        """-log2 p(x_0) per dimension, (B,)."""
        nats = 0.5 * (((x_start - self.mean) / self.std) ** 2 + math.log(2 * math.pi * self.std**2))
        return nats.flatten(1).mean(1) / math.log(2)

    def draw(self, *shape: int, seed: int = 0) -> Tensor:
        return self.mean + self.std * normal(*shape, seed=seed)


@dataclass(frozen=True)
class MixtureData:
    """x_0 ~ an even mixture of N(mean, std^2) in each dimension."""

    means: tuple[float, ...] = (-0.7, 0.1, 0.6)
    std: float = 0.1

    def x_start(self, x_t: Tensor, alpha: Any, sigma: Any) -> Tensor:
        parts = [GaussianData(mean, self.std) for mean in self.means]
        logits = torch.stack(
            [-0.5 * (x_t - alpha * p.mean) ** 2 / p.total_variance(alpha, sigma) for p in parts]
        )
        means = torch.stack([p.x_start(x_t, alpha, sigma) for p in parts])
        return (torch.softmax(logits, 0) * means).sum(0)


@dataclass(frozen=True)
class Oracle:
    """The ideal network for ``data`` under ``diffusion``, in its mean type; ``extra`` gives its variance half."""

    data: Data
    diffusion: GaussianDiffusion
    extra: Callable[[Tensor, Tensor], Tensor] | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        signal = torch.cumprod(1 - self.diffusion.betas, 0)
        alpha, sigma, before = (
            append_dims(table[t], x.ndim).to(x.dtype)
            for table in (signal.sqrt(), (1 - signal).sqrt(), torch.cat([signal.new_ones(1), signal])[:-1])
        )
        x_start = self.data.x_start(x, alpha, sigma)
        eps = (x - alpha * x_start) / sigma
        decay = alpha**2 / before
        output = {
            ModelMeanType.START_X: x_start,
            ModelMeanType.EPSILON: eps,
            ModelMeanType.VELOCITY: alpha * eps - sigma * x_start,
            ModelMeanType.PREVIOUS_X: (
                before.sqrt() * (1 - decay) * x_start + decay.sqrt() * (1 - before) * x
            )
            / sigma**2,
        }[self.diffusion.model_mean_type]
        return output if self.extra is None else torch.cat([output, self.extra(x, t)], 1)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A reproducible standard normal draw."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def arbitrary(channels: int) -> Callable[..., Tensor]:
    """A smooth network that is ideal for nothing, with ``channels`` times the data's channels."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        phase = append_dims(t, x.ndim).to(x.dtype) * 0.37
        halves = [torch.sin(1.3 * x + phase), 0.7 * torch.cos(2.1 * x - phase)]
        return torch.cat(halves[:channels], 1)

    return network
