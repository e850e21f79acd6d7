"""DDIM's inverse by fixed-point iteration: what it gains, and whether it says where it fails."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from perrin import GaussianDiffusion, ModelMeanType, SamplerDDIM, get_named_beta_schedule
from perrin.errors import ArgumentError
from perrin.guidance import ScoreGuided
from perrin.oracles import GaussianData, MixtureData, Oracle, arbitrary, normal
from perrin.samplers.inversion import PATIENCE, FixedPoint
from test_samplers_bdia import Counted, chain, rms

DATA = MixtureData()


def plain(sampler: SamplerDDIM, network, x: Tensor, iterations: int) -> Tensor:
    """The usual fixed-point iteration, neither damped nor accelerated."""
    denoise = sampler.denoiser(network, clip_denoised=False)
    for s, t in pairwise(sampler.times[::-1]):
        (alpha_s, sigma_s), (alpha, sigma) = denoise.schedule(s), denoise.schedule(t)
        ratio, eps = alpha / alpha_s, denoise(x, max(s, 0)).eps
        z = ratio * x + (sigma - ratio * sigma_s) * eps
        for _ in range(iterations):
            z = ratio * x + (sigma - ratio * sigma_s) * denoise(z, t).eps
        x = z
    return x


def back(sampler: SamplerDDIM, network, noise: Tensor) -> Tensor:
    return sampler.sample(network, noise.shape, noise=noise, clip_denoised=False)


@pytest.mark.parametrize(("steps", "plainly"), [(20, 1e-2), (50, 1e-2), (100, 1e-6)])
def test_it_converges_also_where_the_plain_iteration_does_not(steps: int, plainly: float) -> None:
    diffusion, x = chain(), DATA.draw(256, 1, seed=1)
    sampler, network = SamplerDDIM(diffusion, steps), Oracle(DATA, diffusion)
    naive = rms(back(sampler, network, sampler.invert(network, x)) - x)
    found = FixedPoint(sampler, tolerance=1e-12).invert(network, x)
    assert naive > 0.03
    assert rms(back(sampler, network, plain(sampler, network, x, 20)) - x) > plainly
    assert rms(back(sampler, network, found.noise) - x) < 1e-10
    assert found.converged.all()
    assert found.residuals.shape == (steps, 256)
    assert float(found.residuals.max()) <= 1e-12


def test_residuals_that_grow_are_damped_and_the_best_iterate_is_kept() -> None:
    data, diffusion = MixtureData(std=0.05), chain()
    x, network = data.draw(64, 8, seed=1), Oracle(data, diffusion)
    found = FixedPoint(SamplerDDIM(diffusion, 50), iterations=40, tolerance=1e-9).invert(network, x)
    assert found.converged.all()
    step = SamplerDDIM(diffusion, grid=[600])
    reached = [FixedPoint(step, n, tolerance=0).invert(network, x).residuals for n in range(1, 10)]
    assert all(bool((after <= before).all()) for before, after in pairwise(reached))


def test_one_iteration_is_the_naive_inversion() -> None:
    diffusion, x = chain(), GaussianData().draw(4, 3)
    sampler, network = SamplerDDIM(diffusion, 10), Oracle(GaussianData(), diffusion)
    found = FixedPoint(sampler, iterations=1).invert(network, x)
    step = sampler.invert(network, x)
    assert not found.converged.any()
    assert rms(found.noise - step) < 0.5 * rms(x - step)


@pytest.mark.parametrize("iterations", [1, 3, 8])
def test_the_residual_is_what_a_step_misses_by(iterations: int) -> None:
    diffusion, x = chain(), DATA.draw(16, 8)
    sampler = SamplerDDIM(diffusion, grid=[600])
    network = Oracle(DATA, diffusion)
    found = FixedPoint(sampler, iterations, tolerance=1e-9).invert(network, x)
    missed = (back(sampler, network, found.noise) - x).square().mean(1).sqrt()
    torch.testing.assert_close(found.residuals, missed[None], rtol=1e-6, atol=1e-12)
    assert torch.equal(found.converged, missed <= 1e-9)


@pytest.mark.parametrize(("iterations", "tolerance", "most"), [(2, 0.0, 1 + 20 * 2), (30, 1e-6, 1 + 20 * 12)])
def test_network_calls_are_those_made(iterations: int, tolerance: float, most: int) -> None:
    diffusion, x = chain(), DATA.draw(16, 8)
    network = Counted(Oracle(DATA, diffusion))
    found = FixedPoint(SamplerDDIM(diffusion, 20), iterations, tolerance).invert(network, x)
    assert 1 + 20 * 2 <= found.network_calls == network.calls <= most


def test_what_has_no_solution_has_not_converged() -> None:
    diffusion = chain(mean_type=ModelMeanType.START_X)
    found = FixedPoint(SamplerDDIM(diffusion, 10)).invert(lambda x, t: 0.1 + 0 * x, normal(3, 2))
    assert not found.converged.any()
    assert bool((found.residuals[0] > 0.01).all())
    assert bool(torch.isfinite(found.noise).all())


def test_a_step_from_the_data_without_a_solution_is_given_up_before_all_calls_are_made() -> None:
    diffusion, x = chain(mean_type=ModelMeanType.START_X), normal(3, 2)
    step = SamplerDDIM(diffusion, grid=[600])
    found = FixedPoint(step, iterations=30).invert(lambda x, t: 0.1 + 0 * x, x)
    assert found.network_calls == 1 + 1 + PATIENCE
    torch.testing.assert_close(found.residuals[0], (x - 0.1).square().mean(1).sqrt())


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("tolerance", [1e-5, 0.0])
def test_few_dimensions_and_float32_end_in_a_finite_answer(dimensions: int, tolerance: float) -> None:
    x = GaussianData().draw(8, dimensions).float()
    for steps in (10, 20, 50):
        found = FixedPoint(SamplerDDIM(chain(), steps), tolerance=tolerance).invert(
            Oracle(GaussianData(), chain()), x
        )
        assert bool(torch.isfinite(found.noise).all())
        assert bool((found.residuals < 1e-4).all())


def test_a_row_without_a_solution_does_not_stop_the_others() -> None:
    diffusion, x = chain(mean_type=ModelMeanType.START_X), DATA.draw(3, 8).float()
    ideal = Oracle(DATA, diffusion)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([ideal(x[:2], t[:2]), torch.full_like(x[2:], 0.1)])

    found = FixedPoint(SamplerDDIM(diffusion, 20), tolerance=1e-4).invert(network, x)
    assert found.converged.tolist() == [True, True, False]


def test_an_inversion_does_not_depend_on_the_batch() -> None:
    diffusion = chain()
    x = torch.cat([DATA.draw(4, 8), 3 * normal(4, 8)])
    search, network = FixedPoint(SamplerDDIM(diffusion, 20), tolerance=1e-2), Oracle(DATA, diffusion)
    whole = search.invert(network, x)
    for i in (1, 6):
        alone = search.invert(network, x[i : i + 1])
        torch.testing.assert_close(whole.noise[i], alone.noise[0], rtol=1e-6, atol=1e-6)
        assert whole.converged[i] == alone.converged[0]


@pytest.mark.parametrize("total", [100, 1000])
def test_pure_noise_at_the_end_of_a_cosine_chain_is_no_obstacle(total: int) -> None:
    diffusion, x = chain("cosine", total), DATA.draw(16, 4)
    sampler, network = SamplerDDIM(diffusion, 50), Oracle(DATA, diffusion)
    found = FixedPoint(sampler, tolerance=1e-11).invert(network, x)
    assert found.converged.all()
    assert rms(back(sampler, network, found.noise) - x) < 1e-9


def test_a_chain_that_ends_without_signal_can_be_inverted() -> None:
    betas = torch.tensor([*get_named_beta_schedule("linear", 1000)[:-1], 1.0])
    diffusion = GaussianDiffusion(betas=betas, model_mean_type=ModelMeanType.VELOCITY, levels=None)
    sampler, network, x = SamplerDDIM(diffusion, 50), Oracle(DATA, diffusion), DATA.draw(8, 2)
    found = FixedPoint(sampler, tolerance=1e-9).invert(network, x)
    assert found.converged.all()
    assert rms(back(sampler, network, found.noise) - x) < 1e-6


def test_guidance_and_clipping_are_inverted_too() -> None:
    diffusion, x = chain(), GaussianData(0.2, 0.3).draw(8, 4)
    sampler, network = SamplerDDIM(diffusion, 30), Oracle(GaussianData(0.2, 0.3), diffusion)

    def pull(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 - x

    def guided(denoiser) -> ScoreGuided:
        return ScoreGuided(denoiser, pull)

    by_cond_fn = FixedPoint(sampler).invert(network, x, cond_fn=pull)
    by_guidance = FixedPoint(sampler).invert(network, x, guidance=(guided,))
    assert by_cond_fn.converged.all()
    assert torch.equal(by_cond_fn.noise, by_guidance.noise)
    trip = sampler.round_trip(network, x, guidance=(guided,))
    assert torch.equal(trip.noise, sampler.invert(network, x, cond_fn=pull))
    assert torch.equal(trip.sample, sampler.round_trip(network, x, cond_fn=pull).sample)
    clipped = FixedPoint(sampler).invert(network, 3 * x, clip_denoised=True)
    assert not clipped.converged.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"tolerance": -1.0}, "tolerance must be at least 0, got -1"),
        ({"tolerance": float("nan")}, "tolerance must be at least 0, got nan"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        FixedPoint(SamplerDDIM(chain(), 10), **options)


def test_only_eta_zero_can_be_inverted() -> None:
    with pytest.raises(ArgumentError, match=r"eta must be 0, got 0\.5"):
        FixedPoint(SamplerDDIM(chain(), 10, eta=0.5)).invert(arbitrary(1), normal(1, 2))
