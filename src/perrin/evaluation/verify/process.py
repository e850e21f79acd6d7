"""Checks of what has no sampler in it: schedules, noising, posteriors, the decoder, reading, respacing."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from perrin.denoiser import DiffusionDenoiser
from perrin.evaluation.verify.bench import (
    DATA,
    TOTAL,
    Bench,
    Check,
    Finding,
    levels_of,
    variance_between,
    worst,
)
from perrin.gaussian import discretized_gaussian_log_likelihood
from perrin.oracles import Oracle, normal
from perrin.parameterization import ModelMeanType
from perrin.schedules import space_timesteps

# ln p of level k of 256 under N(mean, std^2), from arithmetic of 50 digits.
_DECODED = (
    (128, 0.0, 0.1, -3.46549463114),
    (0, -0.9, 0.05, -3.59976919360),
    (255, 0.5, 0.01, -1235.29254378),
    (10, 0.5, 0.01, -10054.4890739),
    (37, -0.70, 0.001, -20.0189940850),
)
_TIMES = (0, 1, 10, 100, 500, 998, 999)


def final_signal(bench: Bench, *, schedule: str, total: int, known: float) -> Finding:
    """The last alphas_cumprod of a schedule, relative to its ``known`` value."""
    return Finding(float(bench.chain(schedule=schedule, total=total).alphas_cumprod[-1]) / known, 1.0, 5e-7)


def noising(bench: Bench) -> Finding:
    """x_t from x_0 alone and from noise alone, against the product of 1 - beta."""
    chain, levels = bench.chain(), levels_of()
    one, zero = bench.tensor([[1.0]]), bench.tensor([[0.0]])
    found = [
        float(chain.q_sample(x_start, t, noise)) / levels[t][part] - 1
        for t in _TIMES
        for part, (x_start, noise) in enumerate([(one, zero), (zero, one)])
    ]
    return Finding(worst(torch.tensor(found)), 0.0, bench.within(1e-12, 1e-6))


def posterior(bench: Bench, *, part: int) -> Finding:
    """q(x_{t-1} | x_t, x_0), its mean or variance, against Bayes' rule for two Gaussians in x_{t-1}."""
    chain, levels, errors = bench.chain(), levels_of(), []
    x_start, x_t = 0.7, -0.4
    for t in _TIMES[1:]:
        (alpha_s, sigma_s), (alpha, _) = levels[t - 1], levels[t]
        beta, decay = variance_between(levels[t], levels[t - 1])[0], alpha / alpha_s
        precision = decay**2 / beta + 1 / sigma_s**2
        exact = (decay * x_t / beta + alpha_s * x_start / sigma_s**2) / precision, 1 / precision
        found = chain.q_posterior_mean_variance(bench.tensor([[x_start]]), bench.tensor([[x_t]]), t)
        errors.append(float(found[part]) / exact[part] - 1)
    return Finding(worst(torch.tensor(errors)), 0.0, bench.within(1e-9, 1e-6))


def prior(bench: Bench) -> Finding:
    """KL(q(x_T | x_0) || N(0, I)) at E[x_0^2] = 0.5, of linear betas with T = 1000, in bits per dimension."""
    alpha, sigma = levels_of()[TOTAL - 1]
    exact = (-0.5 * alpha**2 / 2 - math.log(sigma)) / math.log(2)
    found = float(bench.chain().prior_bpd(bench.tensor([[math.sqrt(0.5)] * 4])))
    return Finding(found, exact, exact * bench.within(1e-9, 1e-5))


def decoder_sum(bench: Bench, *, levels: int) -> Finding:
    """By how much the probabilities of all levels miss 1, at worst over means and scales."""
    x = bench.tensor(2 * torch.arange(levels, dtype=torch.float64) / (levels - 1) - 1)
    totals = [
        float(decoded(x, bench.tensor([mean]), bench.tensor([math.log(std)]), levels).double().exp().sum())
        for mean in (-1.02, 0.0, 0.3, 1.5)
        for std in (1e-3, 0.03, 0.5)
    ]
    return Finding(worst(torch.tensor(totals, dtype=torch.float64) - 1), 0.0, bench.within(1e-9, 1e-5))


def decoder_values(bench: Bench) -> Finding:
    """The largest relative error of ln p at five points, from the middle of a bin to -10,000 nats."""
    found = decoded(*_decoder_points(bench), 256).cpu().double()
    exact = torch.tensor([value for *_, value in _DECODED], dtype=torch.float64)
    return Finding(worst(found / exact - 1), 0.0, bench.within(1e-9, 2e-5))


def decoder_gradient(bench: Bench) -> Finding:
    """The largest relative error of d ln p / d mean there, against central differences in float64."""
    x, means, log_scales = _decoder_points(bench)
    means.requires_grad_()
    (slope,) = torch.autograd.grad(decoded(x, means, log_scales, 256).sum(), means)
    step = 1e-4 * log_scales.detach().double().exp()
    ahead, behind = (
        decoded(x.double(), means.detach().double() + side * step, log_scales.double(), 256)
        for side in (1, -1)
    )
    return Finding(worst(slope.double() / ((ahead - behind) / (2 * step)) - 1), 0.0, bench.within(1e-7, 1e-5))


def decoded(x: Tensor, means: Tensor, log_scales: Tensor, levels: int) -> Tensor:
    """The decoder's ln p of levels ``x``."""
    return discretized_gaussian_log_likelihood(x, means=means, log_scales=log_scales, levels=levels)


def _decoder_points(bench: Bench) -> tuple[Tensor, Tensor, Tensor]:
    level, mean, std, _ = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*_DECODED, strict=True)
    )
    return bench.tensor(2 * level / 255 - 1), bench.tensor(mean), bench.tensor(std.log())


def reading(bench: Bench, *, mean_type: ModelMeanType) -> Finding:
    """The x_0 that is read from an ideal network's output, against E[x_0 | x_t], in units of the output's error."""
    chain, levels, errors = bench.chain(mean_type=mean_type), levels_of(), []
    denoise = DiffusionDenoiser(chain, Oracle(DATA, chain), clip_denoised=False)
    for t in _TIMES:
        x = bench.tensor(levels[t][0] * DATA.mean + DATA.total_variance(*levels[t]) ** 0.5 * normal(64, 1))
        errors.append(worst(denoise(x, t).x_start - DATA.x_start(x, *levels[t])) / _magnified(mean_type, t))
    return Finding(worst(torch.tensor(errors)), 0.0, bench.within(1e-11, 2e-6))


def _magnified(mean_type: ModelMeanType, t: int) -> float:
    """By how much x_0 moves with an ideal output, and so its rounding, at least 1."""
    (alpha, sigma), before = levels_of()[t], levels_of()[t - 1]
    beta, _ = variance_between((alpha, sigma), before)
    factors = {ModelMeanType.EPSILON: sigma / alpha, ModelMeanType.PREVIOUS_X: sigma**2 / (before[0] * beta)}
    return max(1.0, factors.get(mean_type, 1.0))


def even_timesteps(bench: Bench, *, steps: int) -> Finding:
    """How many timesteps are in one only of the chain of ``steps`` steps and the evenly rounded ones."""
    gap = (TOTAL - 1) / (steps - 1)
    expected = {math.floor(i * gap + 0.5) for i in range(steps)}
    return Finding(float(len(expected ^ space_timesteps(TOTAL, steps))), 0.0, 0.0)


def respaced_marginals(bench: Bench) -> Finding:
    """The noise levels and the steps' betas of a chain of 25 timesteps, against those of the whole chain."""
    levels, kept = levels_of(), sorted(space_timesteps(TOTAL, 25))
    chain, errors = bench.chain().respaced(kept), []
    for place, (t, before) in enumerate(zip(kept, [-1, *kept[:-1]], strict=True)):
        beta, _ = variance_between(levels[t], levels[before])
        errors += [float(chain.betas[place]) / beta - 1]
        errors += [float(chain.sqrt_one_minus_alphas_cumprod[place]) / levels[t][1] - 1]
    return Finding(worst(torch.tensor(errors)), 0.0, 1e-11)


CHECKS: dict[str, Check] = {
    "schedule: linear, last signal": partial(final_signal, schedule="linear", total=1000, known=4.035830e-5),
    "schedule: cosine, last signal": partial(final_signal, schedule="cosine", total=1000, known=2.428767e-9),
    "forward: noising": noising,
    "forward: posterior mean": partial(posterior, part=0),
    "forward: posterior variance": partial(posterior, part=1),
    "forward: prior": prior,
    **{
        f"decoder: {levels:,} levels add up to 1": partial(decoder_sum, levels=levels)
        for levels in (2, 256, 65536)
    },
    "decoder: log-probabilities": decoder_values,
    "decoder: gradient": decoder_gradient,
    **{f"reading: {kind.value}": partial(reading, mean_type=kind) for kind in ModelMeanType},
    "respacing: timesteps": partial(even_timesteps, steps=25),
    "respacing: marginals": respaced_marginals,
}
