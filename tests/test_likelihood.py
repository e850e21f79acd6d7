"""The bound: its parts, its keys, and its estimate from a few terms."""

import math
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from perrin import GaussianDiffusion, ModelMeanType, ModelVarType, get_named_beta_schedule
from perrin.errors import ArgumentError, NonFiniteError, ShapeError
from perrin.likelihood import bound, mean_and_error, term_probabilities
from perrin.oracles import GaussianData, Oracle, arbitrary

T = 12
DATA = GaussianData(0.1, 0.5)


def chain(
    var_type: ModelVarType = ModelVarType.FIXED_LARGE,
    *,
    total: int = T,
    levels: int | None = 256,
    mean_type: ModelMeanType = ModelMeanType.EPSILON,
) -> GaussianDiffusion:
    return GaussianDiffusion(
        betas=get_named_beta_schedule("linear", total),
        model_mean_type=mean_type,
        model_var_type=var_type,
        levels=levels,
    )


def ideal(total: int) -> tuple[GaussianDiffusion, Oracle]:
    """A chain over ``DATA`` and the network whose reverse steps are exact, variance and all."""
    diffusion = chain(ModelVarType.LEARNED, total=total, levels=None)
    signal = torch.cumprod(1 - diffusion.betas, 0)
    before = torch.cat([torch.ones(1), signal[:-1]])
    gain = before.sqrt() * diffusion.betas / (1 - signal)
    spread = DATA.remaining_variance(signal.sqrt(), (1 - signal).sqrt())
    log_variance = (diffusion.betas * (1 - before) / (1 - signal) + gain**2 * spread).log()
    return diffusion, Oracle(
        DATA, diffusion, lambda x, t: log_variance[t].reshape((-1,) + (1,) * (x.ndim - 1)).expand(x.shape)
    )


def images(n: int = 6, levels: int = 256) -> Tensor:
    """(n, 2, 3) on the levels."""
    index = torch.randint(levels, (n, 2, 3), generator=torch.Generator().manual_seed(7))
    return 2 * index.double() / (levels - 1) - 1


# Every term


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("levels", [256, 2, None])
@pytest.mark.parametrize("var_type", [ModelVarType.LEARNED_RANGE, ModelVarType.FIXED_SMALL])
def test_the_bound_is_that_of_calc_bpd_loop_at_the_same_noise(
    var_type: ModelVarType, levels: int | None, clip: bool
) -> None:
    diffusion, x = chain(var_type, levels=levels), images(levels=levels or 256)
    network, seen = arbitrary(diffusion.output_channels(1)), defaultdict(list)

    def recorder(x_t: Tensor, t: Tensor) -> Tensor:
        for row, time in zip(x_t, t.tolist(), strict=True):
            seen[time].append(row)
        return network(x_t, t)

    def noise_fn(x_start: Tensor, t: int) -> Tensor:
        signal = float(diffusion.alphas_cumprod[t])
        return (torch.stack(seen[t]) - math.sqrt(signal) * x_start) / math.sqrt(1 - signal)

    ours = bound(diffusion, recorder, x, indices=range(6), clip_denoised=clip)
    loop = diffusion.calc_bpd_loop(network, x, clip, noise_fn=noise_fn)
    torch.testing.assert_close(ours.total, loop["total_bpd"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.prior, loop["prior_bpd"])
    torch.testing.assert_close(ours.vb, loop["vb"][:, :-1].sum(1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.decoder, loop["vb"][:, -1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("terms", [None, 3])
def test_the_total_is_the_sum_of_its_parts_in_float64(terms: int | None) -> None:
    result = bound(chain(), arbitrary(1), images().float(), indices=range(6), terms=terms)
    assert torch.equal(result.total, result.prior + result.vb + result.decoder)
    for part in result[:4]:
        assert part.shape == (6,)
        assert part.dtype == torch.float64


@pytest.mark.parametrize(("terms", "calls"), [(None, T), (1, 2), (5, 6), (T - 1, T)])
def test_network_calls_are_counted(terms: int | None, calls: int) -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x

    assert bound(chain(), network, images(), indices=range(6), terms=terms).network_calls == calls
    assert sum(len(t) for t in seen) == 6 * calls


@pytest.mark.parametrize("count", [1, 6, 100])
def test_a_call_has_at_most_64_rows_and_few_images_share_it(count: int) -> None:
    sizes: list[int] = []
    x = images(count)
    bound(chain(total=101), lambda x, t: (sizes.append(len(t)), x)[1], x, indices=range(count))
    assert max(sizes) == 64
    assert len(sizes) == math.ceil(100 * count / 64) + math.ceil(count / 64)


def test_one_timestep_has_a_prior_and_a_decoder_only() -> None:
    result = bound(chain(total=1), arbitrary(1), images(), indices=range(6))
    assert bool((result.vb == 0).all())
    assert result.network_calls == 1
    assert bool((result.decoder > 0).all())


# Keys


@pytest.mark.parametrize("terms", [None, 4])
def test_an_image_has_its_bound_in_any_batch_and_order(terms: int | None) -> None:
    diffusion, x = chain(), images()
    whole = bound(diffusion, arbitrary(1), x, indices=range(10, 16), seed=3, terms=terms)
    order = [4, 0, 5, 2, 3, 1]
    parts = [
        bound(diffusion, arbitrary(1), x[rows], indices=[10 + i for i in rows], seed=3, terms=terms)
        for rows in (order[:1], order[1:4], order[4:])
    ]
    torch.testing.assert_close(torch.cat([part.total for part in parts]), whole.total[order])


@pytest.mark.parametrize("terms", [None, 4])
def test_the_kind_of_integer_does_not_matter(terms: int | None) -> None:
    diffusion, x = chain(), images()
    listed = bound(diffusion, arbitrary(1), x, indices=[0, 1, 2, 3, 4, 5], terms=terms)
    tensor = torch.arange(6)
    for indices, seed in ((tensor, tensor[0]), (tensor.numpy(), tensor.numpy()[0])):
        other = bound(diffusion, arbitrary(1), x, indices=indices, seed=seed, terms=terms)
        assert torch.equal(other.total, listed.total)


@pytest.mark.parametrize("terms", [None, 4])
def test_seed_and_index_key_the_noise(terms: int | None) -> None:
    diffusion, x = chain(), images(1).expand(2, 2, 3)
    first = bound(diffusion, arbitrary(1), x, indices=[0, 1], terms=terms).total
    other = bound(diffusion, arbitrary(1), x, indices=[0, 1], seed=1, terms=terms).total
    assert len({*first.tolist(), *other.tolist()}) == 4


def test_two_models_share_the_noise() -> None:
    seen: list[list[Tensor]] = [[], []]
    for calls, factor in zip(seen, (1.0, 2.0), strict=True):
        bound(
            chain(),
            lambda x, t, calls=calls, factor=factor: (calls.append(x), factor * x)[1],
            images(),
            indices=range(6),
            terms=4,
        )
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_the_noise_is_standard_normal_and_other_at_each_time() -> None:
    seen: list[Tensor] = []
    sigma = chain().sqrt_one_minus_alphas_cumprod

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x / sigma[t].reshape(-1, 1))
        return x

    bound(chain(levels=3), network, torch.zeros(50, 200), indices=range(50))
    noise = torch.cat(seen).reshape(T, 50, 200)
    assert float(noise.mean()) == pytest.approx(0, abs=0.015)
    assert float(noise.var()) == pytest.approx(1, abs=0.02)
    rows = torch.corrcoef(noise.flatten(0, 1))
    assert float(rows.fill_diagonal_(0).abs().max()) < 0.42  # 6 standard errors


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    bound(chain(), arbitrary(1), images(), indices=range(6), terms=3)
    assert torch.equal(torch.get_rng_state(), before)


# A few terms


def test_as_many_terms_as_timesteps_are_the_whole_bound() -> None:
    diffusion, x = chain(), images()
    whole = bound(diffusion, arbitrary(1), x, indices=range(6))
    estimate = bound(diffusion, arbitrary(1), x, indices=range(6), terms=T - 1)
    torch.testing.assert_close(estimate.total, whole.total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("terms", [1, 3, 8])
def test_the_estimate_is_unbiased(terms: int) -> None:
    diffusion, x = chain(), images(2).repeat(200, 1, 1)
    exact = bound(diffusion, arbitrary(1), x, indices=range(400))
    estimate = bound(diffusion, arbitrary(1), x, indices=range(400), terms=terms)
    assert torch.equal(estimate.decoder, exact.decoder)
    mean, error = mean_and_error(estimate.vb - exact.vb)
    assert abs(mean) < 3 * error
    assert error < 0.2 * float(exact.vb.mean())  # and the test could tell


def test_each_stratum_has_one_term() -> None:
    found = bound(chain(total=101), arbitrary(1), images(300), indices=range(300), terms=5)
    for i, t in enumerate(found.times.T):
        assert int(t.min()) == 1 + 20 * i
        assert int(t.max()) == 20 + 20 * i


def test_the_error_of_the_mean_covers_the_truth() -> None:
    diffusion, network = ideal(50)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * DATA.std**2)
    covered = 0
    for seed in range(60):
        x = DATA.draw(64, 16, seed=seed)
        mean, error = mean_and_error(
            bound(diffusion, network, x, indices=range(64), seed=seed, terms=6, clip_denoised=False).total
        )
        covered += abs(mean - entropy) < 1.96 * error
    assert covered >= 51  # 95% of 60 is 57; below 51 has probability 0.3%


def repeated(probabilities: bool, repetitions: int) -> tuple[Tensor, Tensor]:
    """Means and errors of estimates with 8 + 2 calls of 64 images of ``GaussianData(0, 0.5)``, sigma^2 = beta."""
    data, diffusion = GaussianData(0.0, 0.5), chain(ModelVarType.LEARNED, total=1000, levels=None)
    log_betas = diffusion.betas.log()
    network = Oracle(data, diffusion, lambda x, t: log_betas[t].reshape(-1, 1).expand(x.shape))
    p = term_probabilities(diffusion, network, data.draw(8, 16, seed=9), clip_denoised=False)
    found = []
    for seed in range(repetitions):
        x = data.draw(64, 16, seed=seed)
        result = bound(
            diffusion,
            network,
            x,
            indices=range(64),
            seed=seed,
            terms=8,
            decoder_draws=2,
            probabilities=p if probabilities else None,
            clip_denoised=False,
        )
        found.append(mean_and_error(result.total))
    means, errors = torch.tensor(found, dtype=torch.float64).T
    return means, errors


EXACT = 1.04867  # of that chain and data, bits per dimension


def test_a_95_percent_interval_covers_the_exact_bound() -> None:
    means, errors = repeated(True, 200)
    covered = ((means - EXACT).abs() < 1.96 * errors).double().mean()
    assert 0.90 <= float(covered) <= 0.99
    assert abs(float(means.mean()) - EXACT) < 4 * float(means.std()) / math.sqrt(200)


def test_importance_has_a_tenth_of_the_error_of_uniform_times() -> None:
    _, uniform = repeated(False, 40)
    _, importance = repeated(True, 40)
    ratio = uniform.square().mean() / importance.square().mean()  # of variances, which are unbiased
    assert float(ratio) > 10**2


def test_the_error_of_one_image_is_that_of_its_repetitions() -> None:
    diffusion, x = chain(total=200), images(1)
    options = {"terms": 16, "decoder_draws": 4, "probabilities": None}
    found = [bound(diffusion, arbitrary(1), x, indices=[0], seed=seed, **options) for seed in range(300)]
    spread = float(torch.cat([result.total for result in found]).std())
    stated = float(torch.cat([result.error for result in found]).square().mean().sqrt())
    assert 0.9 * spread < stated < 1.6 * spread


@pytest.mark.parametrize("options", [{"decoder_draws": 1, "terms": 4}, {"decoder_draws": 2, "terms": 1}])
def test_a_part_that_was_drawn_once_has_no_known_error(options: dict[str, int]) -> None:
    result = bound(chain(), arbitrary(1), images(), indices=range(6), **options)
    assert bool(result.error.isnan().all())


def test_the_whole_bound_has_an_error_too() -> None:
    result = bound(chain(total=100), arbitrary(1), images(), indices=range(6), decoder_draws=2)
    assert bool((result.error > 0).all())
    assert result.network_calls == 101


def test_a_timestep_drawn_twice_has_other_noise() -> None:
    p = torch.full((T,), 1e-9)
    p[3] = 1.0
    result = bound(chain(), arbitrary(1), images(), indices=range(6), terms=5, probabilities=p)
    assert bool((result.times == 3).all())
    assert all(len(set(row)) == 5 for row in result.terms.tolist())


def test_more_decoder_draws_keep_the_first() -> None:
    one, four = (bound(chain(), arbitrary(1), images(), indices=range(6), decoder_draws=r) for r in (1, 4))
    assert torch.equal(one.vb, four.vb)
    assert bool((one.decoder != four.decoder).all())
    torch.testing.assert_close(one.decoder, four.decoder, rtol=0.5, atol=0.1)


def test_a_shared_timestep_has_the_same_noise_in_a_shorter_chain() -> None:
    whole, seen = chain(), []
    short = whole.respaced([2, 5, 11])
    for diffusion in (whole, short):
        rows: dict[int, Tensor] = {}
        bound(
            diffusion,
            lambda x, t, rows=rows: (rows.update(zip(t.tolist(), x, strict=True)), x)[1],
            images(1),
            indices=[0],
        )
        seen.append(rows)
    for time in (2, 5, 11):
        torch.testing.assert_close(seen[0][time], seen[1][time])


def test_the_pilot_finds_the_second_moments() -> None:
    diffusion = chain(total=60)
    x = images(8)
    p = term_probabilities(diffusion, arbitrary(1), x)
    exact = bound(diffusion, arbitrary(1), images(200), indices=range(200))
    moments = torch.cat([torch.zeros(1, dtype=torch.float64), exact.terms.square().mean(0).sqrt()])
    moments = moments / moments.sum()
    assert p[0] == 0
    assert float(p.sum()) == pytest.approx(1)
    large = moments > 0.01
    assert float((p[large] / moments[large]).log().abs().mean()) < 0.25


@pytest.mark.parametrize("total", [1, 2, 3])
def test_a_short_chain_has_a_pilot_too(total: int) -> None:
    diffusion = chain(total=total)
    p = term_probabilities(diffusion, arbitrary(1), images())
    assert p.shape == (total,)
    assert float(p.sum()) == pytest.approx(min(total - 1, 1))


@pytest.mark.parametrize("wrong", [torch.zeros(T), torch.full((T,), math.nan), torch.full((T,), -1.0)])
def test_probabilities_that_are_none_are_refused(wrong: Tensor) -> None:
    with pytest.raises(ArgumentError, match="probabilities must be positive and finite"):
        bound(chain(), arbitrary(1), images(), indices=range(6), terms=2, probabilities=wrong)


def test_another_number_of_probabilities_is_refused() -> None:
    with pytest.raises(ShapeError, match=rf"probabilities must be \({T},\), got \({T - 1},\)"):
        bound(chain(), arbitrary(1), images(), indices=range(6), terms=2, probabilities=torch.ones(T - 1))


def test_no_decoder_draw_is_refused() -> None:
    with pytest.raises(ArgumentError, match="decoder_draws must be at least 1, got 0"):
        bound(chain(), arbitrary(1), images(), indices=range(6), decoder_draws=0)


def broken(x_t: Tensor, t: Tensor) -> Tensor:
    """A network that gives NaN from timestep 3 on."""
    return torch.where((t < 3).reshape(-1, 1, 1), x_t, math.nan)


@pytest.mark.parametrize("measure", [bound, term_probabilities])
def test_a_term_that_is_not_finite_is_refused_with_its_timestep(measure: Callable[..., object]) -> None:
    named = {"indices": range(6)} if measure is bound else {}
    with pytest.raises(NonFiniteError, match="the bound's term at timestep 3 is not finite"):
        measure(chain(), broken, images(), **named)


OFF = torch.full((6, 2, 3), 0.001)
REFUSED = [
    (OFF, 256, "x_start must hold the 256 levels 2 k / 255 - 1, got other values"),
    (torch.full((6, 2, 3), 1 + 2 / 255), 256, "x_start must hold the 256 levels"),
    (torch.full((6, 2, 3), math.nan), None, "x_start must be finite, got NaN or infinity"),
    (torch.zeros(0, 2, 3), 256, r"x_start must have shape \(B, ...\), got \(0, 2, 3\)"),
]


@pytest.mark.parametrize("measure", [bound, term_probabilities])
@pytest.mark.parametrize(("x", "levels", "message"), REFUSED)
def test_data_that_cannot_be_measured_are_refused(
    measure: Callable[..., object], x: Tensor, levels: int | None, message: str
) -> None:
    named = {"indices": range(len(x))} if measure is bound else {}
    with pytest.raises((ArgumentError, ShapeError), match=message):
        measure(chain(levels=levels), arbitrary(1), x, **named)


def test_continuous_data_lie_anywhere() -> None:
    assert bool(bound(chain(levels=None), arbitrary(1), 2 + OFF, indices=range(6)).total.isfinite().all())
