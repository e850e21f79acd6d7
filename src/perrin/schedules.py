"""Noise schedules: betas by name, tables from betas, and which timesteps a shorter chain keeps; all float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perrin.errors import ArgumentError

Betas = NDArray[np.float64]

MAX_BETA = 0.999
"""Where a schedule given by alpha_bar would take all of the signal in one step (IDDPM section 3.2)."""


def linear_betas(num_timesteps: int) -> Betas:
    """DDPM's betas, 1e-4 to 0.02 at T = 1000, scaled by 1000 / T to end in the same noise at any T."""
    return np.minimum(np.linspace(1e-4, 0.02, num_timesteps) * (1000 / num_timesteps), MAX_BETA)


def sqrt_linear_betas(num_timesteps: int) -> Betas:
    """Betas whose square root is linear between the end points of `linear_betas`."""
    return np.minimum(
        np.linspace(1e-4**0.5, 0.02**0.5, num_timesteps) ** 2 * (1000 / num_timesteps), MAX_BETA
    )


def cosine_betas(num_timesteps: int, offset: float = 0.008) -> Betas:
    """The cosine schedule (IDDPM eq. 17); ``offset`` is the paper's s, which sets the first noise level."""
    return betas_from_alpha_bar(
        num_timesteps, lambda u: math.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
    )


def sigmoid_betas(num_timesteps: int, start: float = -3.0, end: float = 3.0) -> Betas:
    """The sigmoid schedule (arXiv:2212.11972, section 3.1): alpha_bar falls as a sigmoid from start to end."""

    def sigmoid(z: float) -> float:
        return 1 / (1 + math.exp(-z))

    low, high = sigmoid(start), sigmoid(end)
    return betas_from_alpha_bar(
        num_timesteps, lambda u: (high - sigmoid(start + u * (end - start))) / (high - low)
    )


def log_snr_linear_betas(num_timesteps: int, log_snr_max: float = 13.3, log_snr_min: float = -5.0) -> Betas:
    """Log-SNR linear in time (VDM, arXiv:2107.00630, appendix D), hitting both end points; the last, if T = 1.

    The defaults suit 8-bit data; a good first level has sigma well below half the distance of two levels.
    """
    if not log_snr_max > log_snr_min:
        raise ArgumentError(f"log_snr_max must exceed log_snr_min, got {log_snr_max} and {log_snr_min}")
    log_snr = np.linspace(log_snr_max, log_snr_min, num_timesteps)
    log_snr[-1] = log_snr_min  # also of a single step, whose x_T must be noise
    # alpha_bar = sigmoid(log_snr); 1 - alpha_bar_t / alpha_bar_{t-1} written so that nothing cancels.
    noise = np.exp(-np.logaddexp(0, log_snr))  # sigma^2, by a sigmoid that does not overflow
    return np.concatenate([noise[:1], -np.expm1(np.diff(log_snr)) * noise[1:]])


def betas_from_alpha_bar(num_timesteps: int, alpha_bar: Callable[[float], float]) -> Betas:
    """Betas whose cumulative product of 1 - beta follows ``alpha_bar`` on [0, 1], capped at `MAX_BETA`."""
    ends = [alpha_bar(i / num_timesteps) for i in range(num_timesteps + 1)]
    return np.array([min(1 - after / before, MAX_BETA) for before, after in pairwise(ends)])


def get_named_beta_schedule(name: str, num_timesteps: int) -> Betas:
    """The betas (T,) of a schedule: linear, cosine, sqrt-linear, sigmoid or log-snr-linear; float64.

    Raises `ArgumentError` for another name or fewer than 1 timestep.
    """
    schedules: dict[str, Callable[[int], Betas]] = {
        "linear": linear_betas,
        "cosine": cosine_betas,
        "sqrt-linear": sqrt_linear_betas,
        "sigmoid": sigmoid_betas,
        "log-snr-linear": log_snr_linear_betas,
    }
    if name not in schedules:
        raise ArgumentError(f"schedule must be one of {', '.join(schedules)}, got {name!r}")
    if num_timesteps < 1:
        raise ArgumentError(f"num_timesteps must be at least 1, got {num_timesteps}")
    return schedules[name](num_timesteps)


def zero_terminal_snr(betas: Betas) -> Betas:
    """``betas`` rescaled so that the last step holds no signal and the first is kept (arXiv:2305.08891, alg. 1).

    The last beta is 1: the noise cannot be inverted into x_0 there, so EPSILON refuses such a chain.
    """
    root = np.sqrt(np.cumprod(1 - betas))
    if len(betas) < 2:
        raise ArgumentError(f"zero terminal SNR needs at least 2 timesteps, got {len(betas)}")
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return np.concatenate([[betas[0]], 1 - alpha_bar[1:] / alpha_bar[:-1]])


def tables(betas: object) -> dict[str, Tensor]:
    """Every coefficient table of the chain with ``betas``, (T,) float64 each, under its usual name.

    Raises `ArgumentError` unless ``betas`` is a non-empty vector in (0, 1], 1 being allowed at the end only.
    """
    beta = checked_betas(betas)
    return tables_from_logs(torch.log1p(-beta)) | {"betas": beta}


def tables_from_logs(log_alphas: Tensor) -> dict[str, Tensor]:
    """Every coefficient table of the chain with betas ``1 - exp(log_alphas)``, (T,) float64 each.

    The logs tell apart what the betas round to 1: a respaced chain takes such long steps.
    """
    beta = -torch.expm1(log_alphas)
    log_ac = log_alphas.cumsum(0)
    ac = log_ac.exp()
    ac_prev = torch.cat([torch.ones_like(ac[:1]), ac[:-1]])
    noise = -torch.expm1(log_ac)  # 1 - ac, which would cancel at small t
    noise_prev = torch.cat([torch.zeros_like(ac[:1]), noise[:-1]])
    variance = beta * noise_prev / noise  # DDPM eq. 7
    # The first posterior variance is 0; its log is taken one step later (from beta if there is no later one).
    clipped = torch.cat([variance[1:2] if len(beta) > 1 else beta[:1], variance[1:]])
    large = torch.cat([clipped[:1], beta[1:]])
    return {
        "betas": beta,
        "log_alphas_cumprod": log_ac,
        "alphas_cumprod": ac,
        "alphas_cumprod_prev": ac_prev,
        "alphas_cumprod_next": torch.cat([ac[1:], torch.zeros_like(ac[:1])]),
        "sqrt_alphas_cumprod": ac.sqrt(),
        "sqrt_one_minus_alphas_cumprod": noise.sqrt(),
        "log_one_minus_alphas_cumprod": noise.log(),
        "sqrt_recip_alphas_cumprod": ac.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (noise / ac).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": clipped.log(),
        "posterior_mean_coef1": beta * ac_prev.sqrt() / noise,
        "posterior_mean_coef2": noise_prev * (log_alphas / 2).exp() / noise,
        "log_betas": beta.log(),
        "fixed_large_variance": large,
        "fixed_large_log_variance": large.log(),
    }


def checked_betas(betas: object) -> Tensor:
    """``betas`` as a float64 vector."""
    values: Any = betas
    beta = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if beta.ndim != 1 or len(beta) == 0:
        raise ArgumentError(f"betas must be a vector of at least one number, got shape {tuple(beta.shape)}")
    inside = (beta > 0) & (beta < 1)
    inside[-1] |= beta[-1] == 1
    if not inside.all():
        worst = int((~inside).nonzero()[0])
        raise ArgumentError(f"betas must lie in (0, 1), got {beta[worst].item()} at index {worst}")
    return beta


def respaced_tables(log_alphas_cumprod: Sequence[float], keep: Sequence[int]) -> dict[str, Tensor]:
    """The tables of the chain that keeps only the timesteps ``keep`` and their marginals (IDDPM section 4)."""
    kept = torch.tensor([0.0] + [log_alphas_cumprod[t] for t in keep], dtype=torch.float64)
    return tables_from_logs(kept.diff())


def space_timesteps(num_timesteps: int, spec: int | str | Iterable[int]) -> set[int]:
    """Which timesteps a shorter chain keeps.

    - an int K, 1 <= K <= T: K evenly rounded timesteps with both ends (K = 1 is the noisiest, T - 1);
    - ``"ddimN"``: an integer stride from 0 that gives exactly N timesteps;
    - ``"10,15,20"`` or a list: that many timesteps in each of as many equal sections, rounded as the reference
      does by accumulating the fractional stride in floating point.

    Raises `ArgumentError` for counts out of range, a section too short, or a stride that does not exist.
    """
    if isinstance(spec, int | np.integer):
        return _even_timesteps(num_timesteps, int(spec))
    if isinstance(spec, str) and spec.startswith("ddim"):
        return _strided_timesteps(num_timesteps, spec)
    try:
        counts = [int(part) for part in (spec.split(",") if isinstance(spec, str) else spec)]
    except ValueError:
        raise ArgumentError(f"spec must be an int, 'ddimN' or comma-separated counts, got {spec!r}") from None
    return _sectioned_timesteps(num_timesteps, counts)


def _even_timesteps(num_timesteps: int, count: int) -> set[int]:
    if not 1 <= count <= num_timesteps:
        raise ArgumentError(f"steps must be between 1 and {num_timesteps}, got {count}")
    if count == 1:
        return {num_timesteps - 1}
    gaps = count - 1
    return {(2 * i * (num_timesteps - 1) + gaps) // (2 * gaps) for i in range(count)}


def _strided_timesteps(num_timesteps: int, spec: str) -> set[int]:
    digits = spec.removeprefix("ddim")
    count = int(digits) if digits.isdecimal() else 0
    for stride in range(1, num_timesteps + 1):
        if count > 0 and len(range(0, num_timesteps, stride)) == count:
            return set(range(0, num_timesteps, stride))
    raise ArgumentError(
        f"no integer stride of {num_timesteps} timesteps gives {spec!r}; an int gives exact counts"
    )


def _sectioned_timesteps(num_timesteps: int, counts: list[int]) -> set[int]:
    if not counts:
        raise ArgumentError("spec must name at least one section, got none")
    size, longer = divmod(num_timesteps, len(counts))
    start, kept = 0, set[int]()
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if not 1 <= count <= length:
            raise ArgumentError(f"section {section} of {length} timesteps cannot be spaced into {count}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.add(start + round(position))
            position += stride  # accumulated, not multiplied: the reference's rounding depends on it
        start += length
    return kept
