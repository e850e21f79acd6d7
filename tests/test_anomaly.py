"""Anomaly scores and the area under the ROC curve, against brute force and data of known denoiser."""

import math

import pytest
import torch

from chains import chain, normal
from perrin import GaussianDiffusion, ModelVarType
from perrin.errors import ArgumentError, DataError, NonFiniteError
from perrin.evaluation.anomaly import (
    BANDS_WEIGHT,
    LOG_SNRS,
    Errors,
    Typical,
    errors,
    term_weights,
    visited,
)
from perrin.evaluation.auroc import AUROC, auroc, is_plot, plot_groups
from perrin.evaluation.mixture import (
    CLUSTER_SIZE,
    MOST_AXES,
    PARTITIONS,
    SHARED_EXAMPLES,
    Gaussian,
    Mixture,
    clusters,
    shrunk_covariance,
)
from perrin.likelihood import bound
from perrin.oracles import GaussianData, Oracle
from perrin.schedules import log_snr_linear_betas

# the area under the ROC curve


def pairs(inside, outside):
    """The share of pairs in which the outside score is higher, ties counting half."""
    higher = (outside[:, None] > inside).double() + 0.5 * (outside[:, None] == inside).double()
    return float(higher.mean())


@pytest.mark.parametrize("rounded", [False, True])
def test_the_area_is_the_share_of_pairs_in_the_right_order(rounded):
    inside, outside = normal(40, seed=1), normal(23, seed=2) + 0.7
    if rounded:  # to ties
        inside, outside = inside.round(), outside.round()
    assert auroc(inside, outside).value == pytest.approx(pairs(inside, outside), abs=1e-12)


def test_the_areas_of_a_score_and_of_its_negation_sum_to_1():
    inside, outside = normal(40, seed=1).round(), normal(23, seed=2).round() + 1
    assert auroc(inside, outside).value + auroc(-inside, -outside).value == pytest.approx(1, abs=1e-12)


def test_equal_scores_are_no_better_than_chance_and_apart_is_perfect():
    assert auroc(torch.ones(5), torch.ones(7)).value == 0.5
    assert auroc(torch.zeros(5), torch.ones(7)) == AUROC(1.0, 1.0, 1.0)


def test_the_bootstrap_interval_covers_the_true_area():
    true = 0.5 * (1 + math.erf(1 / 2))  # N(1, 1) against N(0, 1): Phi(1 / sqrt 2)
    areas = [auroc(normal(60, seed=i), normal(50, seed=1000 + i) + 1, resamples=100) for i in range(100)]
    covered = sum(area.low <= true <= area.high for area in areas)
    assert 88 <= covered <= 99  # 95% of 100, a bootstrap of small groups being slightly short
    width = sum(area.high - area.low for area in areas) / 100
    assert width == pytest.approx(0.178, abs=0.02)  # Hanley and McNeil (1982): 2 x 1.96 x 0.045


def test_the_interval_depends_on_the_level_and_the_seed():
    groups = normal(60, seed=1), normal(50, seed=2) + 1
    wide, narrow, other = auroc(*groups), auroc(*groups, level=0.5), auroc(*groups, seed=1)
    assert wide.low < narrow.low < wide.value < narrow.high < wide.high
    assert wide == auroc(*groups)
    assert (other.low, other.value) != (wide.low, wide.value)
    assert other.value == wide.value


@pytest.mark.parametrize(("inside", "outside"), [([], [1.0]), ([1.0], []), ([1.0, math.nan], [1.0])])
def test_groups_without_scores_are_refused(inside, outside):
    with pytest.raises(ArgumentError, match="must be at least one number, all finite"):
        auroc(torch.tensor(inside), torch.tensor(outside))


def test_the_histograms_are_drawn(tmp_path):
    plot_groups(
        {"score": (normal(30), normal(30) + 2), "flat": (torch.ones(3), torch.ones(3))}, tmp_path / "x.png"
    )
    assert is_plot(tmp_path / "x.png")


# the densities and their p-values


def test_the_covariance_is_shrunk_as_ledoit_and_wolf_say():
    x = normal(30, 4) @ torch.tensor(
        [[1.0, 0.5, 0, 0], [0, 1, 0.2, 0], [0, 0, 2, 0], [0, 0, 0, 0.3]], dtype=torch.float64
    )
    x = x - x.mean(0)
    sample = x.T @ x / 30
    level = float(sample.diagonal().mean())
    target = level * torch.eye(4, dtype=torch.float64)
    noise = sum(((torch.outer(row, row) - sample) ** 2).sum() for row in x) / 30**2
    share = float(noise / ((sample - target) ** 2).sum())
    covariance, found = shrunk_covariance(x)
    assert found == pytest.approx(share, rel=1e-9)
    torch.testing.assert_close(covariance, (1 - share) * sample + share * target)


def found(count, *, seed, shift=0.0, mix=None):
    """Errors of ``count`` examples: 5 normal features, of which 2 are bands."""
    features = normal(count, 5, seed=seed) + shift
    features = features if mix is None else features @ mix
    return Errors(features[:, :2], features, features.mean(1))


def test_a_distance_is_mahalanobis_and_1_on_average():
    mix = normal(5, 5, seed=4) + 2 * torch.eye(5, dtype=torch.float64)
    gaussian = Gaussian.fit(normal(4000, 5, seed=1) @ mix)
    x = normal(500, 5, seed=3)
    torch.testing.assert_close(gaussian.distance(x @ mix), x.square().mean(1), rtol=0.15, atol=0.02)
    assert gaussian.shrinkage < 0.05


def blobs(count, *, seed, centres=(-9.0, 9.0), dim=6):
    """Examples around as many centres on a diagonal, in turn, each with another spread: 1, 2, and so on."""
    which = torch.arange(count) % len(centres)
    middle = torch.tensor(centres, dtype=torch.float64)[which, None]
    return middle + (1 + which[:, None]) * normal(count, dim, seed=seed), which


def test_clusters_part_the_examples_and_find_those_that_are_apart():
    x, which = blobs(200, seed=1)
    members = clusters(x, 2, seed=0)
    assert (members.sum(1) == 1).all()
    assert torch.equal(members[:, members[0].int().argmax()], which == 0)
    assert torch.equal(clusters(x, 2, seed=0), members)
    assert clusters(torch.zeros(9, 2, dtype=torch.float64), 4, seed=0).shape == (9, 1)  # no empty ones


def test_a_mixture_of_one_cluster_is_a_gaussian_drawn_to_itself():
    mix = normal(5, 5, seed=4) + 2 * torch.eye(5, dtype=torch.float64)
    x, other = normal(CLUSTER_SIZE, 5, seed=1) @ mix, normal(50, 5, seed=2) @ mix
    away, centred = other - x.mean(0), x - x.mean(0)
    squares = (away @ torch.linalg.inv(centred.T @ centred / len(x)) * away).sum(1) / 5
    torch.testing.assert_close(Mixture.fit(x).distance(other), squares, rtol=1e-6, atol=1e-6)


def test_the_distance_of_a_mixture_is_that_of_its_density():
    x, which = blobs(2 * CLUSTER_SIZE, seed=1)
    points, terms = blobs(40, seed=2)[0], []
    own = [x[which == k] - x[which == k].mean(0) for k in (0, 1)]
    within = sum(away.T @ away for away in own) / len(x)
    for k, away in enumerate(own):
        share = (away.T @ away + SHARED_EXAMPLES * within) / (len(away) + SHARED_EXAMPLES)
        density = torch.distributions.MultivariateNormal(x[which == k].mean(0), share)
        terms.append(density.log_prob(points))
    unit = 3 * math.log(2 * math.pi) + float(torch.logdet(within)) / 2
    expected = -2 * (torch.stack(terms).logsumexp(0) - math.log(2) + unit) / 6
    torch.testing.assert_close(Mixture.fit(x).distance(points), expected, rtol=1e-6, atol=1e-6)


def test_a_mixture_tells_what_lies_between_its_clusters_where_a_gaussian_cannot():
    x, _ = blobs(4 * CLUSTER_SIZE, seed=1)
    inside, between = blobs(100, seed=2)[0], normal(100, 6, seed=3)
    assert auroc(Mixture.fit(x).distance(inside), Mixture.fit(x).distance(between)).low > 0.99
    assert auroc(Gaussian.fit(x).distance(inside), Gaussian.fit(x).distance(between)).high < 0.3


def test_a_mixture_has_a_cluster_per_so_many_examples_and_fewer_axes_than_examples():
    many, few = Mixture.fit(normal(3 * CLUSTER_SIZE, 200)), Mixture.fit(normal(8, 200))
    assert (many.axes.shape, len(many.shares)) == ((200, MOST_AXES), 3 * PARTITIONS)
    assert (few.axes.shape, len(few.shares)) == ((200, 2), PARTITIONS)
    assert float(many.shares.sum()) == pytest.approx(1)


def test_the_score_adds_the_distance_of_the_bands_to_that_of_all():
    typical, x = Typical.fit(found(100, seed=1), found(50, seed=2)), found(20, seed=3)
    whole, bands = typical.features.distance(x.features), typical.bands.distance(x.bands)
    torch.testing.assert_close(typical.score(x), whole + BANDS_WEIGHT * bands)


def test_p_values_are_uniform_on_typical_examples_and_small_on_others():
    typical = Typical.fit(found(300, seed=1), found(399, seed=2))
    p = typical.p_values(typical.score(found(2000, seed=3)))
    for level in (0.05, 0.25, 0.5, 0.75):
        assert float((p <= level).double().mean()) == pytest.approx(level, abs=0.05)
    far = typical.p_values(typical.score(found(50, seed=4, shift=5.0)))
    torch.testing.assert_close(far, torch.full_like(far, 1 / 400))


def test_p_values_count_the_reference_scores_that_are_at_least_as_high():
    typical = Typical.fit(found(20, seed=1), found(9, seed=2))
    ranks = typical.scores
    assert torch.equal(ranks, ranks.sort().values)
    p = typical.p_values(torch.stack([ranks[0] - 1, ranks[0], ranks[8], ranks[8] + 1]))
    torch.testing.assert_close(p, torch.tensor([1.0, 1.0, 0.2, 0.1], dtype=torch.float64))


def test_a_feature_that_is_constant_in_the_reference_does_not_break_the_fit():
    x = normal(50, 3)
    x[:, 0] = -4.0
    gaussian = Gaussian.fit(x)
    assert gaussian.distance(x).max() < 10
    x[:, 0] += 1
    assert gaussian.distance(x).min() > 1000


def test_reference_examples_that_are_all_the_same_do_not_break_the_fit():
    diffusion = continuous()
    same = errors(diffusion, Oracle(GaussianData(), diffusion), torch.full((16, 1, 4, 4), 0.5))
    typical = Typical.fit(same, same)
    torch.testing.assert_close(typical.score(same), typical.scores)
    torch.testing.assert_close(typical.p_values(typical.score(same)), torch.ones(16, dtype=torch.float64))
    other = errors(diffusion, Oracle(GaussianData(), diffusion), torch.full((1, 1, 4, 4), -0.5))
    assert float(typical.score(other)) > 1000


def test_too_small_a_reference_and_errors_that_are_not_finite_are_refused():
    with pytest.raises(DataError, match="at least 8 reference examples to fit are needed, got 7"):
        Typical.fit(found(7, seed=1), found(20, seed=2))
    with pytest.raises(DataError, match="at least 8 reference examples to rank among are needed, got 1"):
        Typical.fit(found(20, seed=1), found(1, seed=2))
    with pytest.raises(ArgumentError, match="predictions of x_0 must be finite"):
        Typical.fit(found(20, seed=1), found(20, seed=2)).score(found(1, seed=3, shift=math.nan))
    with pytest.raises(ArgumentError, match="predictions of x_0 must be finite"):
        Typical.fit(found(20, seed=1, shift=math.nan), found(20, seed=2))


def test_examples_off_the_levels_are_refused():
    diffusion = chain(num_timesteps=4)
    with pytest.raises(ArgumentError, match="x_start must hold the 256 levels"):
        errors(diffusion, lambda x, t: x, torch.full((3, 5), 0.001))


def test_a_network_that_is_not_finite_is_refused_with_its_timestep():
    diffusion = chain(num_timesteps=4)
    with pytest.raises(NonFiniteError, match="the network's output at timestep 2 is not finite"):
        errors(diffusion, lambda x, t: x if int(t[0]) < 2 else x * math.nan, torch.ones(3, 5))


# errors at noise levels


def chain_between(first, last, num_timesteps):
    """A chain of equal steps in log-SNR."""
    betas = log_snr_linear_betas(num_timesteps, first, last)
    return GaussianDiffusion(betas=betas, levels=None, model_var_type=ModelVarType.FIXED_LARGE)


def continuous(num_timesteps=100):
    """A chain of equal steps from log-SNR 10 to -6."""
    return chain_between(10.0, -6.0, num_timesteps)


def test_the_timesteps_visited_are_those_nearest_in_log_snr():
    diffusion = continuous(1601)
    log_snr = [diffusion.level_of_batch(t).log_snr for t in visited(diffusion)]
    assert visited(diffusion)[0] == 0
    assert log_snr[1:] == pytest.approx(LOG_SNRS[1:], abs=0.006)


@pytest.mark.parametrize(
    ("first", "last", "reached", "filled"),
    [
        (9.0, -5.0, LOG_SNRS[2:], [7.0]),
        (6.0, -5.0, LOG_SNRS[2:], [4.0]),
        (10.0, -1.5, LOG_SNRS[1:8], [7.0, 4.0]),
        (10.0, -3.0, LOG_SNRS[1:], []),
        (30.0, -30.0, LOG_SNRS[1:], []),
    ],
)
def test_the_place_of_targets_beyond_the_ends_is_taken_by_what_is_farthest(first, last, reached, filled):
    diffusion = chain_between(first, last, 1601)
    log_snr = [diffusion.level_of_batch(t).log_snr for t in visited(diffusion)]
    assert log_snr == pytest.approx(sorted([first, *reached, *filled], reverse=True), abs=0.03)


@pytest.mark.parametrize("num_timesteps", [1, 2, 5, 10, 12])
def test_short_chains_visit_each_timestep_once(num_timesteps):
    times = visited(chain(num_timesteps=num_timesteps))
    assert times == sorted(set(times))
    assert len(times) == min(num_timesteps, 10)
    assert times[0] == 0


def test_a_network_is_called_10_times_for_each_example():
    diffusion, seen = continuous(), []

    def network(x, t):
        seen.append(len(x))
        return torch.zeros_like(x)

    errors(diffusion, network, normal(7, 1, 8, 8))
    assert seen == [7] * 10


@pytest.mark.parametrize(
    ("shape", "image", "cells"),
    [
        ((1, 8, 8), 64, 49),
        ((3, 5, 9), 3 * 45, 3 * 35),
        ((2, 28, 28), 2 * 196, 98),
        ((6,), 6, 6),
        ((60,), 60, 49),
    ],
)
def test_features_are_the_image_and_two_maps_of_each_timestep(shape, image, cells):
    diffusion = continuous()
    x = 0.5 * normal(3, *shape).float()
    found = errors(diffusion, Oracle(GaussianData(), diffusion), x)
    assert found.bands.shape == (3, 10)
    assert found.features.shape == (3, image + 20 * cells)
    assert found.features.dtype == torch.float64
    assert found.bands[:, 0].max() < found.bands[:, -1].min()  # more noise, more error


def test_scores_depend_on_the_example_and_the_seed_alone():
    diffusion = continuous()
    network, x = Oracle(GaussianData(), diffusion), 0.5 * normal(6, 1, 8, 8)
    together = errors(diffusion, network, x)
    for i in (0, 5):
        alone = errors(diffusion, network, x[i : i + 1])
        for one, all_ in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_[i])
    other = errors(diffusion, network, x, seed=1)
    assert (other.bands != together.bands).all()


def test_the_bound_from_few_calls_is_that_of_the_chain_up_to_the_rule():
    diffusion = continuous(100)
    network, x = Oracle(GaussianData(std=0.2), diffusion), 0.2 * normal(20, 1024)
    few = sum(float(errors(diffusion, network, x, seed=seed).rough_bpd.mean()) for seed in range(8)) / 8
    every = float(bound(diffusion, network, x, indices=range(20)).total.mean())
    assert few == pytest.approx(every, abs=0.15)


def test_the_weights_of_all_timesteps_are_1_and_of_few_add_up_above_log_snr_0():
    diffusion = continuous(100)
    torch.testing.assert_close(term_weights(diffusion, range(100)), torch.ones(100, dtype=torch.float64))
    assert term_weights(diffusion, [0, 10, 50, 90])[0] == 1
    above = chain_between(10.0, 0.0, 100)
    assert float(term_weights(above, [0, 10, 50, 90]).sum()) == pytest.approx(100, rel=1e-6)  # equal steps
    assert term_weights(chain(num_timesteps=1), [0]).tolist() == [1.0]


@pytest.mark.parametrize("times", [[0, 10, 50, 90], [5, 95], [70]])
@pytest.mark.parametrize("diffusion", [continuous(100), chain(num_timesteps=100)])
def test_terms_that_are_flat_above_log_snr_0_and_fall_with_the_snr_below_are_summed_exactly(diffusion, times):
    log_snr = torch.tensor([diffusion.level_of_batch(t).log_snr for t in range(100)], dtype=torch.float64)
    terms = log_snr.diff(prepend=log_snr[:1] + 1).neg() * log_snr.clamp(max=0).exp()
    counted = terms.sum() if 0 in times else terms[1:].sum()
    assert float(term_weights(diffusion, times) @ terms[times]) == pytest.approx(float(counted), rel=1e-6)


def test_the_score_finds_what_the_rough_bound_calls_more_likely():
    diffusion, data = continuous(), GaussianData(std=0.2)
    network = Oracle(data, diffusion)

    def measured(std, count, seed):
        return errors(diffusion, network, std * normal(count, 64, seed=seed))

    typical = Typical.fit(measured(0.2, 300, 1), measured(0.2, 400, 2))
    inside, quiet = measured(0.2, 400, 3), measured(0.1, 200, 4)
    assert auroc(inside.rough_bpd, quiet.rough_bpd).high < 0.1
    assert auroc(typical.score(inside), typical.score(quiet)).low > 0.95
    p = typical.p_values(typical.score(inside))
    assert float((p <= 0.1).double().mean()) == pytest.approx(0.1, abs=0.07)
