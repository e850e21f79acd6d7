"""The bound by noise bands, against known likelihoods, and what it is called with."""

import math

import pytest
import torch
from torch import Tensor

from perrin import GaussianDiffusion, ModelMeanType, ModelVarType
from perrin.errors import ArgumentError, ShapeError
from perrin.likelihood import NoiseBands, bound, mean_and_error
from perrin.oracles import GaussianData, Oracle, arbitrary
from perrin.schedules import log_snr_linear_betas, space_timesteps
from test_likelihood import DATA, T, chain, ideal, images

# Bands


@pytest.mark.parametrize("terms", [None, 7])
def test_the_bands_add_up_to_the_kl_terms(terms: int | None) -> None:
    diffusion = chain(total=300)
    found = bound(diffusion, arbitrary(1), images(), indices=range(6), terms=terms)
    sums = NoiseBands.of(diffusion).sums(found)
    torch.testing.assert_close(sums.sum(1), found.vb)


def test_a_band_holds_the_terms_of_its_log_snr() -> None:
    diffusion = GaussianDiffusion(betas=log_snr_linear_betas(200, 9.0, -7.0), levels=17)
    bands, found = (
        NoiseBands.of(diffusion),
        bound(diffusion, arbitrary(1), images(levels=17), indices=range(6)),
    )
    assert bands.names == (
        "log-SNR 8 to 10",
        *(f"log-SNR {edge} to {edge + 2}" for edge in (6, 4, 2, 0, -2, -4, -6)),
        "log-SNR below -6",
    )
    log_snr = (diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)).log()[1:]
    inside = (log_snr >= 2) & (log_snr < 4)
    torch.testing.assert_close(bands.sums(found)[:, 3], found.terms[:, inside].sum(1))
    assert len(bands.places) == 200


def test_one_timestep_is_one_band() -> None:
    assert NoiseBands.of(chain(total=1)).places == (0,)


# Known likelihoods


def test_the_ideal_bound_is_the_likelihood() -> None:
    diffusion, network = ideal(100)
    x = DATA.draw(16, 4000)
    result = bound(diffusion, network, x, indices=range(16), clip_denoised=False)
    mean, error = mean_and_error(result.total - DATA.nll_bpd(x))
    assert error < 0.01
    assert abs(mean) < 3.5 * error


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("var_type", [ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE])
def test_the_bound_lies_above_the_likelihood(var_type: ModelVarType, clip: bool) -> None:
    diffusion = chain(var_type, total=30, levels=None)
    x = DATA.draw(16, 4000)
    result = bound(diffusion, Oracle(DATA, diffusion), x, indices=range(16), clip_denoised=clip)
    mean, error = mean_and_error(result.total - DATA.nll_bpd(x))
    assert mean > 5 * error


@pytest.mark.parametrize(("steps", "gap"), [(5, 0.277474), (10, 0.147486), (25, 0.062023), (50, 0.031335)])
def test_the_gap_of_variance_beta_is_the_known_one(steps: int, gap: float) -> None:
    data, whole = GaussianData(0.0, 0.5), chain(ModelVarType.LEARNED, total=1000, levels=None)
    kept = sorted(space_timesteps(1000, steps))
    diffusion = whole.respaced(kept)

    def log_beta(x: Tensor, t: Tensor) -> Tensor:
        places = torch.tensor([kept.index(time) for time in t.tolist()])
        return diffusion.betas.log()[places].reshape(-1, 1).expand(x.shape)

    x = data.draw(8, 20000)
    network = Oracle(data, whole, log_beta)
    result = bound(diffusion, network, x, indices=range(8), clip_denoised=False)
    mean, error = mean_and_error(result.total - data.nll_bpd(x))
    assert error < 0.006
    assert abs(mean - gap) < 4 * error


@pytest.mark.parametrize("mean_type", ModelMeanType)
def test_every_mean_type_has_the_same_bound(mean_type: ModelMeanType) -> None:
    x, expected = (
        images(),
        bound(chain(), Oracle(DATA, chain()), images(), indices=range(6), clip_denoised=False),
    )
    diffusion = chain(mean_type=mean_type)
    result = bound(diffusion, Oracle(DATA, diffusion), x, indices=range(6), clip_denoised=False)
    torch.testing.assert_close(result.total, expected.total, rtol=1e-8, atol=1e-8)


def test_clipping_is_the_default_and_can_be_left_out() -> None:
    diffusion, x = chain(mean_type=ModelMeanType.START_X), images()

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, 2.0)

    clipped, stated, free = (
        bound(diffusion, network, x, indices=range(6), **options).total
        for options in ({}, {"clip_denoised": True}, {"clip_denoised": False})
    )
    assert torch.equal(clipped, stated)
    assert bool((clipped < free).all())


# The rest


@pytest.mark.parametrize("terms", [None, 3])
def test_model_kwargs_reach_the_network(terms: int | None) -> None:
    diffusion = GaussianDiffusion(betas=log_snr_linear_betas(T, 20.0, 10.0))
    x, seen = images(100), 0

    def network(x_t: Tensor, t: Tensor, y: Tensor, scale: float) -> Tensor:
        nonlocal seen
        seen += len(y)
        nearest = torch.cdist(x_t.flatten(1), x.flatten(1)).argmin(1)
        assert torch.equal(nearest, y)  # each row with the label of its own image
        return scale * x_t

    found = bound(
        diffusion,
        network,
        x,
        indices=range(100),
        terms=terms,
        model_kwargs={"y": torch.arange(100), "scale": 1.0},
    )
    assert seen == 100 * found.network_calls


def test_no_gradient_is_kept_and_data_is_not_modified() -> None:
    x, scale = images(), torch.ones((), requires_grad=True)
    kept = x.clone()
    assert not bound(chain(), lambda x, t: scale * x, x, indices=range(6)).total.requires_grad
    assert torch.equal(x, kept)


def test_half_precision_data_is_noised_in_float32() -> None:
    x = images(levels=17).bfloat16()
    half, single = (bound(chain(levels=17), arbitrary(1), v, indices=range(6)) for v in (x, x.float()))
    assert torch.equal(half.total, single.total)


@pytest.mark.parametrize("terms", [0, -1, T])
def test_terms_out_of_range_are_refused(terms: int) -> None:
    with pytest.raises(ArgumentError, match=f"terms must be from 1 to {T - 1}, got {terms}"):
        bound(chain(), arbitrary(1), images(), indices=range(6), terms=terms)


@pytest.mark.parametrize("count", [5, 7])
def test_another_number_of_indices_is_refused(count: int) -> None:
    with pytest.raises(ShapeError, match=f"indices must name 6 images, got {count}"):
        bound(chain(), arbitrary(1), images(), indices=range(count))


def test_the_error_of_a_mean() -> None:
    assert mean_and_error(torch.tensor([1.0, 2.0, 3.0, 6.0])) == pytest.approx((3.0, math.sqrt(14 / 3) / 2))
    mean, error = mean_and_error(torch.tensor([2.0]))
    assert mean == 2.0
    assert math.isnan(error)


def test_the_mean_of_float32_values_is_taken_in_float64() -> None:
    values = torch.tensor([16777216.0, 1.0, 1.0, 1.0, 1.0])
    assert mean_and_error(values)[0] == 16777220.0 / 5
