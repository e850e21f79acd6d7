"""The ODE's bits of whole levels: what each dequantization costs, against toys whose bits are known."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from ideal import Ideal
from perrin.likelihood.dequantization import Dequantization, TruncatedNormal, Uniform
from perrin.likelihood.flow import Exact, Hutchinson
from perrin.likelihood.ode import OdeLikelihood, ode
from perrin.likelihood.solvers import Heun
from perrin.oracles import GaussianData, MixtureData

FIRST = math.exp(-4.5)
LEVELS, PROBABILITIES = 3, (0.5, 0.25, 0.25)
HALF_BIN = 0.5
TOY = MixtureData(means=(-1.0, -1.0, 0.0, 1.0), std=0.0)
"""The three levels with their probabilities: the model's density is three spikes, as wide as the noise."""


def measure(
    x: Tensor, dequantization: Dequantization, levels: int = LEVELS, **options: object
) -> OdeLikelihood:
    data = options.pop("data", TOY)
    arguments = {"indices": range(len(x)), "trace": Exact(), "solver": Heun(200)} | options
    return ode(Ideal(data), x, levels=levels, dequantization=dequantization, **arguments)


def spikes(y: Tensor, s: float) -> Tensor:
    """The toy's density with noise ``s``."""
    parts = [torch.distributions.Normal(mean, s).log_prob(y).exp() for mean in TOY.means]
    return torch.stack(parts).mean(0)


def bin_bits(s: float) -> Tensor:
    """-log2 of the probability of each level's bin under the toy's density with noise ``s``."""
    mass = []
    for level in (-1.0, 0.0, 1.0):
        grid = torch.linspace(level - HALF_BIN, level + HALF_BIN, 4001, dtype=torch.float64)
        mass.append(torch.trapezoid(spikes(grid, s), grid))
    return -torch.stack(mass).log2()


EACH_LEVEL = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)


def test_truncated_normal_noise_gives_the_bits_of_narrow_levels() -> None:
    x = torch.tensor([[-1.0, -1.0], [-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    result = measure(x, TruncatedNormal())
    torch.testing.assert_close(result.bpd, torch.tensor([1.0, 1.5, 2.0]).double(), rtol=0, atol=2e-2)
    assert result.dequantization == "truncated-normal"
    assert result.start == pytest.approx(FIRST)


@pytest.mark.parametrize("dequantization", [Uniform, TruncatedNormal])
@pytest.mark.parametrize("half_bins", [0.5, 0.9])
def test_the_bound_is_the_mean_over_the_bin(dequantization: type[Dequantization], half_bins: float) -> None:
    s, n = half_bins * HALF_BIN, 64
    q = stats.truncnorm(-1 / half_bins, 1 / half_bins, scale=s) if dequantization is TruncatedNormal else None
    x = EACH_LEVEL.repeat_interleave(n, 0)
    result = measure(x, dequantization(start=s)).bpd.reshape(3, n)
    grid = torch.linspace(-HALF_BIN, HALF_BIN, 2001, dtype=torch.float64)
    weights = torch.ones_like(grid) if q is None else torch.from_numpy(q.pdf(grid))
    for level, found, least in zip((-1.0, 0.0, 1.0), result, bin_bits(s), strict=True):
        gain = spikes(level + grid, s).log2() - weights.log2()
        expected = -float(torch.trapezoid(weights * gain, grid) / torch.trapezoid(weights, grid))
        assert float(found.mean()) == pytest.approx(
            expected, abs=4 * float(found.std()) / math.sqrt(n) + 0.02
        )
        assert expected > float(least)


@pytest.mark.parametrize("dequantization", [Uniform, TruncatedNormal])
def test_weighted_draws_lower_the_bound_towards_the_bits(dequantization: type[Dequantization]) -> None:
    s, x, exact = 0.8 * HALF_BIN, EACH_LEVEL.repeat_interleave(40, 0), bin_bits(0.8 * HALF_BIN)
    mean, weighted = (
        measure(x, dequantization(8, weighted=weighted, start=s), solver=Heun(40))
        for weighted in (False, True)
    )
    assert bool((mean.bpd > weighted.bpd).all())  # Jensen's inequality, of the same draws
    gaps = [result.bpd.reshape(3, 40).mean(1) - exact for result in (mean, weighted)]
    errors = weighted.bpd.reshape(3, 40).std(1) / math.sqrt(40)
    assert bool((gaps[1] > -4 * errors - 2e-3).all())
    assert float(gaps[1].sum()) < 0.5 * float(gaps[0].sum())


@pytest.mark.parametrize(("levels", "bits"), [(65536, math.log2(65535 / 2)), (257, 7.0)])
def test_uniform_noise_costs_the_logarithm_of_the_bins(levels: int, bits: float) -> None:
    data = GaussianData(0.0, 0.5)
    x = torch.tensor([[0.0, 0.5], [-0.5, 0.25]]).double().mul(levels - 1).add(levels - 1).div(2).round()
    x = x * 2 / (levels - 1) - 1
    continuous = ode(Ideal(data), x, levels=None, dequantization=None, indices=range(2), solver=Heun(100))
    result = measure(x, Uniform(), levels, data=data, solver=Heun(100))
    torch.testing.assert_close(result.bpd, continuous.bpd + bits, rtol=0, atol=8 / levels)
    assert result.dequantization == "uniform"
    assert continuous.dequantization == "none"


@pytest.mark.parametrize("noise", [0.01, 0.3, 5.0])
def test_truncated_normal_offsets_are_those_of_scipy(noise: float) -> None:
    uniform = torch.linspace(0, 0.999, 50, dtype=torch.float64).reshape(5, 10)
    offset = TruncatedNormal().offset(uniform, 0.1, noise)
    reference = stats.truncnorm(-0.1 / noise, 0.1 / noise, scale=noise)
    inner = uniform > 1e-3  # SciPy starts at the edge, where a cut beyond 8 deviations makes no difference
    torch.testing.assert_close(offset.value[inner], torch.from_numpy(reference.ppf(uniform))[inner])
    log_density = torch.from_numpy(reference.logpdf(offset.value)).sum(1)
    torch.testing.assert_close(offset.log_density, log_density, rtol=1e-9, atol=1e-9)
    assert float(offset.value.abs().max()) <= 0.1


def test_draws_have_an_error_that_one_draw_has_not() -> None:
    x = EACH_LEVEL.repeat_interleave(30, 0)
    one = measure(x, Uniform(1, start=0.3), solver=Heun(40))
    eight = measure(x, Uniform(8, start=0.3), solver=Heun(40))
    assert bool(one.error.isnan().all())
    assert one.probe_error.tolist() == eight.probe_error.tolist() == [0.0] * 90
    spread = eight.bpd.reshape(3, 30).var(1)
    assert float(eight.error.square().mean() / spread.mean()) == pytest.approx(1, abs=0.4)
    assert (one.draws, eight.draws) == (1, 8)


def test_weighted_draws_have_the_error_of_a_logarithm() -> None:
    x = EACH_LEVEL[1:2].expand(60, 1)
    result = measure(x, TruncatedNormal(16, weighted=True, start=0.4), solver=Heun(40))
    assert float(result.error.square().mean().sqrt() / result.bpd.std()) == pytest.approx(1, abs=0.35)


def test_probes_share_the_error_of_the_draws() -> None:
    """Of a diagonal Jacobian the probes are exact: the draws have all of the error."""
    result = measure(EACH_LEVEL, Uniform(4, start=0.3), trace=Hutchinson(2), solver=Heun(40))
    assert float(result.probe_error.max()) < 1e-12
    assert float(result.error.min()) > 1e-3


def test_an_image_has_its_draws_in_any_batch() -> None:
    whole = measure(EACH_LEVEL, TruncatedNormal(2, start=0.3), indices=[7, 8, 9], seed=3, solver=Heun(40))
    alone = measure(EACH_LEVEL[1:2], TruncatedNormal(2, start=0.3), indices=[8], seed=3, solver=Heun(40))
    torch.testing.assert_close(alone.bpd, whole.bpd[1:2], rtol=0, atol=1e-12)
    other = measure(EACH_LEVEL[1:2], TruncatedNormal(2, start=0.3), indices=[8], seed=4, solver=Heun(40))
    assert float((other.bpd - alone.bpd).abs()) > 1e-6


def test_levels_in_single_precision_are_levels() -> None:
    x = EACH_LEVEL * (2 / 3)  # of 7 levels, not exact in binary
    single, double = (measure(v, Uniform(), 7, solver=Heun(20)).bpd for v in (x.float(), x))
    torch.testing.assert_close(single, double, rtol=0, atol=1e-4)
