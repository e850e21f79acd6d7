"""Checks of the variational bound, with Gaussian data: there each term is quadratic in x_0 and the noise.

So its expectation is the mean over the four signs of one standard deviation of each: nothing is drawn.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from perrin.diffusion import GaussianDiffusion
from perrin.evaluation.verify.bench import CENTRED, TOTAL, Bench, Check, Finding, rms
from perrin.likelihood import bound, mean_and_error, term_probabilities
from perrin.oracles import OptimalVariance, Oracle
from perrin.randomness import seed_of
from perrin.variance import ModelVarType

# By how much the bound exceeds the entropy when every step's variance is beta, bits per dimension, by the number
# of steps out of 1000 with linear betas, for data of variance 0.25; the steps are those of `spaced`.
_BETA_GAPS = {5: 0.277474, 25: 0.062023, 1000: 0.001576}
BETA_BPD = CENTRED.entropy_bpd + _BETA_GAPS[TOTAL]
_REPETITIONS = 40


class Case(NamedTuple):
    """A chain and the ideal network of `CENTRED`, whose steps have one of two variances."""

    diffusion: GaussianDiffusion
    network: Oracle

    @classmethod
    def optimal(cls, bench: Bench, steps: int, var_type: ModelVarType = ModelVarType.LEARNED_RANGE) -> Case:
        """With Var[x_s | x_t]: the reverse process is exact and the bound is the entropy."""
        whole, kept = bench.chain(var_type), spaced(steps)
        return cls(whole.respaced(kept), Oracle(CENTRED, whole, OptimalVariance(CENTRED, whole, kept)))

    @classmethod
    def converted(cls, bench: Bench, steps: int) -> Case:
        """With the Var[x_{t-1} | x_t] of the whole chain, which becomes that of longer steps."""
        whole = bench.chain(ModelVarType.LEARNED)
        chain = whole.respaced(spaced(steps), convert_learned=True)
        return cls(chain, Oracle(CENTRED, whole, OptimalVariance(CENTRED, whole)))

    @classmethod
    def beta(cls, bench: Bench, steps: int) -> Case:
        """With beta, which is v = 1 of LEARNED_RANGE."""
        whole = bench.chain(ModelVarType.LEARNED_RANGE)
        network = Oracle(CENTRED, whole, lambda x, t: torch.ones_like(x))
        return cls(whole.respaced(spaced(steps)), network)

    def expected_bpd(self, bench: Bench) -> float:
        """The expectation of the whole bound, in bits per dimension."""
        signs = bench.tensor([[1.0], [1.0], [-1.0], [-1.0]]), bench.tensor([[1.0], [-1.0], [1.0], [-1.0]])
        terms = self.diffusion.calc_bpd_loop(
            self.network, CENTRED.std * signs[0], clip_denoised=False, noise_fn=lambda x, t: signs[1]
        )
        return float(terms["total_bpd"].double().mean())


def spaced(steps: int) -> list[int]:
    """Timesteps whose number from 1 on is evenly spaced, halves rounded to even numbers."""
    return [round(1 + (TOTAL - 1) * place / (steps - 1)) - 1 for place in range(steps)]


def entropy(bench: Bench, *, steps: int, var_type: ModelVarType = ModelVarType.LEARNED_RANGE) -> Finding:
    """The bound of an exact reverse process, which is the entropy for any number of steps."""
    return _entropy(bench, Case.optimal(bench, steps, var_type))


def converted_entropy(bench: Bench, *, steps: int) -> Finding:
    """The same where the variances are those of the whole chain's steps, converted to longer ones."""
    return _entropy(bench, Case.converted(bench, steps))


def _entropy(bench: Bench, case: Case) -> Finding:
    found = case.expected_bpd(bench)
    # x_T is not quite noise, which costs 3e-10; float32 loses 1e-7 of eps, which low noise multiplies.
    return Finding(found, CENTRED.entropy_bpd, bench.within(1e-8, 2e-5))


def beta_gap(bench: Bench, *, steps: int) -> Finding:
    """By how much the bound exceeds the entropy where the variance is beta."""
    gap = Case.beta(bench, steps).expected_bpd(bench) - CENTRED.entropy_bpd
    return Finding(gap, _BETA_GAPS[steps], bench.within(1e-6, 2e-5))


def by_image(bench: Bench) -> Finding:
    """The mean of `bound` over 64 images less their exact log p, at 25 steps: within five standard errors of 0."""
    case, x = Case.optimal(bench, 25), bench.draw(CENTRED, 64, 1024)
    found = bound(case.diffusion, case.network, x, indices=range(64), seed=bench.seed, clip_denoised=False)
    mean, error = mean_and_error(found.total - CENTRED.nll_bpd(x).cpu().double())
    return Finding(mean, 0.0, 5 * error)


def estimates(bench: Bench, repetitions: int, images: int) -> list[tuple[float, float]]:
    """Mean and standard error of each estimate with 5 network calls for each image.

    Of the bound at 1000 steps with variance beta, whose exact value is `BETA_BPD`.
    """
    case, pilot = Case.beta(bench, TOTAL), bench.draw(CENTRED, 8, 16, part=-1)
    probabilities = term_probabilities(case.diffusion, case.network, pilot, clip_denoised=False)
    found = [
        bound(
            case.diffusion,
            case.network,
            bench.draw(CENTRED, images, 16, part=part),
            indices=range(images),
            seed=seed_of("verify", bench.seed, part),
            terms=4,
            probabilities=probabilities,
            clip_denoised=False,
        )
        for part in range(repetitions)
    ]
    return [mean_and_error(each.total) for each in found]


def estimate(bench: Bench) -> Finding:
    """An estimate from 1000 images, within four of the standard errors that it states."""
    ((mean, error),) = estimates(bench, 1, 1000)
    return Finding(mean, BETA_BPD, 4 * error)


def off(bench: Bench) -> Tensor:
    """How far each of 40 estimates from 48 images is off, in units of the standard error that it states."""
    return torch.tensor([(mean - BETA_BPD) / error for mean, error in estimates(bench, _REPETITIONS, 48)])


def stated_error(bench: Bench) -> Finding:
    """The root mean square of errors in units of the stated ones."""
    # Four standard errors, each 1 / sqrt(2 n), of the root mean square of n numbers.
    return Finding(rms(off(bench)), 1.0, 4 / math.sqrt(2 * _REPETITIONS))


def coverage(bench: Bench) -> Finding:
    """The share of the 95% intervals that hold the exact bound; four binomial standard deviations are allowed."""
    inside = off(bench).abs() < 1.96
    return Finding(float(inside.double().mean()), 0.95, 4 * math.sqrt(0.95 * 0.05 / _REPETITIONS))


CHECKS: dict[str, Check] = {
    **{f"bound: entropy at {steps} steps": partial(entropy, steps=steps) for steps in _BETA_GAPS},
    "bound: entropy, learned variance": partial(entropy, steps=25, var_type=ModelVarType.LEARNED),
    "bound: entropy, converted variance": partial(converted_entropy, steps=25),
    **{f"bound: gap of beta at {steps} steps": partial(beta_gap, steps=steps) for steps in _BETA_GAPS},
    "bound: by image": by_image,
    "bound: estimate": estimate,
    "bound: stated error": stated_error,
    "bound: coverage": coverage,
}
