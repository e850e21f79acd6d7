"""The reverse process: how a network's output is read at x_t, and the kernel p(x_{t-1} | x_t) that it makes.

The formulas are those of DDPM (arXiv:2006.11239) and Improved DDPM (arXiv:2102.09672); t is 0-based, the
papers' t is ours + 1. A network is any callable ``model(x, t, **model_kwargs)``; calling it and reading its
output are apart, so that the bound can be taken of an output whose mean half is detached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from perrin.errors import ArgumentError, ShapeError
from perrin.forward import ForwardProcess, Step, filled
from perrin.noise import time_between
from perrin.parameterization import Denoised, ModelMeanType, Reading, output_pair, reading
from perrin.schedules import respaced_tables
from perrin.tensors import Coefficient, Remembered, at_least_float32, mix
from perrin.terms import PMeanVariance
from perrin.variance import VARIANCES, ModelVarType, Variance

Model = Callable[..., Tensor]
CondFn = Callable[..., Tensor]
ModelKwargs = Mapping[str, Any] | None
TRAINED = (
    "target_xstart",
    "target_eps",
    "timestep_map",
    "trained_posterior_variance",
    "trained_posterior_mean_coef1",
)
"""The tables of the steps that a network was trained on, of which a respaced chain keeps some."""


class ReverseProcess(ForwardProcess):
    """A forward process and what a network predicts of its reversal, in every mean and variance type.

    Raises `ArgumentError` for betas out of range, or for EPSILON on a chain that ends without signal.
    """

    timestep_map: Tensor

    def __init__(
        self,
        betas: object,
        *,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        rescale_timesteps: bool,
    ) -> None:
        super().__init__(betas)
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.rescale_timesteps = rescale_timesteps
        self.original_num_timesteps = self.num_timesteps
        self.original_log_snr = [self.log_snr(t) for t in range(self.num_timesteps)]
        self.variance: Variance = VARIANCES[model_var_type]
        a, b = self._output_pair()
        timesteps = torch.arange(self.num_timesteps)
        variance, gain = self.get_buffer("posterior_variance"), self.get_buffer("posterior_mean_coef1")
        self._add_trained(dict(zip(TRAINED, (a, b, timesteps, variance, gain), strict=True)))

    def add_tables(self, tables: dict[str, Tensor]) -> None:
        """Hold ``tables`` too, in the place of those that have the same name."""
        super().add_tables(tables)
        self._readings, self._network_times = Remembered(self._reading), Remembered(self._network_time)

    def _output_pair(self) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        # The posterior mean (DDPM eq. 7) coef1 x_0 + coef2 (alpha x_0 + sigma eps).
        previous = (
            self.get_buffer("alphas_cumprod_prev").sqrt(),
            self.get_buffer("posterior_mean_coef2") * sigma,
        )
        return output_pair(self.model_mean_type, alpha, sigma, previous)

    def _add_trained(self, trained: dict[str, Tensor]) -> None:
        """Hold the tables of the steps that the network was trained on, and how its output is read there."""
        levels = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        columns = reading(trained["target_xstart"], trained["target_eps"], *levels)._asdict()
        if not all(column.isfinite().all() for column in columns.values()):
            raise ArgumentError(
                f"{self.model_mean_type.name} does not determine x_0 where x_t holds no signal (the last beta is "
                "1, zero terminal SNR): use VELOCITY, START_X or PREVIOUS_X"
            )
        self.add_tables(trained | columns)

    def respaced(self, keep: Iterable[int], *, convert_learned: bool = False) -> Self:
        """The chain that visits only the timesteps ``keep``, with the same marginals there.

        The network stays the one of this chain: it sees this chain's timesteps, and a PREVIOUS_X output is read
        as the mean of this chain's previous step. LEARNED_RANGE adapts by its range. A LEARNED log-variance is taken
        as it is, as the reference implementation does, which suits a network that was trained on the shorter chain;
        with ``convert_learned`` it is read as that of this chain's step, and made that of the longer one
        (`JumpVariance`). Raises `ArgumentError` for timesteps out of range, or to leave out steps of a chain with a
        variance of its own (`with_variance`), whose tables would not fit.
        """
        kept = sorted({int(t) for t in keep})
        if not kept or kept[0] < 0 or kept[-1] >= self.num_timesteps:
            raise ArgumentError(f"keep must hold timesteps from 0 to {self.num_timesteps - 1}, got {kept}")
        own = VARIANCES[self.model_var_type]
        if self.variance not in (own, own.of_jumps) and len(kept) < self.num_timesteps:
            raise ArgumentError(
                f"a chain with a variance of its own keeps all of its {self.num_timesteps} steps, got {len(kept)}: "
                "respace first, then give it the variance"
            )
        chain = self.shallow_copy()
        chain.num_timesteps = len(kept)
        chain.add_tables(respaced_tables(self.floats["log_alphas_cumprod"], kept))
        chain._add_trained(
            {name: torch.tensor(self.floats[name], dtype=torch.float64)[kept] for name in TRAINED}
        )
        if convert_learned and len(kept) < self.num_timesteps:
            chain.variance = own.of_jumps
        return chain.to(self.betas.device)

    def with_variance(self, variance: Variance, tables: Mapping[str, Tensor]) -> Self:
        """This chain with another ``variance`` of the reverse step, which looks up ``tables`` (T,) by name.

        The network stays as it is, so ``variance`` must expect the same extra channels. Raises `ArgumentError`
        where it does not, or where a table has another length.
        """
        if variance.extra_channels != self.variance.extra_channels:
            raise ArgumentError(
                f"variance must expect {self.variance.extra_channels} extra channels per data channel, "
                f"got {variance.extra_channels}"
            )
        wrong = {
            name: tuple(table.shape) for name, table in tables.items() if table.shape != self.betas.shape
        }
        if wrong:
            raise ArgumentError(f"tables must have shape {tuple(self.betas.shape)}, got {wrong}")
        chain = self.shallow_copy()
        chain.add_tables(dict(tables))
        chain.variance = variance
        return chain.to(self.betas.device)

    @property
    def knows_fractional_times(self) -> bool:
        """Whether an output can be read between two timesteps; the mean of a step of the chain cannot."""
        return self.model_mean_type is not ModelMeanType.PREVIOUS_X

    def output_channels(self, channels: int) -> int:
        """How many channels the network must give for ``channels`` data channels: as many, or twice that."""
        return channels * (1 + self.variance.extra_channels)

    def network_time(self, t: Step | float, x: Tensor) -> Tensor:
        """What the network is told of step t for ``x`` (B, ...): (B,) on its device.

        The training timestep as int64; in float32 where t is fractional, or rescaled to 0..1000 (IDDPM).
        """
        if isinstance(t, Tensor):
            self.check_times(t, x)
            times = self.table("timestep_map", t.device)[t]
            return times.float() * self._time_scale if self.rescale_timesteps else times.long()
        time, dtype = self._network_times[t]
        return torch.full((x.shape[0],), time, dtype=dtype, device=x.device)

    def _network_time(self, t: float) -> tuple[float, torch.dtype]:
        self.check_time(t)
        dtype = torch.int64 if t == int(t) and not self.rescale_timesteps else torch.float32
        return self._original_time(t) * self._time_scale, dtype

    @property
    def _time_scale(self) -> float:
        return 1000 / self.original_num_timesteps if self.rescale_timesteps else 1

    def _original_time(self, t: float) -> float:
        """The time of the level at ``t`` among the timesteps that the network was trained at."""
        if t == int(t):
            return self.number("timestep_map", int(t))
        if self.num_timesteps == self.original_num_timesteps:
            return t
        values = self.original_log_snr
        log_snr = min(max(self.level_of_batch(t).log_snr, values[-1]), values[0])
        return time_between(values.__getitem__, len(values), log_snr)

    def output(self, model: Model, x: Tensor, t: Step | float, model_kwargs: ModelKwargs = None) -> Tensor:
        """The network's output at x_t, at least in the precision of ``x``.

        Raises `ShapeError` when it has not the channels that the variance type needs.
        """
        output = model(x, self.network_time(t, x), **(model_kwargs or {}))
        if output.shape != x.shape or self.variance.extra_channels:
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
        clipped = clip_denoised and denoised_fn is None
        x_start = self.x_start(output, x, t, clip_denoised=clipped)
        if clipped:
            return Denoised(x_start, lambda: self.predict_eps_from_xstart(x, t, x_start), extra, previous)
        raw = Denoised(x_start, lambda: mix(*self._rule("eps", t, x, mean)), extra, previous)
        return self.processed(raw, x, t, clip_denoised, denoised_fn)

    def x_start(self, output: Tensor, x: Tensor, t: Step | float, *, clip_denoised: bool = False) -> Tensor:
        """The x_start of `read`, a new tensor."""
        mean, _ = self._halves(output, x)
        x_start = mix(*self._rule("xstart", t, x, mean))
        return x_start.clamp_(-1, 1) if clip_denoised else x_start

    def x_start_by_x(
        self, output: Tensor, x: Tensor, t: float, *, clip_denoised: bool = False
    ) -> tuple[Tensor, float]:
        """A new tensor and the number that makes it the x_start of `read`, up to rounding.

        The number is the share of ``x`` in x_start, 1 / alpha for EPSILON: one pass over memory does without it
        what two do with it. It is 1 where ``x`` has no share.
        """
        of_mean, of_x = self._readings[t][:2]
        if of_x == 0:
            return self.x_start(output, x, t, clip_denoised=clip_denoised), 1.0
        mean, _ = self._halves(output, x)
        scaled = torch.add(at_least_float32(x), mean, alpha=of_mean / of_x)
        return scaled.clamp_(-1 / abs(of_x), 1 / abs(of_x)) if clip_denoised else scaled, of_x

    def _rule(
        self, name: Literal["xstart", "eps"], t: Step | float, x: Tensor, mean: Tensor
    ) -> tuple[Coefficient, Tensor, Coefficient, Tensor]:
        """The two terms whose sum is x_start or eps."""
        if isinstance(t, Tensor):
            return self.at(name + "_out", t, x), mean, self.at(name + "_x", t, x), x
        read = self._readings[t]
        of_mean, of_x = read[:2] if name == "xstart" else read[2:]
        return of_mean, mean, of_x, x

    def _reading(self, t: float) -> Reading[float]:
        self.check_time(t)
        if t == int(t):
            return Reading(*(self.number(name, int(t)) for name in Reading._fields))
        if not self.knows_fractional_times:
            raise ArgumentError(f"a PREVIOUS_X network knows whole timesteps only, got t = {t}")
        alpha, sigma = self.level_of_batch(t)
        return reading(*output_pair(self.model_mean_type, alpha, sigma, (0.0, 0.0)), alpha, sigma)

    def _halves(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.variance.extra_channels == 0:
            return output, None
        mean, extra = output.chunk(2, dim=1)
        return mean, extra

    def reverse(self, denoised: Denoised, x: Tensor, t: Step) -> tuple[Tensor, Coefficient]:
        """Mean and log-variance of p(x_{t-1} | x_t), the latter broadcasting against the mean."""
        log_variance = self.variance.log_variance(denoised.extra, lambda name: self.at(name, t, x))
        whole = self.num_timesteps == self.original_num_timesteps
        if denoised.previous is not None and whole:
            mean = denoised.previous
        else:
            mean = self.posterior_mean(denoised.x_start, x, t)
        if denoised.gradient is not None:  # ADM algorithm 1
            mean = mix(1.0, mean, self._variance_at(log_variance, x, t), denoised.gradient)
        return mean, log_variance

    def _variance_at(self, log_variance: Coefficient, x: Tensor, t: Step) -> Coefficient:
        return self.variance.variance(log_variance, lambda name: self.at(name, t, x))

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
