"""Schedules against closed forms, published values and 50 digits; spacings against the reference's rule."""

import math

import mpmath
import numpy as np
import pytest
import torch

from perrin import GaussianDiffusion, ModelMeanType, get_named_beta_schedule, space_timesteps
from perrin.errors import ArgumentError
from perrin.schedules import (
    Betas,
    cosine_betas,
    linear_betas,
    log_snr_linear_betas,
    sigmoid_betas,
    sqrt_linear_betas,
    tables,
    zero_terminal_snr,
)

NAMES = ("linear", "cosine", "sqrt-linear", "sigmoid", "log-snr-linear")


def diffusion(betas: Betas, mean_type: ModelMeanType = ModelMeanType.VELOCITY) -> GaussianDiffusion:
    return GaussianDiffusion(betas=betas, model_mean_type=mean_type)


@pytest.mark.parametrize(
    ("name", "num_timesteps", "last_alpha_bar", "prior_bpd"),
    [
        ("linear", 1000, 4.035830e-5, 1.456e-5),
        ("linear", 4000, 4.246652e-5, 1.532e-5),
        ("cosine", 1000, 2.428767e-9, 8.76e-10),
        ("cosine", 4000, 1.517980e-10, 5.5e-11),
    ],
)
def test_published_end_points_and_prior(
    name: str, num_timesteps: int, last_alpha_bar: float, prior_bpd: float
) -> None:
    chain = diffusion(get_named_beta_schedule(name, num_timesteps))
    assert chain.alphas_cumprod[-1].item() == pytest.approx(last_alpha_bar, rel=1e-6)
    for dtype in (torch.float64, torch.float32):
        x = torch.full((2, 8), math.sqrt(0.5), dtype=dtype)
        assert chain.prior_bpd(x).tolist() == pytest.approx([prior_bpd] * 2, rel=5e-3)


def test_prior_of_linear_1000_is_proportional_to_the_power_of_the_data() -> None:
    chain = diffusion(linear_betas(1000))
    bits = [chain.prior_bpd(torch.full((1, 4), x)).item() for x in (0.0, 0.1, 0.5, 1.0)]
    assert bits[3] == pytest.approx(2.91e-5, rel=5e-3)
    assert [(b - bits[0]) / (bits[3] - bits[0]) for b in bits] == pytest.approx([0, 0.01, 0.25, 1], abs=1e-6)
    assert min(bits) > 0


@pytest.mark.parametrize(("num_timesteps", "first"), [(1000, 4.12842e-5), (4000, 9.86582e-6)])
def test_first_beta_of_cosine(num_timesteps: int, first: float) -> None:
    assert cosine_betas(num_timesteps)[0] == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "num_timesteps", "second"),
    [("linear", 1000, 5.453188e-5), ("cosine", 1000, 2.178950e-5), ("cosine", 4000, 5.007683e-6)],
)
def test_second_posterior_variance(name: str, num_timesteps: int, second: float) -> None:
    variance = diffusion(get_named_beta_schedule(name, num_timesteps)).get_buffer("posterior_variance")
    assert variance[1].item() == pytest.approx(second, rel=1e-6)
    assert variance[0].item() == 0.0


@pytest.mark.parametrize("num_timesteps", [20, 50, 1000, 4000])
def test_linear_betas_end_in_the_same_noise_at_any_length(num_timesteps: int) -> None:
    betas = linear_betas(num_timesteps)
    if num_timesteps > 20:  # 20 is where the cap begins
        np.testing.assert_allclose(betas * num_timesteps, np.linspace(0.1, 20, num_timesteps), rtol=1e-13)
    assert betas[0] == pytest.approx(0.1 / num_timesteps)
    root = sqrt_linear_betas(num_timesteps)
    assert root[[0, -1]] == pytest.approx(betas[[0, -1]], rel=1e-13)
    assert (root[1:-1] < betas[1:-1]).all()


def test_sqrt_linear_betas_have_linear_roots() -> None:
    assert np.abs(np.diff(np.sqrt(sqrt_linear_betas(1000)), 2)).max() < 1e-16


def test_cosine_follows_its_closed_form_until_the_cap() -> None:
    betas = cosine_betas(1000)
    t = np.arange(1, 1001) / 1000
    expected = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], expected[:-1], rtol=1e-9)
    assert betas[-1] == 0.999
    assert (betas[:-1] < 0.999).all()


def test_cosine_offset_sets_the_first_noise_level() -> None:
    first_sigma = np.sqrt(cosine_betas(1000, offset=0.0015)[0])
    assert first_sigma == pytest.approx(0.0031, abs=5e-5)
    assert np.sqrt(cosine_betas(1000)[0]) == pytest.approx(0.0064, abs=5e-5)


def test_sigmoid_follows_its_closed_form() -> None:
    betas = sigmoid_betas(100, -2.0, 4.0)

    def s(z: np.ndarray | float) -> np.ndarray:
        return 1 / (1 + np.exp(-np.asarray(z)))

    u = np.arange(1, 101) / 100
    expected = (s(4.0) - s(-2 + 6 * u)) / (s(4.0) - s(-2.0))
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], expected[:-1], rtol=1e-9)


@pytest.mark.parametrize("num_timesteps", [1, 2, 3, 10, 500, 1000])
@pytest.mark.parametrize("ends", [(13.3, -5.0), (9.0, -5.5), (20.0, -15.0)])
def test_log_snr_linear_hits_both_end_points(num_timesteps: int, ends: tuple[float, float]) -> None:
    chain = diffusion(log_snr_linear_betas(num_timesteps, *ends))
    alpha, sigma = chain.sqrt_alphas_cumprod, chain.sqrt_one_minus_alphas_cumprod
    log_snr = 2 * (alpha / sigma).log()
    expected = np.linspace(*ends, num_timesteps) if num_timesteps > 1 else np.array(ends[1:])  # x_T is noise
    torch.testing.assert_close(log_snr, torch.from_numpy(expected), rtol=0, atol=1e-9)


def test_log_snr_linear_defaults_and_order() -> None:
    np.testing.assert_array_equal(
        get_named_beta_schedule("log-snr-linear", 10), log_snr_linear_betas(10, 13.3, -5.0)
    )
    with pytest.raises(ArgumentError, match=r"log_snr_max must exceed log_snr_min, got -5\.0 and 13\.3"):
        log_snr_linear_betas(10, -5.0, 13.3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_timesteps", [1, 2, 3, 10, 100, 1000, 4000])
def test_every_schedule_makes_a_chain(name: str, num_timesteps: int) -> None:
    betas = get_named_beta_schedule(name, num_timesteps)
    assert betas.shape == (num_timesteps,)
    assert betas.dtype == np.float64
    chain = diffusion(betas)
    get = chain.get_buffer
    torch.testing.assert_close(get("betas"), torch.from_numpy(betas), rtol=0, atol=0)
    assert (get("alphas_cumprod").diff() < 0).all()  # so the signal-to-noise ratio falls
    assert (get("betas") >= get("posterior_variance")).all()
    for table in chain.buffers():
        assert table.shape == (num_timesteps,)
        assert table.isfinite().all()
        assert table.dtype is torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_tables_agree_with_their_names(name: str) -> None:
    betas = get_named_beta_schedule(name, 40)
    found = {key: value.numpy() for key, value in tables(betas).items()}
    ac = np.cumprod(1 - betas)
    before, after = np.append(1.0, ac[:-1]), np.append(ac[1:], 0.0)
    variance = betas * (1 - before) / (1 - ac)
    clipped = np.append(variance[1], variance[1:])
    large = np.append(variance[1], betas[1:])
    expected = {
        "betas": betas,
        "log_alphas_cumprod": np.log(ac),
        "alphas_cumprod": ac,
        "alphas_cumprod_prev": before,
        "alphas_cumprod_next": after,
        "sqrt_alphas_cumprod": np.sqrt(ac),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - ac),
        "log_one_minus_alphas_cumprod": np.log(1 - ac),
        "sqrt_recip_alphas_cumprod": 1 / np.sqrt(ac),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / ac - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(clipped),
        "posterior_mean_coef1": betas * np.sqrt(before) / (1 - ac),
        "posterior_mean_coef2": (1 - before) * np.sqrt(1 - betas) / (1 - ac),
        "log_betas": np.log(betas),
        "fixed_large_variance": large,
        "fixed_large_log_variance": np.log(large),
    }
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-9, atol=1e-13, err_msg=key)


@pytest.mark.parametrize("num_timesteps", [1, 2])
def test_the_clipped_log_variance_of_the_shortest_chains(num_timesteps: int) -> None:
    betas = cosine_betas(num_timesteps)
    found = tables(betas)
    variance = found["posterior_variance"][1].item() if num_timesteps == 2 else betas[0]
    assert found["posterior_log_variance_clipped"][0].item() == pytest.approx(math.log(variance))
    assert found["fixed_large_log_variance"][0].item() == pytest.approx(math.log(variance))


@pytest.mark.parametrize("name", ["cosine", "linear", "log-snr-linear"])
def test_small_noise_is_exact_to_float64(name: str) -> None:
    """float32 schedules are wrong by 3e-3 here."""
    betas = get_named_beta_schedule(name, 4000)
    found = tables(betas)
    with mpmath.workdps(50):
        log_bar = mpmath.mpf(0)
        bars = []
        for beta in betas[:40]:
            log_bar += mpmath.log1p(-mpmath.mpf(float(beta)))
            bars.append(-mpmath.expm1(log_bar))
        sigma = [float(mpmath.sqrt(bar)) for bar in bars]
        variance = [float(mpmath.mpf(float(betas[t])) * bars[t - 1] / bars[t]) for t in range(1, len(bars))]
    np.testing.assert_allclose(found["sqrt_one_minus_alphas_cumprod"][:40].numpy(), sigma, rtol=1e-14)
    np.testing.assert_allclose(found["posterior_variance"][1:40].numpy(), variance, rtol=1e-14)


def test_cosine_first_noise_is_exact_to_float64() -> None:
    """The betas themselves come from 1 minus a ratio of cosines."""
    with mpmath.workdps(50):
        step, offset = mpmath.mpf(1) / 4000, mpmath.mpf(0.008)

        def bar(u: mpmath.mpf) -> mpmath.mpf:
            return mpmath.cos((u + offset) / (1 + offset) * mpmath.pi / 2) ** 2

        expected = float(1 - bar(step) / bar(mpmath.mpf(0)))
    assert cosine_betas(4000)[0] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_timesteps", [2, 10, 1000])
def test_zero_terminal_snr_keeps_the_first_and_empties_the_last(name: str, num_timesteps: int) -> None:
    betas = get_named_beta_schedule(name, num_timesteps)
    rescaled = zero_terminal_snr(betas)
    root, expected = np.sqrt(np.cumprod(1 - rescaled)), np.sqrt(np.cumprod(1 - betas))
    expected = (expected - expected[-1]) * expected[0] / (expected[0] - expected[-1])
    np.testing.assert_allclose(root, expected, rtol=1e-9, atol=1e-12)
    assert rescaled[0] == betas[0]
    assert rescaled[-1] == 1.0
    assert tables(rescaled)["alphas_cumprod"][-1].item() == 0.0


def test_zero_terminal_snr_needs_two_steps() -> None:
    with pytest.raises(ArgumentError, match="at least 2 timesteps, got 1"):
        zero_terminal_snr(linear_betas(1))


def test_epsilon_refuses_zero_terminal_snr() -> None:
    with pytest.raises(ArgumentError, match="EPSILON does not determine x_0"):
        diffusion(zero_terminal_snr(linear_betas(10)), ModelMeanType.EPSILON)


@pytest.mark.parametrize(
    "mean_type", [ModelMeanType.VELOCITY, ModelMeanType.START_X, ModelMeanType.PREVIOUS_X]
)
@pytest.mark.parametrize("steps", [None, 4, 1])
def test_other_means_recover_x_start_from_pure_noise(mean_type: ModelMeanType, steps: int | None) -> None:
    chain = diffusion(zero_terminal_snr(linear_betas(40)), mean_type)
    if steps is not None:
        chain = chain.respaced(space_timesteps(40, steps))
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.rand(2, 3, 5, dtype=torch.float64, generator=generator) * 2 - 1).unbind()
    for t in (chain.num_timesteps - 1, torch.full((3,), chain.num_timesteps - 1)):
        x_t = chain.q_sample(x, t, noise)
        torch.testing.assert_close(x_t, noise, rtol=0, atol=0)
        target = chain.floats["target_xstart"][-1] * x + chain.floats["target_eps"][-1] * noise
        found = chain.p_mean_variance(lambda x, t, target=target: target, x_t, t)
        torch.testing.assert_close(found["pred_xstart"], x, rtol=0, atol=1e-9)
        assert (
            chain.training_losses(lambda x, t, target=target: target, x, t, noise=noise)["loss"].max() < 1e-20
        )
    assert chain.calc_bpd_loop(lambda x, t: x, x)["total_bpd"].isfinite().all()
    assert chain.prior_bpd(x).tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([], "at least one number, got shape \\(0,\\)"),
        ([[0.1]], "got shape \\(1, 1\\)"),
        ([0.1, 0.0], "got 0.0 at index 1"),
        ([1.0, 0.1], "got 1.0 at index 0"),
        ([0.1, 1.1], "got 1.1 at index 1"),
        ([-0.1], "got -0.1 at index 0"),
        ([0.1, float("nan")], "got nan at index 1"),
    ],
)
def test_betas_out_of_range_are_refused(betas: list[float], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        GaussianDiffusion(betas=betas)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_betas_may_be_any_vector(kind: type) -> None:
    assert GaussianDiffusion(betas=kind([0.1, 0.2])).num_timesteps == 2


def test_unknown_names_and_lengths_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"schedule must be one of linear, .*, got 'quadratic'"):
        get_named_beta_schedule("quadratic", 10)
    with pytest.raises(ArgumentError, match="num_timesteps must be at least 1, got 0"):
        get_named_beta_schedule("cosine", 0)
