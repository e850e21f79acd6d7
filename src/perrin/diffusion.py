"""The engine: a diffusion process of T steps, its losses, and the variational bound.

The formulas are those of DDPM (arXiv:2006.11239) and Improved DDPM (arXiv:2102.09672); t is 0-based, the
papers' t is ours + 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from perrin.errors import ArgumentError
from perrin.forward import Step, bits, noise_like
from perrin.gaussian import gaussian_log_likelihood, normal_kl
from perrin.losses import LossType, loss_weights
from perrin.parameterization import ModelMeanType
from perrin.reverse import Model, ModelKwargs, ReverseProcess
from perrin.tensors import Coefficient, at_least_float32, in_dtype_of, mean_flat, mix
from perrin.terms import BoundCurve, BoundTerms, TrainingTerms
from perrin.variance import ModelVarType


class GaussianDiffusion(ReverseProcess):
    """A Gaussian diffusion process of T steps and how a network reverses it.

    ``betas`` (T,) in (0, 1]; ``levels`` is the number of levels per dimension of the data, evenly spaced over
    [-1, 1], which the last step decodes into, or None for continuous data and a Gaussian density. Every table
    is a float64 attribute (T,) under its usual name: ``alphas_cumprod``, ``posterior_variance``, ...

    Raises `ArgumentError` for betas out of range, or for EPSILON on a chain that ends without signal.
    """

    def __init__(
        self,
        *,
        betas: object,
        model_mean_type: ModelMeanType = ModelMeanType.EPSILON,
        model_var_type: ModelVarType = ModelVarType.FIXED_SMALL,
        loss_type: LossType = LossType.MSE,
        rescale_timesteps: bool = False,
        levels: int | None = 256,
    ) -> None:
        super().__init__(
            betas,
            model_mean_type=model_mean_type,
            model_var_type=model_var_type,
            rescale_timesteps=rescale_timesteps,
        )
        if levels is not None and levels < 2:
            raise ArgumentError(f"levels must be at least 2, or None for continuous data, got {levels}")
        self.loss_type = loss_type
        self.levels = levels

    def vb_terms_bpd(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Step,
        clip_denoised: bool = True,
        model_kwargs: ModelKwargs = None,
    ) -> BoundTerms:
        """One term of the bound, (B,) bits per dimension, at the drawn x_t.

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), or at t = 0 the decoder's -log p(x_0 | x_1)
        (IDDPM eq. 4-6).
        """
        return self._bound_terms(self.output(model, x_t, t, model_kwargs), x_start, x_t, t, clip_denoised)

    def _bound_terms(
        self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Step, clip_denoised: bool
    ) -> BoundTerms:
        denoised = self.read(output, x_t, t, clip_denoised=clip_denoised)
        mean, log_variance = self.reverse(denoised, x_t, t)
        nats = self._term_nats(x_start, x_t, t, mean, in_dtype_of(log_variance, mean))
        return {"output": bits(nats), "pred_xstart": denoised.x_start}

    def _term_nats(
        self, x_start: Tensor, x_t: Tensor, t: Step, mean: Tensor, log_variance: Coefficient
    ) -> Tensor:
        if not isinstance(t, Tensor):
            term = self._decoder_nats if t == 0 else self._kl_nats
            return term(x_start, x_t, t, mean, log_variance)
        kl, first = self._kl_nats(x_start, x_t, t, mean, log_variance), t == 0
        if t.device.type != "cpu":
            return torch.where(first, self._decoder_nats(x_start, x_t, t, mean, log_variance), kl)
        # Looking is free on a CPU, and the decoder costs more than all the rest: decode only where it counts.
        rows = first.nonzero().flatten()
        log_variance = log_variance[rows] if isinstance(log_variance, Tensor) else log_variance
        return kl.index_copy(
            0, rows, self._decoder_nats(x_start[rows], x_t[rows], t[rows], mean[rows], log_variance)
        )

    def _kl_nats(
        self, x_start: Tensor, x_t: Tensor, t: Step, mean: Tensor, log_variance: Coefficient
    ) -> Tensor:
        true_log_variance = in_dtype_of(self.at("posterior_log_variance_clipped", t, x_t), mean)
        true_mean = self.posterior_mean(x_start, x_t, t)
        return mean_flat(normal_kl(true_mean, true_log_variance, mean, log_variance))

    def _decoder_nats(
        self, x_start: Tensor, x_t: Tensor, t: Step, mean: Tensor, log_variance: Coefficient
    ) -> Tensor:
        log_scales = torch.as_tensor(0.5 * log_variance, dtype=mean.dtype, device=mean.device)
        return -mean_flat(
            gaussian_log_likelihood(x_start, means=mean, log_scales=log_scales, levels=self.levels)
        )

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Step,
        model_kwargs: ModelKwargs = None,
        noise: Tensor | None = None,
    ) -> TrainingTerms:
        """The loss (B,) at timesteps ``t`` and, where they apply, its parts ``mse`` and ``vb``.

        ``x_start`` (B, C, ...) in [-1, 1]. The MSE losses add the bound for a learned variance, of an output
        whose mean half is detached, so that the bound trains the variance alone (IDDPM section 3.1); ``vb`` is
        in bits per dimension times its weight. The KL losses are the bound itself. Computed in float32 at least.
        """
        x_start = at_least_float32(x_start)
        noise = noise_like(x_start, noise)
        if isinstance(t, Tensor):
            self.check_times(t, x_start)
        x_t = self.q_sample(x_start, t, noise)
        output = self.output(model, x_t, t, model_kwargs)
        weights = loss_weights(self.loss_type, self.num_timesteps)
        if weights.mse == 0:
            return {"loss": weights.vb * self._bound_terms(output, x_start, x_t, t, False)["output"]}
        mean, extra = self._halves(output, x_t)
        target = mix(self.at("target_xstart", t, x_t), x_start, self.at("target_eps", t, x_t), noise)
        mse = weights.mse * mean_flat((target - mean) ** 2)
        if extra is None:
            return {"loss": mse, "mse": mse}
        frozen = torch.cat([mean.detach(), extra], 1)
        vb = weights.vb * self._bound_terms(frozen, x_start, x_t, t, False)["output"]
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    @torch.no_grad()
    def calc_bpd_loop(
        self,
        model: Model,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: ModelKwargs = None,
        *,
        noise_fn: Callable[[Tensor, int], Tensor] | None = None,
    ) -> BoundCurve:
        """The whole bound on -log2 p(x_0), with all T terms, each at one draw of x_t.

        ``noise_fn(x_start, t)`` gives the noise at each t, from T - 1 down to 0; without it the noise is drawn
        from torch's default generator. Clipping leaves the bound a bound and usually lowers it.
        """
        x_start = at_least_float32(x_start)
        columns: list[tuple[Tensor, Tensor, Tensor]] = []
        for t in reversed(range(self.num_timesteps)):
            noise = noise_like(x_start, noise_fn(x_start, t) if noise_fn else None)
            x_t = self.q_sample(x_start, t, noise)
            terms = self.vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            eps = self.predict_eps_from_xstart(x_t, t, terms["pred_xstart"])
            xstart_mse = mean_flat((terms["pred_xstart"] - x_start) ** 2)
            columns.append((terms["output"], xstart_mse, mean_flat((eps - noise) ** 2)))
        vb, xstart_mse, mse = (torch.stack(column, 1) for column in zip(*columns, strict=True))
        prior = self.prior_bpd(x_start)
        return {
            "total_bpd": vb.sum(1) + prior,
            "prior_bpd": prior,
            "vb": vb,
            "xstart_mse": xstart_mse,
            "mse": mse,
        }
