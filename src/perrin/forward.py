"""The forward process: Gaussian noising, its posteriors, and what follows from x_t = alpha x_0 + sigma eps.

The formulas are those of DDPM (arXiv:2006.11239); t is 0-based, the paper's t is ours + 1. Every method takes t
as a (B,) integer tensor, or as one int for the whole batch, which costs no lookup on the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from perrin.errors import ArgumentError, ShapeError
from perrin.gaussian import normal_kl
from perrin.noise import CLEAN, Level, level_between, time_between
from perrin.schedules import tables
from perrin.tensors import Coefficient, Remembered, Tables, at_least_float32, mean_flat, mix, scale

Step = int | Tensor


class ForwardProcess(Tables):
    """A chain of T noising steps; every table is a float64 attribute (T,) under its usual name.

    ``betas`` (T,) in (0, 1), the last one at most 1; raises `ArgumentError` otherwise.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor

    def __init__(self, betas: object) -> None:
        super().__init__(tables(betas))
        self.num_timesteps = len(self.betas)

    def add_tables(self, tables: dict[str, Tensor]) -> None:
        """Hold ``tables`` too, in the place of those that have the same name."""
        super().add_tables(tables)
        self._levels = Remembered(self._level)

    def q_mean_variance(self, x_start: Tensor, t: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0), each shaped like ``x_start`` (DDPM eq. 4)."""
        sigma = self.at("sqrt_one_minus_alphas_cumprod", t, x_start)
        log_variance = self.at("log_one_minus_alphas_cumprod", t, x_start)
        mean = scale(self.at("sqrt_alphas_cumprod", t, x_start), x_start)
        return mean, filled(sigma**2, mean), filled(log_variance, mean)

    def q_sample(self, x_start: Tensor, t: Step, noise: Tensor | None = None) -> Tensor:
        """A draw of x_t from q(x_t | x_0), shaped like ``x_start``; ``noise`` is standard normal (DDPM eq. 4)."""
        noise = noise_like(x_start, noise)
        alpha, sigma = self.level(t, x_start)
        return mix(alpha, x_start, sigma, noise)

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Step
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0), shaped like x (DDPM eq. 6, 7)."""
        variance = self.at("posterior_variance", t, x_t)
        log_variance = self.at("posterior_log_variance_clipped", t, x_t)
        mean = self.posterior_mean(x_start, x_t, t)
        return mean, filled(variance, mean), filled(log_variance, mean)

    def level(self, t: Step | float, like: Tensor) -> tuple[Coefficient, Coefficient]:
        """(alpha, sigma) of x_t = alpha x_0 + sigma eps; a fractional t lies between in log-SNR."""
        if not isinstance(t, Tensor):
            return self.level_of_batch(t)
        return self.at("sqrt_alphas_cumprod", t, like), self.at("sqrt_one_minus_alphas_cumprod", t, like)

    def level_of_batch(self, t: float) -> Level:
        """`level` at one number for the whole batch: from 0 to T - 1, or CLEAN. Raises `ArgumentError` otherwise."""
        return self._levels[t]

    def _level(self, t: float) -> Level:
        if t == CLEAN:
            return Level(1.0, 0.0)
        self.check_time(t)
        before = int(t)
        if before == t:
            columns = "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"
            return Level(*(self.floats[column][before] for column in columns))
        return level_between(self.level_of_batch(before), self.level_of_batch(before + 1), t - before)

    def log_snr(self, t: int) -> float:
        """log(alpha^2 / sigma^2) at the timestep ``t``, in nats; -inf where there is no signal."""
        return self.number("log_alphas_cumprod", t) - self.floats["log_one_minus_alphas_cumprod"][t]

    def time_of(self, log_snr: float) -> float:
        """The time, whole or fractional, of the level with this log-SNR: the inverse of `level_of_batch`.

        Raises `ArgumentError` for a log-SNR that is not between those of the last timestep and of the first.
        """
        last = self.num_timesteps - 1
        if not self.log_snr(last) <= log_snr <= self.log_snr(0):
            expected = f"from {self.log_snr(last):g} to {self.log_snr(0):g}"
            raise ArgumentError(f"log_snr must be {expected}, got {log_snr:g}")
        return time_between(self.log_snr, self.num_timesteps, log_snr)

    def check_time(self, t: float) -> None:
        """Raise `ArgumentError` unless 0 <= ``t`` <= T - 1."""
        if not 0 <= t <= self.num_timesteps - 1:
            raise ArgumentError(f"t must be from 0 to {self.num_timesteps - 1}, got {t}")

    def check_times(self, t: Tensor, x: Tensor) -> None:
        """Raise `ShapeError` or `ArgumentError` unless ``t`` is (B,) integers, in 0..T - 1 where looking is free."""
        if t.shape != x.shape[:1] or t.is_floating_point():
            raise ShapeError(f"t must be {len(x)} integers, one per example, got {t.dtype} {tuple(t.shape)}")
        if t.device.type == "cpu" and len(t):  # where looking is free
            low, high = (int(end) for end in t.aminmax())
            if low < 0 or high >= self.num_timesteps:
                raise ArgumentError(f"t must be from 0 to {self.num_timesteps - 1}, got {low} to {high}")

    def posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Step) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
        coef1, coef2 = self.at("posterior_mean_coef1", t, x_t), self.at("posterior_mean_coef2", t, x_t)
        return mix(coef1, x_start, coef2, x_t)

    def predict_xstart_from_eps(self, x_t: Tensor, t: Step | float, eps: Tensor) -> Tensor:
        """x_0 from x_t = alpha x_0 + sigma eps."""
        alpha, sigma = self.level(t, x_t)
        return mix(1 / alpha, x_t, -sigma / alpha, eps)

    def predict_eps_from_xstart(self, x_t: Tensor, t: Step | float, pred_xstart: Tensor) -> Tensor:
        """eps from x_t = alpha x_0 + sigma eps."""
        alpha, sigma = self.level(t, x_t)
        return mix(1 / sigma, x_t, -alpha / sigma, pred_xstart)

    def predict_xstart_from_xprev(self, x_t: Tensor, t: Step, xprev: Tensor) -> Tensor:
        """x_0 whose posterior mean of x_{t-1} is ``xprev`` (DDPM eq. 7)."""
        coef1, coef2 = self.at("posterior_mean_coef1", t, x_t), self.at("posterior_mean_coef2", t, x_t)
        return mix(1 / coef1, xprev, -coef2 / coef1, x_t)

    def prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, I)) (B,) in bits per dimension: the bound's term that no network enters."""
        mean, _, _ = self.q_mean_variance(at_least_float32(x_start), self.num_timesteps - 1)
        log_variance = self.floats["log_one_minus_alphas_cumprod"][-1]
        return bits(mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)))


def bits(nats: Tensor) -> Tensor:
    """Nats as bits."""
    return nats / math.log(2)


def noise_like(x: Tensor, noise: Tensor | None) -> Tensor:
    """``noise`` in the dtype of ``x``, or a standard normal draw shaped like ``x``."""
    return torch.randn_like(x) if noise is None else with_shape(noise, x).to(x.dtype)


def with_shape(noise: Tensor, x: Tensor) -> Tensor:
    """``noise``, which must be shaped like ``x``; raises `ShapeError` if it is not."""
    if noise.shape != x.shape:
        raise ShapeError(f"noise must have the shape of x, {tuple(x.shape)}, got {tuple(noise.shape)}")
    return noise


def filled(value: Coefficient, like: Tensor) -> Tensor:
    """``value`` in the shape and dtype of ``like``."""
    if isinstance(value, Tensor):
        return value.to(like.dtype).expand(like.shape)
    return torch.full_like(like, value)
