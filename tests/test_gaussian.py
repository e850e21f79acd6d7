"""Gaussian likelihoods and divergences, against 50 digits of mpmath."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perrin.errors import ArgumentError
from perrin.gaussian import discretized_gaussian_log_likelihood, normal_kl, normal_log_likelihood

mpmath.mp.dps = 50


def level_value(index: int, levels: int = 256) -> float:
    return 2 * index / (levels - 1) - 1


def exact(x: float, mean: float, log_scale: float, index: int, levels: int) -> tuple[float, float, float]:
    """log p of the bin and its derivatives by mean and log-scale, in mpmath.

    Everything is taken of the upper tail Q, on the side where it is small, so that 50 digits are enough.
    """
    mp = mpmath.mpf
    sigma = mpmath.exp(mp(log_scale))
    low = -mpmath.inf if index == 0 else (mp(x) - mp(1) / (levels - 1) - mp(mean)) / sigma
    high = mpmath.inf if index == levels - 1 else (mp(x) + mp(1) / (levels - 1) - mp(mean)) / sigma

    def upper(z: mpmath.mpf) -> mpmath.mpf:
        return mpmath.erfc(z / mpmath.sqrt(2)) / 2

    def density(z: mpmath.mpf) -> mpmath.mpf:
        return mp(0) if mpmath.isinf(z) else mpmath.npdf(z)

    def moment(z: mpmath.mpf) -> mpmath.mpf:
        return mp(0) if mpmath.isinf(z) else z * mpmath.npdf(z)

    p = upper(low) - upper(high) if low > -high else upper(-high) - upper(-low)
    log_p = mpmath.log(p) if p < 0.5 else mpmath.log1p(-upper(high) - upper(-low))
    by_mean = (density(low) - density(high)) / sigma / p
    by_log_scale = (moment(low) - moment(high)) / p
    return float(log_p), float(by_mean), float(by_log_scale)


def evaluated(
    x: list[float], mean: list[float], log_scale: list[float], dtype: torch.dtype, levels: int = 256
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values and the derivatives by x, mean and log-scale."""
    inputs = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in (x, mean, log_scale)]
    value = discretized_gaussian_log_likelihood(
        inputs[0], means=inputs[1], log_scales=inputs[2], levels=levels
    )
    gradients = torch.autograd.grad(value.sum(), inputs)
    return value.detach(), *gradients


def cases(count: int, seed: int, levels: int) -> list[tuple[int, float, float]]:
    """(index, mean, log-scale) from the bulk to the far tail, every fourth at an end."""
    generator = np.random.default_rng(seed)
    found = []
    for i in range(count):
        index = [0, levels - 1][i // 4 % 2] if i % 4 == 0 else int(generator.integers(levels))
        log_scale = float(generator.uniform(-9.5, 1.5))
        if i % 2:  # a mean some standard deviations away
            distance = float(generator.normal() * 10 ** generator.uniform(-1, 1.5)) * math.exp(log_scale)
        else:  # or anywhere
            distance = float(generator.uniform(-2.5, 2.5))
        found.append((index, level_value(index, levels) + distance, log_scale))
    return found


@pytest.mark.parametrize(
    ("index", "mean", "sigma", "expected"),
    [
        (128, 0.0, 0.1, -3.46549463114),
        (0, -0.9, 0.05, -3.59976919360),
        (255, 0.5, 0.01, -1235.29254378),
        (10, 0.5, 0.01, -10054.4890739),
        (37, -0.70, 0.001, -20.0189940850),
    ],
)
def test_known_values_of_the_decoder(index: int, mean: float, sigma: float, expected: float) -> None:
    value = discretized_gaussian_log_likelihood(
        torch.tensor(level_value(index), dtype=torch.float64),
        means=torch.tensor(mean, dtype=torch.float64),
        log_scales=torch.tensor(math.log(sigma), dtype=torch.float64),
    )
    assert value.item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("levels", [2, 17, 256, 65536])
def test_values_and_gradients_match_50_digits(dtype: torch.dtype, tolerance: float, levels: int) -> None:
    drawn = cases(120, levels, levels)
    columns = [
        torch.tensor(column, dtype=dtype).double()
        for column in (
            [level_value(index, levels) for index, _, _ in drawn],
            [mean for _, mean, _ in drawn],
            [log_scale for _, _, log_scale in drawn],
        )
    ]
    truth = torch.tensor(
        [exact(*(column[i].item() for column in columns), drawn[i][0], levels) for i in range(len(drawn))],
        dtype=torch.float64,
    )
    value, by_x, by_mean, by_log_scale = evaluated(*(c.tolist() for c in columns), dtype, levels)
    smallest = torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(value.double(), truth[:, 0], rtol=tolerance, atol=1e-7 * smallest)
    torch.testing.assert_close(by_x, -by_mean, rtol=0, atol=0)
    gradient_tolerance = 1e-7 if dtype is torch.float64 else 3e-7
    # A derivative may pass through 0, where its error is measured against what it is the difference of.
    scale = torch.exp(-columns[2])
    floor = {"by_mean": 1e-13 * scale, "by_log_scale": torch.full_like(scale, 1e-13)}
    for name, found, expected in (
        ("by_mean", by_mean, truth[:, 1]),
        ("by_log_scale", by_log_scale, truth[:, 2]),
    ):
        error = (found.double() - expected).abs() - floor[name]
        worst = (error / expected.abs().clamp(min=smallest)).max().item()
        assert worst < gradient_tolerance, f"{name}: relative error {worst}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_far_tail_to_minus_5e7_nats(dtype: torch.dtype) -> None:
    means = [0.5, 1.0, 0.5, -1.0, 2.0, 1.0]
    indices = [10, 0, 0, 255, 128, 1]
    log_scales = [math.log(0.01), math.log(2e-4), math.log(1.5e-4), math.log(2e-4), math.log(3e-4), -9.0]
    columns = [
        torch.tensor(v, dtype=dtype).tolist() for v in ([level_value(i) for i in indices], means, log_scales)
    ]
    truth = torch.tensor(
        [exact(*(c[i] for c in columns), indices[i], 256) for i in range(len(indices))], dtype=torch.float64
    )
    assert truth[1, 0] < -4.9e7
    value, _, by_mean, by_log_scale = evaluated(*columns, dtype)
    rtol = 1e-12 if dtype is torch.float64 else 1e-7
    torch.testing.assert_close(value.double(), truth[:, 0], rtol=rtol, atol=0)
    torch.testing.assert_close(by_mean.double(), truth[:, 1], rtol=rtol, atol=0)
    torch.testing.assert_close(by_log_scale.double(), truth[:, 2], rtol=rtol, atol=0)


def total_probability(levels: int, dtype: torch.dtype, sigmas: list[float]) -> Tensor:
    """The sum over all levels, for means in, at the end of and outside the range."""
    x = torch.linspace(-1, 1, levels, dtype=torch.float64).to(dtype)[None]
    means = torch.tensor([-1.0, -0.3, 0.0, 0.99, 1.5, -40.0], dtype=dtype)[:, None, None]
    log_scales = torch.tensor(sigmas, dtype=dtype).log()[None, :, None]
    log_p = discretized_gaussian_log_likelihood(x, means=means, log_scales=log_scales, levels=levels)
    return log_p.double().exp().sum(-1)


@pytest.mark.parametrize("levels", [2, 3, 17, 256, 65536])
def test_all_bins_sum_to_one(levels: int) -> None:
    total = total_probability(levels, torch.float64, [1e-4, 1e-3, 0.02, 0.3, 1.0, 50.0])
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
def test_all_bins_sum_to_one_in_float32(levels: int) -> None:
    """The levels themselves lie up to 3e-8 beside their places, of 1e-3 here."""
    total = total_probability(levels, torch.float32, [1e-3, 0.02, 0.3, 1.0, 50.0])
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    index=st.integers(0, 255),
    mean=st.floats(-50, 50),  # log p reaches -1e38 there, about what float32 can hold
    log_scale=st.one_of(st.floats(-40, 40), st.sampled_from([-40.0, 40.0, -39.9, 0.0])),
    double=st.booleans(),
)
def test_never_nan_or_infinite(index: int, mean: float, log_scale: float, double: bool) -> None:
    dtype = torch.float64 if double else torch.float32
    outcome = evaluated([level_value(index)], [mean], [log_scale], dtype)
    assert all(bool(tensor.isfinite().all()) for tensor in outcome)
    assert outcome[0].item() <= 0


def test_extreme_scales_with_the_mean_on_the_level_and_its_edges() -> None:
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean_shift in (0.0, 1 / 255, -1 / 255):
        for log_scale in (-40.0, 40.0):
            outcome = evaluated(x.tolist(), (x + mean_shift).tolist(), [log_scale] * 256, torch.float64)
            assert all(bool(tensor.isfinite().all()) for tensor in outcome)


def test_gradient_does_not_die_12_levels_off() -> None:
    value, _, by_mean, _ = evaluated(
        [level_value(140)], [level_value(128)], [math.log(0.00224)], torch.float64
    )
    assert value.item() < -800  # a clamp at 1e-12 would give -27.6
    assert by_mean.item() > 1e4


def test_open_bins_reach_to_infinity() -> None:
    value = discretized_gaussian_log_likelihood(
        torch.tensor([-1.0, 1.0]), means=torch.tensor([-30.0, 30.0]), log_scales=torch.zeros(2)
    )
    torch.testing.assert_close(value, torch.zeros(2), rtol=0, atol=1e-30)


def test_gradcheck_of_the_decoder() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-1, 1, 17, dtype=torch.float64).repeat(3)
    means = (torch.rand(51, dtype=torch.float64, generator=generator) * 2 - 1).requires_grad_()
    log_scales = torch.linspace(-4, 1, 51, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m, s: discretized_gaussian_log_likelihood(x, means=m, log_scales=s, levels=17),
        (means, log_scales),
        rtol=1e-5,
    )


def test_decoder_broadcasts_and_reduces_gradients_to_each_argument() -> None:
    x = torch.linspace(-1, 1, 17, dtype=torch.float64).expand(2, 3, 17)
    means = torch.full((3, 1), 0.1, dtype=torch.float64, requires_grad=True)
    log_scales = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    value = discretized_gaussian_log_likelihood(x, means=means, log_scales=log_scales, levels=17)
    value.sum().backward()
    assert value.shape == (2, 3, 17)
    assert means.grad is not None
    assert means.grad.shape == (3, 1)
    assert log_scales.grad is not None
    assert log_scales.grad.shape == ()


def test_decoder_keeps_the_dtype_of_the_means() -> None:
    x = torch.zeros(3, dtype=torch.float64)
    value = discretized_gaussian_log_likelihood(x, means=torch.zeros(3), log_scales=torch.zeros(3), levels=3)
    assert value.dtype is torch.float32


def test_tanh_saturates_where_published_numbers_did() -> None:
    x = torch.tensor([level_value(255), level_value(10), level_value(140)], dtype=torch.float64)
    means = torch.tensor([0.5, 0.5, level_value(128)], dtype=torch.float64)
    log_scales = torch.tensor([0.01, 0.01, 0.00224], dtype=torch.float64).log()
    value = discretized_gaussian_log_likelihood(x, means=means, log_scales=log_scales, approximation="tanh")
    torch.testing.assert_close(
        value, torch.full((3,), math.log(1e-12), dtype=torch.float64), rtol=1e-12, atol=0
    )
    assert math.log(1e-12) == pytest.approx(-27.631, abs=1e-3)


def test_tanh_has_the_known_error_of_its_cdf() -> None:
    """With two levels the lowest bin is the CDF itself."""
    z = torch.linspace(-6, 6, 24001, dtype=torch.float64)
    values = [
        discretized_gaussian_log_likelihood(
            -torch.ones_like(z), means=-z, log_scales=torch.zeros_like(z), levels=2, approximation=kind
        ).exp()
        for kind in ("tanh", "exact")
    ]
    error = (values[0] - values[1]).abs()
    assert error.max().item() == pytest.approx(1.79e-4, rel=5e-3)
    assert abs(z[error.argmax()].item()) == pytest.approx(2.59, abs=0.01)


def test_tanh_is_close_to_exact_in_the_bulk_for_any_number_of_levels() -> None:
    for levels in (2, 17, 256):
        x = torch.linspace(-1, 1, levels, dtype=torch.float64)
        arguments = {"means": torch.full_like(x, 0.1), "log_scales": torch.full_like(x, 0.0)}
        tanh = discretized_gaussian_log_likelihood(x, **arguments, levels=levels, approximation="tanh")
        truth = discretized_gaussian_log_likelihood(x, **arguments, levels=levels)
        torch.testing.assert_close(tanh, truth, rtol=0, atol=2e-3)
        assert tanh.exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("levels", [1, 0, -3])
def test_fewer_than_two_levels_are_refused(levels: int) -> None:
    one = torch.zeros(1)
    with pytest.raises(ArgumentError, match=f"levels must be at least 2, got {levels}"):
        discretized_gaussian_log_likelihood(one, means=one, log_scales=one, levels=levels)


def test_another_approximation_is_refused() -> None:
    one = torch.zeros(1)
    with pytest.raises(ArgumentError, match="approximation must be 'exact' or 'tanh', got 'erf'"):
        discretized_gaussian_log_likelihood(one, means=one, log_scales=one, approximation="erf")


def exact_kl(m1: float, v1: float, m2: float, v2: float) -> float:
    mp = mpmath.mpf
    with mpmath.workdps(700):  # enough for the difference of any two floats above 1e-300
        difference = mp(v1) - mp(v2)
        kl = mpmath.exp(difference) - 1 - difference + (mp(m1) - mp(m2)) ** 2 * mpmath.exp(-mp(v2))
        return float(kl / 2)


@pytest.mark.parametrize(
    "arguments",
    [
        (0.0, 0.0, 0.0, 0.0),
        (0.3, -1.0, -0.2, 0.5),
        (1.0, -9.0, 1.0, -9.0 + 1e-9),
        (0.0, -2.4e-9, 0.0, 0.0),
        (0.0, 1e-5, 0.0, 0.0),
        (0.0, 0.2499, 0.0, 0.0),
        (0.0, 0.2501, 0.0, 0.0),
        (0.0, -0.2501, 0.0, 0.0),
        (0.0, -0.2499, 0.0, 0.0),
        (0.0, 30.0, 0.0, -20.0),
        (5.0, -30.0, -5.0, 10.0),
    ],
)
def test_kl_of_floats_matches_50_digits(arguments: tuple[float, float, float, float]) -> None:
    found = normal_kl(*arguments)
    assert found.dtype is torch.float64
    assert found.item() == pytest.approx(exact_kl(*arguments), rel=1e-13, abs=0)


@settings(max_examples=100, deadline=None)
@given(
    m1=st.floats(-3, 3),
    m2=st.floats(-3, 3),
    v1=st.floats(-10, 10),
    step=st.one_of(st.floats(-10, 10), st.floats(-1e-6, 1e-6)),
)
def test_kl_is_exact_and_never_negative(m1: float, m2: float, v1: float, step: float) -> None:
    found = normal_kl(torch.tensor(m1, dtype=torch.float64), v1, m2, v1 + step).item()
    assert found >= 0
    assert found == pytest.approx(exact_kl(m1, v1, m2, v1 + step), rel=1e-13, abs=1e-300)


def test_kl_gradient_across_the_series() -> None:
    v1 = torch.tensor(
        [-3.0, -0.3, -0.2501, -0.2499, -1e-4, 0.0, 1e-9, 0.1, 0.2499, 0.2501, 2.0], dtype=torch.float64
    )
    inputs = [
        torch.tensor(0.3, dtype=torch.float64),
        v1,
        torch.tensor(-0.1, dtype=torch.float64),
        torch.tensor(0.0, dtype=torch.float64),
    ]
    for tensor in inputs:
        tensor.requires_grad_()
    by_m1, by_v1, by_m2, by_v2 = torch.autograd.grad(normal_kl(*inputs).sum(), inputs)
    values = v1.detach()
    torch.testing.assert_close(by_v1, 0.5 * torch.expm1(values), rtol=1e-12, atol=0)
    torch.testing.assert_close(by_m1, torch.tensor(0.4 * len(v1), dtype=torch.float64))
    torch.testing.assert_close(by_m2, -by_m1)
    torch.testing.assert_close(by_v2, (0.5 * (1 - values.exp() - 0.4**2)).sum())


def test_kl_floats_take_the_dtype_of_the_tensor() -> None:
    assert normal_kl(torch.zeros(2), -0.1, 0.0, 0.0).dtype is torch.float32
    assert normal_kl(0.0, 0.0, torch.zeros(2, 3), 0.0).shape == (2, 3)


def test_normal_log_likelihood_is_the_normal_density() -> None:
    generator = torch.Generator().manual_seed(0)
    x, means, log_scales = torch.randn(3, 200, dtype=torch.float64, generator=generator) * 3
    expected = torch.distributions.Normal(means, log_scales.exp()).log_prob(x)
    found = normal_log_likelihood(x, means=means, log_scales=log_scales)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
