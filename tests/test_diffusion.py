"""The engine's identities; parity with an independent implementation is in test_parity.py."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chains import chain, images, normal
from perrin import GaussianDiffusion, LossType, ModelMeanType, ModelVarType, space_timesteps
from perrin.errors import ArgumentError, PerrinError, ShapeError
from perrin.parameterization import Denoised
from perrin.schedules import cosine_betas, get_named_beta_schedule

LEARNED_TYPES = [ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE]


@pytest.mark.parametrize("mean", ModelMeanType)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "log-snr-linear"])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_reading_inverts_the_target(mean: ModelMeanType, schedule: str, steps: int) -> None:
    full = GaussianDiffusion(betas=get_named_beta_schedule(schedule, 100), model_mean_type=mean)
    diffusion = full.respaced(space_timesteps(100, steps))
    t = torch.arange(steps)
    x, noise = images(steps, 3), normal(steps, 3)
    x_t = diffusion.q_sample(x, t, noise)
    a, b = diffusion.get_buffer("target_xstart")[:, None], diffusion.get_buffer("target_eps")[:, None]
    target = a * x + b * noise
    loss = diffusion.training_losses(lambda x, t: target, x, t, noise=noise)
    assert loss["loss"].max() < 1e-26
    x_start, eps = diffusion.read(target, x_t, t)
    # x_0 is divided by alpha, which the cosine lets fall to 5e-5 at its end, and PREVIOUS_X by less still.
    torch.testing.assert_close(x_start, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(eps, noise, rtol=0, atol=1e-9)
    for step in (0, steps - 1):
        found = diffusion.read(target[step : step + 1], x_t[step : step + 1], step)
        torch.testing.assert_close(found.x_start, x[step : step + 1], rtol=0, atol=1e-9)
        torch.testing.assert_close(found.eps, noise[step : step + 1], rtol=0, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    mean=st.sampled_from(list(ModelMeanType)),
    t=st.integers(0, 99),
    seed=st.integers(0, 1000),
    clip=st.booleans(),
)
def test_x_start_and_eps_always_explain_x_t(mean: ModelMeanType, t: int, seed: int, clip: bool) -> None:
    diffusion = chain(mean)
    output, x_t = normal(2, 3, seed=seed), normal(2, 3, seed=seed + 1)
    x_start, eps = diffusion.processed(diffusion.read(output, x_t, t), x_t, t, clip_denoised=clip)
    alpha, sigma = diffusion.level(t, x_t)
    assert not clip or x_start.abs().max() <= 1
    torch.testing.assert_close(
        alpha * x_start + sigma * eps, x_t, rtol=0, atol=1e-12 * float(x_start.abs().max() + 1)
    )


def test_all_mean_types_make_the_same_reverse_step_from_the_same_knowledge() -> None:
    x_t, x, noise = normal(3, 4), images(3, 4), None
    steps = []
    for mean in ModelMeanType:
        diffusion = chain(mean)
        t = torch.tensor([0, 1, 60])
        noise = diffusion.predict_eps_from_xstart(x_t, t, x)
        a, b = (diffusion.get_buffer(name)[t][:, None] for name in ("target_xstart", "target_eps"))
        output = a * x + b * noise
        steps.append(diffusion.p_mean_variance(lambda x, t, output=output: output, x_t, t)["mean"])
    for step in steps[1:]:
        torch.testing.assert_close(step, steps[0], rtol=1e-9, atol=1e-9)


def test_a_previous_x_mean_is_kept_where_x_start_is_clipped() -> None:
    diffusion, x = chain(ModelMeanType.PREVIOUS_X), normal(2, 3)
    output = torch.full((2, 3), 7.0, dtype=torch.float64)
    found = diffusion.p_mean_variance(lambda x, t: output, x, torch.tensor([1, 50]))
    torch.testing.assert_close(found["mean"], output, rtol=0, atol=0)
    assert found["pred_xstart"].max() == 1


def test_posterior_mean_and_variance_reproduce_the_step_before() -> None:
    """x_{t-1} drawn from the posterior of (x_0, x_t) has the marginal of x_{t-1}: match its two moments."""
    diffusion = chain()
    get = diffusion.get_buffer
    coef1, coef2, variance = (
        get("posterior_mean_coef1")[1:],
        get("posterior_mean_coef2")[1:],
        get("posterior_variance")[1:],
    )
    ac = diffusion.alphas_cumprod
    torch.testing.assert_close(coef1 + coef2 * ac[1:].sqrt(), ac[:-1].sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(coef2**2 * (1 - ac[1:]) + variance, 1 - ac[:-1], rtol=1e-11, atol=0)
    x, noise = images(2, 3), normal(2, 3)
    first = diffusion.q_posterior_mean_variance(x, diffusion.q_sample(x, 0, noise), 0)
    torch.testing.assert_close(first[0], x, rtol=1e-14, atol=0)
    assert first[1].max() == 0


def test_ranged_variance_runs_from_the_posterior_to_beta_and_beyond() -> None:
    diffusion, t = chain(var=ModelVarType.LEARNED_RANGE), torch.tensor([0, 1, 40])
    x, v = torch.zeros(3, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    found = {
        share: diffusion.p_mean_variance(lambda x, t, share=share: torch.cat([x, v + share], 1), x, t)[
            "log_variance"
        ].flatten()
        for share in (-1.0, 0.0, 1.0, 3.0)
    }
    small, large = diffusion.get_buffer("posterior_log_variance_clipped")[t], diffusion.betas[t].log()
    torch.testing.assert_close(found[-1.0], small)
    torch.testing.assert_close(found[1.0], large)
    torch.testing.assert_close(found[0.0], (small + large) / 2)
    torch.testing.assert_close(found[3.0], 2 * large - small)


def test_fixed_variances_differ_and_are_ordered() -> None:
    x, t = normal(3, 2), torch.tensor([0, 1, 40])
    small, large = (
        chain(var=var).p_mean_variance(lambda x, t: x, x, t)
        for var in (ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE)
    )
    assert small["variance"][0].unique().tolist() == [0.0]
    assert (large["variance"][0] == chain().get_buffer("posterior_variance")[1]).all()
    assert (large["variance"][1:] > small["variance"][1:]).all()
    torch.testing.assert_close(small["log_variance"][0], large["log_variance"][0])


@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 7), (3, 1, 4, 5), (3, 2, 2, 3, 4)])
@pytest.mark.parametrize("var", [ModelVarType.FIXED_LARGE, ModelVarType.LEARNED_RANGE])
def test_any_number_of_dimensions(shape: tuple[int, ...], var: ModelVarType) -> None:
    """The same numbers in any shape: dimensions but the first are alike."""
    diffusion = chain(var=var, loss=LossType.RESCALED_MSE)
    flat = (3, math.prod(shape[1:]))
    t = torch.tensor([0, 1, 60])

    def network(x: Tensor, t: Tensor) -> Tensor:
        return x * 0.9 if var is ModelVarType.FIXED_LARGE else torch.cat([x * 0.9, x.cos()], 1)

    results = []
    for dimensions in (shape, flat):
        x, noise = images(*flat).reshape(dimensions), normal(*flat).reshape(dimensions)
        p = diffusion.p_mean_variance(network, x, t)
        assert {value.shape for value in p.values()} == {torch.Size(dimensions)}
        terms = diffusion.training_losses(network, x, t, noise=noise)
        assert {value.shape for value in terms.values()} == {torch.Size([3])}
        curve = diffusion.respaced([0, 50, 99]).calc_bpd_loop(network, x, noise_fn=lambda x, t, n=noise: n)
        assert curve["vb"].shape == curve["mse"].shape == curve["xstart_mse"].shape == (3, 3)
        results.append((terms["loss"], curve["total_bpd"], p["mean"].flatten(1)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("var", "needed", "given"),
    [("LEARNED_RANGE", 6, 3), ("LEARNED", 6, 3), ("FIXED_SMALL", 3, 6), ("FIXED_LARGE", 3, 4)],
)
def test_wrong_channels_are_named(var: str, needed: int, given: int) -> None:
    diffusion, x, t = chain(var=ModelVarType[var]), torch.zeros(4, 3, 32, 32), torch.zeros(4).long()
    message = f"{var} needs {needed} output channels for input (4, 3, 32, 32), got (4, {given}, 32, 32)"
    calls: list[Callable[[], object]] = [
        lambda: diffusion.training_losses(lambda x, t: x[:, :1].expand(-1, given, -1, -1), x, t),
        lambda: diffusion.p_mean_variance(lambda x, t: x[:, :1].expand(-1, given, -1, -1), x, t),
        lambda: diffusion.calc_bpd_loop(lambda x, t: x[:, :1].expand(-1, given, -1, -1), x),
    ]
    for call in calls:
        with pytest.raises(ShapeError) as caught:
            call()
        assert str(caught.value) == message


def test_wrong_sizes_of_output_and_noise_are_refused() -> None:
    diffusion, x, t = chain(), torch.zeros(4, 3, 8, 8), torch.zeros(4).long()
    with pytest.raises(ShapeError, match=r"got \(4, 3, 4, 4\)"):
        diffusion.p_mean_variance(lambda x, t: x[..., ::2, ::2], x, t)
    for noise in (torch.zeros(3, 8, 8), torch.zeros(4, 3, 8, 4)):
        with pytest.raises(ShapeError, match=r"noise must have the shape of x, \(4, 3, 8, 8\), got"):
            diffusion.training_losses(lambda x, t: x, x, t, noise=noise)
        with pytest.raises(ShapeError, match="noise must have the shape of x"):
            diffusion.calc_bpd_loop(lambda x, t: x, x, noise_fn=lambda x, t, noise=noise: noise)


@pytest.mark.parametrize("levels", [1, 0, -5])
def test_fewer_than_two_levels_are_refused(levels: int) -> None:
    with pytest.raises(ArgumentError, match=f"levels must be at least 2, .* got {levels}"):
        chain(levels=levels)


def test_output_channels() -> None:
    for var in ModelVarType:
        assert chain(var=var).output_channels(3) == (6 if var in LEARNED_TYPES else 3)


def test_condition_mean_moves_by_the_variance() -> None:
    diffusion = chain(var=ModelVarType.FIXED_LARGE, rescale_timesteps=True).respaced([2, 50, 99])
    x, t = normal(2, 3), torch.tensor([1, 2])
    seen: list[Tensor] = []

    def cond_fn(x: Tensor, t: Tensor, strength: float) -> Tensor:
        seen.append(t)
        return strength * x.sin()

    p = diffusion.p_mean_variance(lambda x, t: x, x, t)
    mean = diffusion.condition_mean(cond_fn, p, x, t, {"strength": 2.0})
    torch.testing.assert_close(mean, p["mean"] + p["variance"] * 2 * x.sin())
    torch.testing.assert_close(seen[0], torch.tensor([500.0, 990.0]))
    torch.testing.assert_close(
        diffusion.condition_mean(lambda x, t: x, p, x, t), p["mean"] + p["variance"] * x
    )


def test_condition_score_with_the_exact_classifier_is_the_posterior() -> None:
    """x_0 ~ N(0, s^2), and y = x_0 + noise is seen: the guided x_0 is E[x_0 | x_t, y]."""
    diffusion, s2, r2, y = chain(ModelMeanType.START_X), 0.25, 0.09, 0.4
    x, t = normal(5, 1), torch.tensor([0, 1, 30, 60, 90])
    alpha, sigma = diffusion.level(t, x)
    left = s2 * sigma**2 / (alpha**2 * s2 + sigma**2)
    plain = alpha * s2 / (alpha**2 * s2 + sigma**2) * x

    def cond_fn(x: Tensor, t: Tensor) -> Tensor:
        gain = alpha * s2 / (alpha**2 * s2 + sigma**2)
        return gain * (y - gain * x) / (left + r2)

    p = diffusion.p_mean_variance(lambda x, t: plain, x, t, clip_denoised=False)
    guided = diffusion.condition_score(cond_fn, p, x, t)
    expected = (plain / left + y / r2) / (1 / left + 1 / r2)
    torch.testing.assert_close(guided["pred_xstart"], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(guided["mean"], diffusion.posterior_mean(expected, x, t), rtol=1e-9, atol=1e-9)
    for name in ("variance", "log_variance"):
        torch.testing.assert_close(guided[name], p[name], rtol=0, atol=0)


def test_denoised_fn_comes_before_the_clipping() -> None:
    diffusion, x = chain(ModelMeanType.START_X), normal(2, 3)
    found = diffusion.p_mean_variance(
        lambda x, t: x, x, torch.tensor([1, 50]), denoised_fn=lambda x_start: 100 * x_start
    )
    torch.testing.assert_close(found["pred_xstart"], (100 * x).clamp(-1, 1))


def test_a_gradient_moves_the_mean_of_the_reverse_step() -> None:
    diffusion, x, t = chain(var=ModelVarType.FIXED_LARGE), normal(2, 3), torch.tensor([1, 50])
    denoised = diffusion.read(x, x, t)
    guided = Denoised(denoised.x_start, denoised.eps, gradient=x.cos())
    variance = diffusion.get_buffer("fixed_large_variance")[t][:, None]
    torch.testing.assert_close(
        diffusion.reverse(guided, x, t)[0], diffusion.reverse(denoised, x, t)[0] + variance * x.cos()
    )


@pytest.mark.parametrize("t", [[3], [[0], [1]], [0.0, 1.0], [-1, 0], [0, 10]])
def test_timesteps_of_another_shape_kind_or_range_are_refused(t: list[Any]) -> None:
    diffusion = GaussianDiffusion(betas=cosine_betas(10))
    with pytest.raises(PerrinError, match=r"t must be (2 integers|from 0 to 9)"):
        diffusion.training_losses(lambda x, t: x, torch.zeros(2, 3), torch.tensor(t))


def test_whole_numbers_are_no_images() -> None:
    diffusion = GaussianDiffusion(betas=cosine_betas(10))
    with pytest.raises(
        ArgumentError, match=r"x must be floating-point values, data in \[-1, 1\], got torch.uint8"
    ):
        diffusion.training_losses(lambda x, t: x, torch.zeros(2, 3, dtype=torch.uint8), torch.tensor([0, 1]))


def test_numpy_and_whole_float_times_are_exact() -> None:
    diffusion, x, noise = GaussianDiffusion(betas=cosine_betas(10)), torch.ones(1, 2), torch.ones(1, 2)
    expected = diffusion.q_sample(x, 9, noise)
    for t in (np.int64(9), 9.0):
        assert torch.equal(diffusion.q_sample(x, t, noise), expected)
