"""Dynamic thresholding."""

import pytest
import torch
from torch.testing import assert_close

from perrin import GaussianDiffusion
from perrin.denoiser import DiffusionDenoiser
from perrin.errors import ArgumentError
from perrin.guidance import dynamic_threshold
from perrin.oracles import arbitrary, normal
from perrin.schedules import linear_betas


@pytest.mark.parametrize("percentile", [1e-3, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("shape", [(3, 1, 5, 4), (2, 7), (1, 1)])
def test_each_example_is_clipped_to_its_percentile_and_scaled(
    percentile: float, shape: tuple[int, ...]
) -> None:
    x = 3 * normal(*shape)
    rows = x.flatten(1)
    s = torch.quantile(rows.abs(), percentile, dim=1, keepdim=True).clamp(min=1)
    expected = (torch.minimum(torch.maximum(rows, -s), s) / s).reshape(shape)
    assert_close(dynamic_threshold(percentile)(x), expected, rtol=1e-12, atol=1e-12)


def test_what_lies_within_the_range_stays() -> None:
    x = normal(3, 8).clamp(-1, 1)
    assert torch.equal(dynamic_threshold(1.0)(x), x)


def test_the_default_is_that_of_imagen() -> None:
    x = 3 * normal(2, 400)
    assert torch.equal(dynamic_threshold()(x), dynamic_threshold(0.995)(x))
    assert not torch.equal(dynamic_threshold()(x), dynamic_threshold(0.99)(x))


def test_eps_matches_the_thresholded_x_start() -> None:
    diffusion, x = GaussianDiffusion(betas=linear_betas(50)), normal(3, 8)
    denoise = DiffusionDenoiser(diffusion, arbitrary(1), denoised_fn=dynamic_threshold(0.8))
    raw = denoise.raw(x, 40).x_start
    assert float(raw.abs().max()) > 1.5
    (alpha, sigma), (x_start, eps) = denoise.schedule(40), denoise(x, 40)
    assert_close(x_start, dynamic_threshold(0.8)(raw))
    assert_close(alpha * x_start + sigma * eps, x)


@pytest.mark.parametrize("percentile", [0.0, 1.01, 99.5])
def test_a_percentile_that_is_no_share_is_refused(percentile: float) -> None:
    with pytest.raises(ArgumentError, match="percentile must be a share"):
        dynamic_threshold(percentile)
