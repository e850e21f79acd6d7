"""The engine: how a network reverses the forward process, its losses, and the variational bound.

The formulas are those of DDPM (arXiv:2006.11239) and Improved DDPM (arXiv:2102.09672); t is 0-based, the
papers' t is ours + 1. A network is any callable ``model(x, t, **model_kwargs)``; calling it and reading its
output are apart, so that the bound can be taken of an output whose mean half is detached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from perrin.errors import ArgumentError, ShapeError
from perrin.forward import ForwardProcess, Step, bits, filled, noise_like
from perrin.gaussian import gaussian_log_likelihood, normal_kl
from perrin.losses import LossType, loss_weights
from perrin.parameterization import Denoised, ModelMeanType, output_pair, reading
from perrin.schedules import respaced_tables
from perrin.tensors import Coefficient, at_least_float32, in_dtype_of, mean_flat, mix
from perrin.terms import BoundCurve, BoundTerms, PMeanVariance, TrainingTerms
from perrin.variance import VARIANCES, ModelVarType

Model = Callable[..., Tensor]
CondFn = Callable[..., Tensor]
ModelKwargs = Mapping[str, Any] | None


class GaussianDiffusion(ForwardProcess):
    """A Gaussian diffusion process of T steps and how a network reverses it.

    ``betas`` (T,) in (0, 1]; ``levels`` is the number of levels per dimension of the data, evenly spaced over
    [-1, 1], which the last step decodes into, or None for continuous data and a Gaussian density. Every table
    is a float64 attribute (T,) under its usual name: ``alphas_cumprod``, ``posterior_variance``, ...

    Raises `ArgumentError` for betas out of range, or for EPSILON on a chain that ends without signal.
    """

    timestep_map: Tensor

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
        super().__init__(betas)
        if levels is not None and levels < 2:
            raise ArgumentError(f"levels must be at least 2, or None for continuous data, got {levels}")
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        self.levels = levels
        self.original_num_timesteps = self.num_timesteps
        self._variance = VARIANCES[model_var_type]
        self._add_reading(*self._output_pair(), torch.arange(self.num_timesteps))

    def _output_pair(self) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        # The posterior mean (DDPM eq. 7) coef1 x_0 + coef2 (alpha x_0 + sigma eps).
        previous = (
            self.get_buffer("alphas_cumprod_prev").sqrt(),
            self.get_buffer("posterior_mean_coef2") * sigma,
        )
        a, b = output_pair(self.model_mean_type, alpha, sigma, previous)
        return torch.as_tensor(a), torch.as_tensor(b)

    def _add_reading(self, a: Tensor, b: Tensor, timestep_map: Tensor) -> None:
        read = reading(a, b, self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod)
        columns = {name: torch.as_tensor(column) for name, column in read._asdict().items()}
        if not all(column.isfinite().all() for column in columns.values()):
            raise ArgumentError(
                f"{self.model_mean_type.name} does not determine x_0 where x_t holds no signal (the last beta is "
                "1, zero terminal SNR): use VELOCITY, START_X or PREVIOUS_X"
            )
        self.add_tables({"target_xstart": a, "target_eps": b, "timestep_map": timestep_map} | columns)

    def respaced(self, keep: Iterable[int]) -> GaussianDiffusion:
        """The chain that visits only the timesteps ``keep``, with the same marginals there.

        The network stays the one of this chain: it sees this chain's timesteps, and a PREVIOUS_X output is read
        as the mean of this chain's previous step. A LEARNED log-variance is taken as it is, which suits only the
        chain it was trained on; LEARNED_RANGE adapts. Raises `ArgumentError` for timesteps out of range.
        """
        kept = sorted({int(t) for t in keep})
        if not kept or kept[0] < 0 or kept[-1] >= self.num_timesteps:
            raise ArgumentError(f"keep must hold timesteps from 0 to {self.num_timesteps - 1}, got {kept}")
        chain = self.shallow_copy()
        chain.num_timesteps = len(kept)
        chain.add_tables(respaced_tables(self.floats["log_alphas_cumprod"], kept))
        names = "target_xstart", "target_eps", "timestep_map"
        chain._add_reading(*(torch.tensor(self.floats[name], dtype=torch.float64)[kept] for name in names))
        return chain.to(self.betas.device)

    def output_channels(self, channels: int) -> int:
        """How many channels the network must give for ``channels`` data channels: as many, or twice that."""
        return channels * (1 + self._variance.extra_channels)

    def network_time(self, t: Step | float, x: Tensor) -> Tensor:
        """What the network is told of step t for ``x`` (B, ...): (B,) on its device.

        The training timestep as int64; in float32 where t is fractional, or rescaled to 0..1000 (IDDPM).
        """
        scale = 1000 / self.original_num_timesteps if self.rescale_timesteps else 1
        if isinstance(t, Tensor):
            self.check_times(t, x)
            times = self.table("timestep_map", t.device)[t]
            return times.float() * scale if self.rescale_timesteps else times.long()
        steps, before = self.floats["timestep_map"], int(t)
        time, fractional = self.number("timestep_map", before), before != t
        if fractional:
            time += (t - before) * (steps[before + 1] - time)
        dtype = torch.float32 if fractional or self.rescale_timesteps else torch.int64
        return torch.full((len(x),), time * scale, dtype=dtype, device=x.device)

    def output(self, model: Model, x: Tensor, t: Step | float, model_kwargs: ModelKwargs = None) -> Tensor:
        """The network's output at x_t, at least in the precision of ``x``.

        Raises `ShapeError` when it has not the channels that the variance type needs.
        """
        output = model(x, self.network_time(t, x), **(model_kwargs or {}))
        if output.shape != x.shape or self._variance.extra_channels:
            self._check_channels(output, x)
        return output if output.dtype == x.dtype else output.to(torch.promote_types(output.dtype, x.dtype))

    def _check_channels(self, output: Tensor, x: Tensor) -> None:
        batch_size, channels, *sizes = x.shape
        expected = (batch_size, self.output_channels(channels), *sizes)
        if output.shape != expected:
            raise ShapeError(
                f"{self.model_var_type.name} needs {expected[1]} output channels for input {tuple(x.shape)}, "
                f"got {tuple(output.shape)}"
            )

    def read(
        self,
        output: Tensor,
        x: Tensor,
        t: Step | float,
        *,
        clip_denoised: bool = False,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> Denoised:
        """What ``output`` says of x_t; x_start through ``denoised_fn``, then clipped to [-1, 1], eps to match."""
        mean, extra = self._halves(output, x)
        previous = mean if self.model_mean_type is ModelMeanType.PREVIOUS_X else None
        x_start = mix(*self._rule("xstart", t, x, mean))
        if clip_denoised and denoised_fn is None:  # in place, since nobody else holds x_start yet
            x_start.clamp_(-1, 1)
            return Denoised(x_start, lambda: self.predict_eps_from_xstart(x, t, x_start), extra, previous)
        raw = Denoised(x_start, lambda: mix(*self._rule("eps", t, x, mean)), extra, previous)
        return self.processed(raw, x, t, clip_denoised, denoised_fn)

    def _rule(
        self, name: Literal["xstart", "eps"], t: Step | float, x: Tensor, mean: Tensor
    ) -> tuple[Coefficient, Tensor, Coefficient, Tensor]:
        """The two terms whose sum is x_start or eps."""
        if not isinstance(t, float):
            return self.at(name + "_out", t, x), mean, self.at(name + "_x", t, x), x
        if self.model_mean_type is ModelMeanType.PREVIOUS_X:
            raise ArgumentError(f"a PREVIOUS_X network knows whole timesteps only, got t = {t}")
        alpha, sigma = self.level(t, x)
        pair = output_pair(self.model_mean_type, alpha, sigma, (0.0, 0.0))
        rule = reading(*pair, alpha, sigma)._asdict()
        return rule[name + "_out"], mean, rule[name + "_x"], x

    def _halves(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._variance.extra_channels == 0:
            return output, None
        mean, extra = output.chunk(2, dim=1)
        return mean, extra

    def reverse(self, denoised: Denoised, x: Tensor, t: Step) -> tuple[Tensor, Coefficient]:
        """Mean and log-variance of p(x_{t-1} | x_t), the latter broadcasting against the mean."""
        log_variance = self._variance.log_variance(denoised.extra, lambda name: self.at(name, t, x))
        whole = self.num_timesteps == self.original_num_timesteps
        if denoised.previous is not None and whole:
            mean = denoised.previous
        else:
            mean = self.posterior_mean(denoised.x_start, x, t)
        if denoised.gradient is not None:  # ADM algorithm 1
            mean = mix(1.0, mean, self._variance_at(log_variance, x, t), denoised.gradient)
        return mean, log_variance

    def _variance_at(self, log_variance: Coefficient, x: Tensor, t: Step) -> Coefficient:
        return self._variance.variance(log_variance, lambda name: self.at(name, t, x))

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Step,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: ModelKwargs = None,
    ) -> PMeanVariance:
        """p(x_{t-1} | x_t) and the prediction of x_0, each shaped like ``x``.

        The prediction of x_0 goes through ``denoised_fn`` and is then clipped to [-1, 1]; a PREVIOUS_X network's
        own mean is kept as it is.
        """
        output = self.output(model, x, t, model_kwargs)
        denoised = self.read(output, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn)
        mean, log_variance = self.reverse(denoised, x, t)
        return {
            "mean": mean,
            "variance": filled(self._variance_at(log_variance, x, t), mean),
            "log_variance": filled(log_variance, mean),
            "pred_xstart": denoised.x_start,
        }

    def processed(
        self,
        denoised: Denoised,
        x: Tensor,
        t: Step | float,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> Denoised:
        """``denoised`` with x_start through ``denoised_fn``, then clipped to [-1, 1], and eps to match."""
        if not clip_denoised and denoised_fn is None:
            return denoised
        x_start = denoised.x_start if denoised_fn is None else denoised_fn(denoised.x_start)
        x_start = x_start.clamp(-1, 1) if clip_denoised else x_start
        return replace(
            denoised, x_start=x_start, make_eps=lambda: self.predict_eps_from_xstart(x, t, x_start)
        )

    def condition_mean(
        self,
        cond_fn: CondFn,
        p_mean_var: PMeanVariance,
        x: Tensor,
        t: Step,
        model_kwargs: ModelKwargs = None,
    ) -> Tensor:
        """The mean moved by the variance times ``cond_fn(x, t)``, a gradient of log p(y | x_t) (ADM alg. 1)."""
        return p_mean_var["mean"] + p_mean_var["variance"] * self.classifier_gradient(
            cond_fn, x, t, model_kwargs
        )

    def condition_score(
        self,
        cond_fn: CondFn,
        p_mean_var: PMeanVariance,
        x: Tensor,
        t: Step,
        model_kwargs: ModelKwargs = None,
    ) -> PMeanVariance:
        """``p_mean_var`` of the score moved by ``cond_fn(x, t)``: x_0 and the mean to match (ADM alg. 2)."""
        score = self.classifier_gradient(cond_fn, x, t, model_kwargs)
        x_start = mix(1.0, p_mean_var["pred_xstart"], self.pull(t, x), score)
        return {**p_mean_var, "pred_xstart": x_start, "mean": self.posterior_mean(x_start, x, t)}

    def classifier_gradient(
        self, cond_fn: CondFn, x: Tensor, t: Step | float, model_kwargs: ModelKwargs = None
    ) -> Tensor:
        """``cond_fn`` at x_t and the time that the network sees."""
        return cond_fn(x, self.network_time(t, x), **(model_kwargs or {}))

    def pull(self, t: Step | float, like: Tensor) -> Coefficient:
        """By how much a score moves x_0, sigma^2 / alpha: so eps moves by -sigma (ADM alg. 2).

        0 where x_t holds no signal, and so says nothing about y either.
        """
        alpha, sigma = self.level(t, like)
        if isinstance(alpha, Tensor):
            return torch.where(alpha > 0, sigma**2 / alpha, 0.0)
        return sigma**2 / alpha if alpha > 0 else 0.0

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
