"""Statistics of a network, and the expected bound of every chain that follows from them."""

import math
from itertools import pairwise

import pytest
import torch

from chains import chain, images
from perrin import ModelMeanType, ModelVarType
from perrin.errors import ArgumentError, NonFiniteError, ShapeError
from perrin.likelihood import bound
from perrin.likelihood.calibration import with_covariance
from perrin.likelihood.costs import (
    Levels,
    cost_matrix,
    fitted_covariances,
    image_nats,
    path_nats,
    pooled,
    rules,
)
from perrin.likelihood.covariance import Covariance, analytic, per_state, scalar
from perrin.likelihood.decoder import descend
from perrin.likelihood.statistics import collect
from perrin.likelihood.timesteps import SPACINGS, BestTimesteps
from perrin.oracles import arbitrary

LN2 = math.log(2)
T = 20
PATH = [1, 4, 9, 19]


def levelled(*shape, levels=17, seed=0):
    index = torch.randint(0, levels, shape, generator=torch.Generator().manual_seed(seed))
    return 2 * index.double() / (levels - 1) - 1


def setting(var, mean=ModelMeanType.START_X, levels=17):
    """A chain, a network that is ideal for nothing, five images and their statistics."""
    diffusion = chain(mean, var, num_timesteps=T, levels=levels)
    network = arbitrary(diffusion.output_channels(1))
    x = levelled(5, 1, 4, 4)
    return diffusion, network, x, collect(diffusion, network, x, indices=range(5), seed=3)


# The statistics


@pytest.mark.parametrize("mean", [ModelMeanType.START_X, ModelMeanType.EPSILON, ModelMeanType.VELOCITY])
@pytest.mark.parametrize("var", [ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE])
def test_they_give_the_kl_terms_of_a_fixed_variance_for_each_image(var, mean):
    diffusion, network, x, statistics = setting(var, mean)
    levels = Levels.of(diffusion)
    rule = rules({})[var.value]
    for timesteps in (list(range(T)), PATH):
        expected = bound(diffusion.respaced(timesteps), network, x, indices=range(5), seed=3)
        nats = image_nats(statistics, levels, rule, timesteps)
        kl = nats - statistics.prior - statistics.decoder["calibrated"][:, timesteps[0]]
        torch.testing.assert_close(kl / LN2, expected.vb, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(statistics.prior / LN2, expected.prior, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("timesteps", [list(range(T)), PATH])
def test_they_give_the_kl_terms_of_a_learned_range_up_to_the_width_of_a_bin(timesteps):
    diffusion, network, x, statistics = setting(ModelVarType.LEARNED_RANGE)
    found = bound(diffusion.respaced(timesteps), network, x, indices=range(5), seed=3)
    rule = rules(fitted_covariances(statistics, Levels.of(diffusion)))["learned"]
    kl = path_nats(statistics, Levels.of(diffusion), rule, timesteps)[1:]
    torch.testing.assert_close(kl.sum() / LN2, found.vb.mean(), rtol=2e-3, atol=0)


def test_a_learned_log_variance_has_its_place_between_the_two_of_its_step():
    diffusion = chain(ModelMeanType.START_X, ModelVarType.LEARNED, num_timesteps=T)
    ends = (diffusion.get_buffer(name) for name in ("posterior_log_variance_clipped", "log_betas"))
    quarter = torch.lerp(*ends, 0.25)

    def network(x_t, t):
        return torch.cat([torch.sin(x_t), quarter[t][:, None, None, None].expand_as(x_t)], 1)

    x = levelled(5, 1, 4, 4, levels=256)
    statistics = collect(diffusion, network, x, indices=range(5), seed=3)
    shares, _, places = statistics.histograms
    torch.testing.assert_close((shares * places).sum(1), torch.full((T,), 0.25, dtype=torch.float64))
    levels = Levels.of(diffusion)
    rule = rules(fitted_covariances(statistics, levels))["learned"]
    kl = path_nats(statistics, levels, rule, range(T))[1:].sum()
    expected = bound(diffusion, network, x, indices=range(5), seed=3).vb.mean()
    torch.testing.assert_close(kl / LN2, expected, rtol=1e-9, atol=0)


def test_they_do_not_depend_on_the_batch_size_but_on_the_seed():
    diffusion, network, x, whole = setting(ModelVarType.LEARNED_RANGE)
    parts = collect(diffusion, network, x, indices=range(5), seed=3, batch_size=2)
    other = collect(diffusion, network, x, indices=range(5), seed=4)
    torch.testing.assert_close(parts.squared_error, whole.squared_error)
    torch.testing.assert_close(parts.histograms, whole.histograms)
    torch.testing.assert_close(parts.decoder, whole.decoder)
    assert not torch.allclose(other.squared_error, whole.squared_error)


def test_the_bins_hold_all_errors():
    statistics = setting(ModelVarType.LEARNED_RANGE)[-1]
    shares, errors, places = statistics.histograms
    torch.testing.assert_close(shares.sum(1), torch.ones(T, dtype=torch.float64))
    torch.testing.assert_close((shares * errors).sum(1), statistics.squared_error.mean(0))
    assert (shares > 0).sum(1).min() > 5  # the arbitrary network's places vary
    assert places[shares > 0].std() > 0.1


def test_each_image_has_its_own_labels():
    diffusion = chain(ModelMeanType.START_X, num_timesteps=3, levels=3)
    x = torch.zeros(4, 1, 2, 2)
    y = torch.tensor([0.0, 0.25, 0.5, 0.75])

    def network(x_t, t, y):
        return y[:, None, None, None].expand_as(x_t)

    found = collect(diffusion, network, x, indices=range(4), batch_size=3, model_kwargs={"y": y})
    torch.testing.assert_close(found.squared_error, (y.double() ** 2)[:, None].expand(4, 3))


def test_what_cannot_be_calibrated_is_refused():
    diffusion = chain(num_timesteps=3, levels=3)
    x = torch.zeros(2, 1, 2, 2)
    with pytest.raises(ShapeError, match="indices must name 2 images, got 3"):
        collect(diffusion, arbitrary(1), x, indices=range(3))
    with pytest.raises(ShapeError, match=r"x_start must have shape \(B, ...\), got \(0, 1, 2, 2\)"):
        collect(diffusion, arbitrary(1), x[:0], indices=[])
    with pytest.raises(ArgumentError, match="x_start must hold the 3 levels"):
        collect(diffusion, arbitrary(1), x + 0.5, indices=range(2))
    with pytest.raises(ArgumentError, match="predicts epsilon, x_0 or v, got previous-x"):
        collect(chain(ModelMeanType.PREVIOUS_X, num_timesteps=3, levels=3), arbitrary(1), x, indices=range(2))
    with pytest.raises(NonFiniteError, match="output at timestep 0 is not finite"):
        collect(diffusion, lambda x, t: x * math.nan, x, indices=range(2))
    ranged = chain(var=ModelVarType.LEARNED_RANGE, num_timesteps=3, levels=3)
    with pytest.raises(NonFiniteError, match="output at timestep 0 is not finite"):
        collect(ranged, lambda x, t: torch.cat([x, x * math.nan], 1), x, indices=range(2))


# The decoder


def test_the_decoder_is_as_wide_as_suits_the_levels():
    """A residual of a tenth of a level: the narrowest decoder that is tried names the level best."""
    diffusion = chain(ModelMeanType.START_X, num_timesteps=2, levels=17)
    x = levelled(8, 1, 4, 4)
    noise = images(8, 1, 4, 4) * 0.0125
    found = collect(diffusion, lambda x_t, t: (x + noise).clamp(-1, 1), x, indices=range(8))
    at_error = collect(
        diffusion,
        lambda x_t, t: (x + noise).clamp(-1, 1),
        x,
        indices=range(8),
        widths={"calibrated": scalar(found.squared_error.mean(0) * 3)},
    )
    assert (found.widths["calibrated"].log_scale < found.squared_error.mean(0).log()).all()
    assert (found.decoder["calibrated"].mean(0) < at_error.decoder["calibrated"].mean(0)).all()


def test_the_decoder_of_continuous_data_has_the_width_of_the_error():
    statistics = setting(ModelVarType.LEARNED_RANGE, levels=None)[-1]
    torch.testing.assert_close(
        statistics.widths["calibrated"].log_scale, statistics.squared_error.mean(0).log(), rtol=1e-12, atol=0
    )
    expected = 0.5 * (torch.log(2 * math.pi * statistics.squared_error.mean(0)) + 1)
    torch.testing.assert_close(statistics.decoder["calibrated"].mean(0), expected, rtol=1e-6, atol=1e-9)


def test_a_decoder_for_each_state_costs_no_more_on_the_images_of_the_fit():
    decoder = setting(ModelVarType.LEARNED_RANGE)[-1].decoder
    assert (decoder["per-state"].mean(0) <= decoder["calibrated"].mean(0)).all()
    assert (decoder["per-state"].mean(0) < decoder["calibrated"].mean(0)).any()


@pytest.mark.parametrize("start", [0, 4, 9])
def test_the_descent_ends_at_the_valley_or_the_edge(start):
    assert descend(lambda i: abs(i - 6), start, 10) == 6
    assert descend(lambda i: i, start, 10) == 0
    assert descend(lambda i: -i, start, 10) == 9


# The variances


def test_a_variance_that_follows_the_state_is_found_again():
    places = torch.rand(6, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    shares = torch.full((6, 64), 1 / 64, dtype=torch.float64)
    power = torch.tensor([0, 0.25, 0.5, 1, 1.5, 2], dtype=torch.float64)
    errors = 0.3 * places ** power[:, None]
    found = per_state(shares, errors, places)
    torch.testing.assert_close(found.power, power)
    torch.testing.assert_close(found.log_scale.exp(), torch.full((6,), 0.3, dtype=torch.float64))
    torch.testing.assert_close(found.log_at(torch.arange(6), places).exp(), errors)


def test_the_analytic_variance_is_that_of_the_ideal_network():
    snr = torch.tensor([100.0, 4.0, 0.5], dtype=torch.float64)
    found = analytic(snr * torch.tensor([0.01, 0.1, 0.3]), snr).log_scale.exp()
    torch.testing.assert_close(found, torch.tensor([0.01, 0.1, 0.3], dtype=torch.float64))


def test_the_analytic_variance_keeps_its_last_good_value_in_the_noise():
    snr = torch.tensor([100.0, 4.0, 0.5, 1e-3, 1e-6, 0.0], dtype=torch.float64)
    gain = torch.tensor([-0.5, 0.4, 0.2, 0.1, -0.01, 0.0], dtype=torch.float64)
    found = analytic(gain, snr).log_scale.exp()
    torch.testing.assert_close(found, torch.tensor([1e-12, 0.1, 0.4, 0.4, 0.4, 0.4], dtype=torch.float64))
    assert analytic(-gain.abs(), snr).log_scale.exp().tolist() == [1.0] * 6


# The costs


@pytest.mark.parametrize(
    "name", ["fixed-small", "fixed-large", "learned", "analytic", "calibrated", "per-state"]
)
def test_the_matrix_holds_every_path(name):
    diffusion, _, _, statistics = setting(ModelVarType.LEARNED_RANGE)
    levels = Levels.of(diffusion)
    rule = rules(fitted_covariances(statistics, levels))[name]
    costs = cost_matrix(statistics, levels, rule)
    assert costs.shape == (T, T)
    assert costs.isinf().equal(torch.arange(T)[None] > torch.arange(T)[:, None])
    best = BestTimesteps(costs)
    for spacing in SPACINGS.values():
        for steps in (1, 2, 7, T):
            path = spacing(T, steps)
            terms = path_nats(statistics, levels, rule, path)
            entries = [
                costs[path[0], 0],
                *(costs[t, s + 1] for s, t in pairwise(path)),
            ]
            torch.testing.assert_close(terms, torch.stack(entries))
            assert float(best.totals[steps - 1]) <= float(terms.sum()) + 1e-12
    whole = path_nats(statistics, levels, rule, range(T)).sum()
    torch.testing.assert_close(best.totals[-1], whole, rtol=1e-12, atol=0)


def test_the_matrix_does_not_depend_on_its_blocks(monkeypatch):
    diffusion, _, _, statistics = setting(ModelVarType.LEARNED_RANGE)
    levels = Levels.of(diffusion)
    rule = rules(fitted_covariances(statistics, levels))["per-state"]
    whole = cost_matrix(statistics, levels, rule)
    monkeypatch.setattr("perrin.likelihood.costs.MOST_ELEMENTS", 3 * T * 64)
    assert cost_matrix(statistics, levels, rule).equal(whole)


def test_no_other_single_variance_is_better_than_the_calibrated():
    diffusion, _, _, statistics = setting(ModelVarType.FIXED_SMALL)
    levels = Levels.of(diffusion)

    def kl(variance):
        return path_nats(statistics, levels, rules({"calibrated": scalar(variance)})["calibrated"], PATH)[1:]

    error = statistics.squared_error.mean(0)
    for factor in (0.8, 0.98, 1.02, 1.25):
        assert (kl(error) < kl(factor * error)).all()


def test_images_average_to_the_path():
    diffusion, _, _, statistics = setting(ModelVarType.LEARNED_RANGE)
    levels = Levels.of(diffusion)
    for name, rule in rules(fitted_covariances(statistics, levels)).items():
        if name in ("learned", "per-state"):
            continue
        total = path_nats(statistics, levels, rule, PATH).sum() + statistics.prior.mean()
        torch.testing.assert_close(image_nats(statistics, levels, rule, PATH).mean(), total)


def test_one_bin_is_what_all_bins_have_in_common():
    statistics = setting(ModelVarType.LEARNED_RANGE)[-1]
    assert pooled(statistics).errors.shape == (T, 1)
    torch.testing.assert_close(pooled(statistics).errors[:, 0], statistics.squared_error.mean(0))


# The chains


@pytest.mark.parametrize("levels", [17, None])
@pytest.mark.parametrize("var", [ModelVarType.FIXED_SMALL, ModelVarType.LEARNED_RANGE, ModelVarType.LEARNED])
@pytest.mark.parametrize("timesteps", [PATH, list(range(T)), [19]])
def test_a_chain_with_the_calibrated_variance_has_the_bound_that_was_foretold(var, levels, timesteps):
    diffusion, network, x, statistics = setting(var, levels=levels)
    first = timesteps[0]
    covariance = fitted_covariances(statistics, Levels.of(diffusion))["calibrated"]
    own = Covariance(
        *(
            torch.cat([w[first : first + 1], c[timesteps[1:]]])
            for w, c in zip(statistics.widths["calibrated"], covariance, strict=True)
        )
    )
    found = with_covariance(diffusion.respaced(timesteps), own, None, timesteps)
    expected = image_nats(
        statistics, Levels.of(diffusion), rules({"calibrated": covariance})["calibrated"], timesteps
    )
    measured = bound(found, network, x, indices=range(5), seed=3)
    torch.testing.assert_close(measured.total, expected / LN2, rtol=1e-6, atol=1e-9)


def test_statistics_say_whether_the_network_has_a_variance():
    assert setting(ModelVarType.LEARNED)[-1].learned
    fixed = setting(ModelVarType.FIXED_LARGE)[-1]
    assert not fixed.learned
    assert fixed.histograms.shares.shape == (T, 1)
    assert set(fitted_covariances(fixed, Levels.of(setting(ModelVarType.FIXED_LARGE)[0]))) == {
        "analytic",
        "calibrated",
    }
    assert fixed.num_timesteps == T
