"""Chains, data and networks that several tests of the engine share."""

from collections.abc import Callable

import torch
from torch import Tensor

from perrin import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from perrin.schedules import cosine_betas


def chain(
    mean: ModelMeanType = ModelMeanType.EPSILON,
    var: ModelVarType = ModelVarType.FIXED_SMALL,
    loss: LossType = LossType.MSE,
    num_timesteps: int = 100,
    rescale_timesteps: bool = False,
    levels: int | None = 256,
) -> GaussianDiffusion:
    return GaussianDiffusion(
        betas=cosine_betas(num_timesteps),
        model_mean_type=mean,
        model_var_type=var,
        loss_type=loss,
        rescale_timesteps=rescale_timesteps,
        levels=levels,
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def images(*shape: int, seed: int = 1) -> Tensor:
    return normal(*shape, seed=seed).clamp(-1, 1)


def signs(mean: float, std: float) -> tuple[Tensor, Tensor]:
    """x_0 and noise (4, 1): every combination of mean ± std and ± 1."""
    x = torch.tensor([mean + std, mean + std, mean - std, mean - std], dtype=torch.float64)
    return x[:, None], torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[:, None]


def ideal_eps(full: GaussianDiffusion, mean: float, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact noise prediction for x_0 ~ N(mean, std^2)."""

    def eps(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = full.level(t, x)
        return sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    return eps
