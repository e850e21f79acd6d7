"""Data with levels: the network says which levels it expects, and Bayes' rule what x_t adds to that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from perrin.errors import ArgumentError
from perrin.tensors import Tables, append_dims, widest_dtype

MAX_LEVELS = 1024
"""A value has a weight for each level, in memory and in time."""

LEVEL_INPUTS = 3
"""Channels that the body sees of each data channel: x_t, and mean and deviation of x_0 by the levels' bias alone."""

BIAS_GAIN = 10.0
"""The log-probabilities of the levels learn so many times faster than other weights: they have far to go."""

COEFFICIENT_GAIN = 0.3
"""The network's output counts so much, which lets its last layer learn no faster than the others."""

DECODER_SHARE = 1 / 8
"""Least deviation at the first timestep in distances of two levels: 1e-4 bits where the level is known, and no
more than some 15 where it is one off."""

ROWS = 1024
"""Values whose levels are weighed at a time: few enough for a processor's cache, which saves a fourth of a step."""

LEAST_LOG_SNR = -80.0
"""Taken for that of a timestep without signal."""

LEAST = 1e-12
"""Below all variances that differ from 0 in float32."""


class Moments(NamedTuple):
    """Mean and variance (B, C, ...) of x_0."""

    mean: Tensor
    variance: Tensor


class LevelPosterior(nn.Module):
    """The network (x, t, y) → E[x_0 | x_t], or with its variance beside it, from a network of prior beliefs.

    For each value, ``body`` gives ``basis`` coefficients of learned functions over the levels; their sum and a
    learned bias are the logarithm of a prior over the levels, which depends on all of x_t. x_t is Gaussian about
    alpha times the level, so the posterior's moments are sums over the levels: exact where the noise is low, which
    is where most of the bits are. It is the mean of START_X; the second half of the output places the variance
    ``posterior_variance + posterior_mean_coef1^2 Var[x_0 | x_t]`` (arXiv:2206.07309) as LEARNED_RANGE reads it.

    body: takes `LEVEL_INPUTS` channels and gives ``basis`` for each data channel, computed under autocast where
        that is on; the posterior itself never is.
    levels: number of levels, evenly spaced over [-1, 1], at most `MAX_LEVELS`.
    basis: number of functions over the levels.
    tables: the chain's (T,), under their usual names; see `CHAIN_TABLES`.
    time_scale: the time that the network is told of timestep 1.
    learn_sigma: whether there is a variance part.
    """

    def __init__(
        self,
        body: nn.Module,
        *,
        levels: int,
        basis: int,
        tables: Mapping[str, Tensor],
        time_scale: float = 1.0,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__()
        if not 2 <= levels <= MAX_LEVELS:
            raise ArgumentError(
                f"levels must be from 2 to {MAX_LEVELS} for a posterior of levels, got {levels}: "
                "level_basis = 0 does without"
            )
        if basis < 1:
            raise ArgumentError(f"basis must be at least 1, got {basis}")
        self.body, self.basis, self.time_scale, self.learn_sigma = body, basis, time_scale, learn_sigma
        self.chain = Tables(_chain_tables(tables, 2 * DECODER_SHARE / (levels - 1)))
        self.values = Tables({"levels": torch.linspace(-1, 1, levels, dtype=torch.float64)})
        self.functions = nn.Parameter(level_functions(levels, basis))
        self.bias = nn.Parameter(torch.zeros(levels))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """(B, C or 2C, ...) for ``x`` (B, C, ...), times ``t`` (B,), whole or not, and classes ``y`` (B,).

        In the precision of ``x``, at least float32. Raises as the body does.
        """
        _require_full_precision(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            signal = self._signal(x.to(dtype), t)
            known = self._moments(signal, self.bias.detach(), None)
            deviation = (known.variance + LEAST).sqrt()  # the root of 0 has no derivative
            seen = torch.cat([x.to(dtype), known.mean, deviation], dim=1)  # (B, 3C, ...)
        coefficients = self.body(seen, t, y)  # (B, C basis, ...)
        with torch.autocast(x.device.type, enabled=False):
            posterior = self._moments(signal, self.bias, coefficients.to(dtype))
            if not self.learn_sigma:
                return posterior.mean.to(x.dtype)
            return torch.cat([posterior.mean, self._place(posterior.variance, t)], dim=1).to(x.dtype)

    def _signal(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, C, ..., 2): what x_t adds to the log-probability of the level l, as coefficients of l and l^2."""
        time = t.to(widest_dtype(t.device)) / self.time_scale
        before = time.floor().long()
        table = self.chain.table("log_snr", x.device)
        after = (before + 1).clamp(max=len(table) - 1)
        snr = torch.lerp(table[before], table[after], (time - before).to(table.dtype)).exp()  # (B,)
        root = (snr * (1 + snr)).sqrt()  # alpha / sigma^2
        linear = append_dims(root, x.ndim).to(x.dtype) * x
        return torch.stack([linear, append_dims(-snr / 2, x.ndim).to(x.dtype).expand_as(x)], dim=-1)

    def _moments(self, signal: Tensor, bias: Tensor, coefficients: Tensor | None) -> Moments:
        levels = self.values.table("levels", signal.device).to(signal.dtype)
        powers = torch.stack([levels, levels**2])  # (2, L)
        weights, functions = signal, powers
        if coefficients is not None:
            rows = (len(coefficients), -1, self.basis, *coefficients.shape[2:])
            split = coefficients.reshape(rows).movedim(2, -1)  # (B, C, ..., basis)
            weights = torch.cat([signal, COEFFICIENT_GAIN * split], dim=-1)
            functions = torch.cat([powers, self.functions.to(signal.dtype)])
        bias = BIAS_GAIN * bias.to(signal.dtype)
        flat = weights.flatten(0, -2)  # (N, ...)
        moments = [
            torch.addmm(bias, part, functions).softmax(1) @ powers.T  # (ROWS, L), then (ROWS, 2)
            for part in flat.chunk(len(flat) // ROWS + 1)
        ]
        mean, square = torch.cat(moments).reshape(signal.shape).unbind(-1)
        return Moments(mean, (square - mean**2).clamp(min=0))

    def _place(self, variance: Tensor, t: Tensor) -> Tensor:
        """The output that LEARNED_RANGE reads as the best log-variance for ``variance`` (B, C, ...) of x_0."""
        step = (t / self.time_scale).round().long()
        low, gain, centre, reach = (
            append_dims(self.chain.table(name, variance.device)[step], variance.ndim).to(variance.dtype)
            for name in ("low", "gain", "centre", "reach")
        )
        return ((low + gain * variance).log() - centre) / reach


def _require_full_precision(x: Tensor) -> None:
    """Products of the levels' squares lose the level itself in TF32."""
    precision = torch.get_float32_matmul_precision()
    if x.device.type == "cuda" and precision != "highest":
        raise ArgumentError(
            f"a posterior of levels needs torch.set_float32_matmul_precision('highest') on CUDA, got {precision!r}"
        )


CHAIN_TABLES = (
    "log_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "posterior_variance",
    "posterior_mean_coef1",
    "posterior_log_variance_clipped",
    "log_betas",
)
"""What a `LevelPosterior` needs to know of its chain."""


def _chain_tables(tables: Mapping[str, Tensor], least: float) -> dict[str, Tensor]:
    log_signal, log_noise, low, coef, small, large = (tables[name] for name in CHAIN_TABLES)
    low = torch.cat([low[:1] + least**2, low[1:]])
    reach = (large - small) / 2  # in float64: in float32 the two may be equal
    return {
        "log_snr": (log_signal - log_noise).clamp(min=LEAST_LOG_SNR),
        "low": low,
        "gain": coef**2,
        "centre": (large + small) / 2,
        "reach": torch.where(reach > 0, reach, 1.0),  # of a chain of one step the range is a point
    }


def level_functions(levels: int, basis: int) -> Tensor:
    """(basis, levels) float32: cosines of rising frequency, and where there are more than 2, one for either end.

    Many data have values at black and white that no smooth function tells from their neighbours.
    """
    ends = 2 if basis > 2 else 0
    place = (torch.arange(levels) + 0.5) / levels
    cosines = torch.cos(torch.pi * torch.arange(1, basis - ends + 1)[:, None] * place)
    spikes = torch.eye(levels)[[0, -1]]
    return torch.cat([cosines, spikes[:ends]])
