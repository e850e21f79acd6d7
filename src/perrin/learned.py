"""A diffusion with a learned variance as one module: images in, loss out, samples back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perrin.diffusion import GaussianDiffusion
from perrin.errors import ArgumentError
from perrin.losses import HYBRID_SHARE, LossType
from perrin.parameterization import ModelMeanType
from perrin.reverse import ModelKwargs
from perrin.samplers import SamplerDDIM, SamplerDDPM
from perrin.schedules import get_named_beta_schedule
from perrin.variance import VARIANCES, ModelVarType


class LearnedGaussianDiffusion(nn.Module):
    """``model`` trained with the hybrid loss of Improved DDPM: squared error plus a share of the bound.

    ``model(x, t, **model_kwargs)`` gives 2 C channels for C data channels. ``vb_loss_weight`` is the share: the
    loss adds ``vb_loss_weight * T * E[L_t]``, in bits per dimension, and 0.001 is the paper's hybrid at any T
    (arXiv:2102.09672 eq. 16). The bound trains the variance alone.

    Raises `ArgumentError` for a negative ``vb_loss_weight`` or a variance type that is not learned.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        timesteps: int = 1000,
        beta_schedule: str = "cosine",
        model_mean_type: ModelMeanType = ModelMeanType.EPSILON,
        model_var_type: ModelVarType = ModelVarType.LEARNED_RANGE,
        vb_loss_weight: float = 0.001,
        levels: int | None = 256,
    ) -> None:
        super().__init__()
        if not vb_loss_weight >= 0:
            raise ArgumentError(f"vb_loss_weight must not be negative, got {vb_loss_weight}")
        if VARIANCES[model_var_type].extra_channels == 0:
            raise ArgumentError(f"model_var_type must be LEARNED or LEARNED_RANGE, got {model_var_type.name}")
        self.model = model
        self.vb_loss_weight = vb_loss_weight
        self.diffusion = GaussianDiffusion(
            betas=get_named_beta_schedule(beta_schedule, timesteps),
            model_mean_type=model_mean_type,
            model_var_type=model_var_type,
            loss_type=LossType.RESCALED_MSE,
            levels=levels,
        )

    def forward(
        self,
        images: Tensor,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        model_kwargs: ModelKwargs = None,
    ) -> Tensor:
        """The loss () of ``images`` (B, C, ...) in [-1, 1], at uniformly drawn timesteps unless ``t`` (B,) is given.

        ``model_kwargs``, such as labels ``y``, go to the network.
        """
        if t is None:
            t = torch.randint(self.diffusion.num_timesteps, (len(images),), device=images.device)
        terms = self.diffusion.training_losses(self.model, images, t, model_kwargs, noise)
        return (terms["mse"] + self.vb_loss_weight / HYBRID_SHARE * terms["vb"]).mean()

    def sample(
        self,
        shape: Sequence[int],
        *,
        steps: int | None = None,
        eta: float | None = None,
        seed: int | None = None,
        clip_denoised: bool = True,
        model_kwargs: ModelKwargs = None,
    ) -> Tensor:
        """Samples of ``shape`` (B, C, ...): ancestral with the learned variance, or by DDIM if ``eta`` is given."""
        sampler = (
            SamplerDDPM(self.diffusion, steps) if eta is None else SamplerDDIM(self.diffusion, steps, eta)
        )
        return sampler.sample(
            self.model, shape, seed=seed, clip_denoised=clip_denoised, model_kwargs=model_kwargs
        )
