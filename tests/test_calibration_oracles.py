"""Calibration of data that are known: the bound is the entropy, and gains come in the order that theory gives."""

import math

import pytest
import torch

from perrin import GaussianDiffusion, ModelVarType, get_named_beta_schedule
from perrin.likelihood.calibration import plan
from perrin.likelihood.costs import Levels, fitted_covariances, path_nats, rules
from perrin.likelihood.predictions import Histogram
from perrin.likelihood.statistics import Statistics, collect
from perrin.likelihood.timesteps import SPACINGS
from perrin.oracles import GaussianData, MixtureData, OptimalVariance, Oracle

LN2 = math.log(2)


# The bound of Gaussian data with the best variance is their entropy, for any steps (METHODS: the exactness test)


def exact_statistics(data, diffusion):
    """What infinitely many draws of ``data`` under the ideal network would give; Gaussian decoder."""
    levels = Levels.of(diffusion)
    alpha, sigma = diffusion.alphas_cumprod.sqrt(), (levels.log_noise / 2).exp()
    error = torch.stack([expected_variance(data, *level) for level in zip(alpha, sigma, strict=True)])
    one = torch.ones(len(error), 1, dtype=torch.float64)
    x = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    square = (data.log_prob(x[:, None]).exp() * x**2).sum() / 1000
    prior = 0.5 * (alpha[-1] ** 2 * square + sigma[-1] ** 2 - 1 - levels.log_noise[-1])
    decoder = 0.5 * (torch.log(2 * math.pi * error) + 1)
    return Statistics(
        prior[None],
        error[None],
        levels.snr * error,
        Histogram(one, error[:, None], one),
        {},
        {"calibrated": decoder[None]},
    )


def expected_variance(data, alpha, sigma):
    """E Var[x_0 | x_t] in one dimension, by quadrature."""
    width = alpha + 6 * sigma
    x = torch.linspace(-1, 1, 4001, dtype=torch.float64)[:, None] * (2 * width)
    density = data.log_prob(x, alpha, sigma).exp()
    return (density * data.x_start_variance(x, alpha, sigma)[:, 0]).sum() / density.sum()


@pytest.mark.parametrize("kind", ["calibrated", "analytic"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_bound_of_gaussian_data_is_their_entropy_at_any_number_of_steps(kind, spacing):
    data = GaussianData(0.1, 0.5)
    diffusion = GaussianDiffusion(betas=get_named_beta_schedule("cosine", 1000), levels=None)
    statistics, levels = exact_statistics(data, diffusion), Levels.of(diffusion)
    rule = rules(fitted_covariances(statistics, levels))[kind]
    for steps in (1, 5, 10, 25, 100, 1000):
        path = SPACINGS[spacing](1000, steps)
        nats = path_nats(statistics, levels, rule, path).sum() + statistics.prior.mean()
        assert float(nats) / LN2 == pytest.approx(data.entropy_bpd, abs=2e-8)


def test_beta_as_the_variance_has_the_gap_that_is_known():
    """Linear schedule, T = 1000, variance 0.25: the figures of the exactness test with the variance beta."""
    data = GaussianData(0.0, 0.5)
    diffusion = GaussianDiffusion(betas=get_named_beta_schedule("linear", 1000), levels=None)
    statistics, levels = exact_statistics(data, diffusion), Levels.of(diffusion)
    known = {5: 0.277474, 10: 0.147486, 25: 0.062023, 50: 0.031335, 100: 0.015734, 1000: 0.001576}
    for steps, gap in known.items():
        path = SPACINGS["even"](1000, steps)
        nats = path_nats(statistics, levels, rules({})["fixed-large"], path)
        # There, the last step too has the variance beta, that of x_1: -E log N(x_0; mean, beta).
        beta, error = diffusion.betas[0], statistics.squared_error[0, 0]
        last = 0.5 * (torch.log(2 * math.pi * beta) + error / beta)
        total = (nats[1:].sum() + last + statistics.prior[0]) / LN2
        assert float(total) - data.entropy_bpd == pytest.approx(
            gap, rel=1e-3
        )  # but for the rounding of one timestep


# What the methods promise of the mixture oracle


@pytest.fixture(scope="module")
def mixture():
    """Plans and paths on one half of some draws, figures of gaps to the entropy on the other half."""
    data = MixtureData()
    diffusion = GaussianDiffusion(
        betas=get_named_beta_schedule("linear", 200),
        model_var_type=ModelVarType.LEARNED_RANGE,
        levels=None,
    )
    oracle = Oracle(data, diffusion, OptimalVariance(data, diffusion))
    x = data.draw(32, 1, 12, 12, seed=1)
    fit = collect(diffusion, oracle, x[:16], indices=range(16))
    held = collect(diffusion, oracle, x[16:], indices=range(16, 32), widths=fit.widths)
    levels = Levels.of(diffusion)
    known = rules(fitted_covariances(fit, levels))
    plans = {name: plan(fit, levels, rule) for name, rule in known.items()}
    entropy = float(data.nll_bpd(x[16:]).mean())

    def gap(name, steps, spacing=None):
        path = plans[name].paths[steps - 1] if spacing is None else SPACINGS[spacing](200, steps)
        return float(path_nats(held, levels, known[name], path).sum() + held.prior.mean()) / LN2 - entropy

    return plans, gap


@pytest.mark.parametrize("steps", [8, 16, 32])
def test_better_variances_and_better_timesteps_each_bring_the_bound_nearer(mixture, steps):
    _, gap = mixture
    names = ("fixed-large", "analytic", "per-state")
    even = [gap(name, steps, "even") for name in names]
    best = [gap(name, steps) for name in names]
    assert even[0] > even[1] > even[2] > best[2] > 0
    assert best[0] > best[1] > best[2]
    assert gap("calibrated", steps) == pytest.approx(best[1], abs=0.05)  # the ideal network's error is known
    assert best[2] < 0.2 * even[0]


def test_a_few_best_timesteps_lie_densely_at_low_noise(mixture):
    path = mixture[0]["calibrated"].paths[7]
    assert path[2] <= 10
    assert path[6] <= 50
    assert path[7] == 199


@pytest.mark.parametrize("kind", ["calibrated", "analytic"])
def test_more_steps_are_never_worse_for_the_ideal_network(kind):
    diffusion = GaussianDiffusion(betas=get_named_beta_schedule("cosine", 60), levels=None)
    statistics, levels = exact_statistics(MixtureData(), diffusion), Levels.of(diffusion)
    known = rules(fitted_covariances(statistics, levels))
    curve = torch.tensor(plan(statistics, levels, known[kind]).curve, dtype=torch.float64)
    assert len(curve) == 60
    assert (curve.diff() < 0).all()


def test_a_variance_for_each_state_is_read_from_the_one_that_was_learned(mixture):
    """At the whole chain, where the learned variance is the best there is."""
    _, gap = mixture
    assert gap("per-state", 200, "even") == pytest.approx(gap("learned", 200, "even"), abs=0.005)
    assert gap("per-state", 200, "even") < 0.7 * gap("calibrated", 200, "even")


def test_fewer_steps_than_there_are_can_be_planned_for():
    data = GaussianData(0.0, 0.5)
    diffusion = GaussianDiffusion(betas=get_named_beta_schedule("cosine", 60), levels=None)
    found = plan(exact_statistics(data, diffusion), Levels.of(diffusion), rules({})["fixed-small"], 3)
    assert [len(path) for path in found.paths] == [1, 2, 3]
