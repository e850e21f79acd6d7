"""The probability-flow ODE: exact on data with a known density, its solvers' orders, its traces and its calls."""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

from ideal import (
    FINE,
    GAUSSIAN,
    LN2,
    MIXTURE,
    Ideal,
    chain,
    first_noise,
    flow_nll_bpd,
    measure,
    noisy_nll_bpd,
)
from perrin import GaussianDiffusion
from perrin.likelihood.flow import Exact, Hutchinson, Timeline, rademacher
from perrin.likelihood.solvers import Adaptive, Heun, Solver
from perrin.oracles import GaussianData, MixtureData, normal
from perrin.parameterization import Denoised


@dataclass(frozen=True)
class Linear:
    """Gaussian data N(0, covariance), whose denoiser has a Jacobian that is not diagonal."""

    covariance: Tensor
    diffusion: GaussianDiffusion = FINE

    def __call__(self, x: Tensor, t: float) -> Denoised:
        alpha, sigma = self.schedule(t)
        total = alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.covariance))
        x_start = alpha * x @ torch.linalg.solve(total, self.covariance)
        return Denoised(x_start, lambda: (x - alpha * x_start) / sigma)

    def schedule(self, t: float) -> tuple[float, float]:
        return Ideal(GAUSSIAN, self.diffusion).schedule(t)

    def nll_bpd(self, x: Tensor) -> Tensor:
        """Of the data with the noise of the first timestep."""
        alpha, sigma = self.schedule(0)
        noisy = self.covariance + (sigma / alpha) ** 2 * torch.eye(len(self.covariance))
        density = torch.distributions.MultivariateNormal(torch.zeros(x.shape[1]).double(), noisy)
        return -density.log_prob(x) / (x.shape[1] * LN2)


CORRELATED = Linear(torch.tensor([[0.4, 0.2, 0.1], [0.2, 0.3, -0.1], [0.1, -0.1, 0.2]], dtype=torch.float64))


def error_of(denoise: Ideal, x: Tensor, solver: Solver) -> float:
    """The largest error of an image in bits per dimension."""
    s = first_noise(denoise)
    return float((measure(denoise, x, solver).bpd - noisy_nll_bpd(denoise.data, x, s)).abs().max())


# Known densities


@pytest.mark.parametrize("name", ["linear", "cosine", "log-snr-linear"])
@pytest.mark.parametrize("solver", [Heun(600), Adaptive(1e-7, 1e-7)])
def test_gaussian_data_have_their_log_density_with_both_scale_terms(name: str, solver: Solver) -> None:
    diffusion, x = chain(name), GAUSSIAN.draw(4, 2, 3)
    result = measure(Ideal(GAUSSIAN, diffusion), x, solver)
    torch.testing.assert_close(result.bpd, flow_nll_bpd(diffusion, x), rtol=0, atol=5e-4)
    if name == "cosine":  # the only one of them that ends in noise
        s = first_noise(Ideal(GAUSSIAN, diffusion))
        torch.testing.assert_close(result.bpd, noisy_nll_bpd(GAUSSIAN, x, s), rtol=0, atol=6e-4)


def test_a_mixture_has_its_log_density() -> None:
    assert error_of(Ideal(MIXTURE), normal(5, 3) * 0.5, Adaptive(1e-6, 1e-6)) < 1e-4


@pytest.mark.parametrize(("data", "best"), [(GAUSSIAN, 5e-3), (MIXTURE, 0.012)])
def test_heun_is_of_order_2(data: GaussianData | MixtureData, best: float) -> None:
    denoise, x = Ideal(data), normal(6, 1) * 0.5
    exact = measure(denoise, x, Adaptive(1e-9, 1e-9)).bpd
    errors = [float((measure(denoise, x, Heun(n)).bpd - exact).abs().max()) for n in (50, 100, 200)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([2, 2], abs=0.15)
    assert errors[-1] < best


def test_the_adaptive_pair_is_as_exact_as_its_tolerance_and_costs_more_for_more() -> None:
    x, results = normal(6, 1) * 0.5, {}
    for tolerance in (1e-3, 1e-5, 1e-7):
        denoise = Ideal(MIXTURE)
        results[tolerance] = error_of(denoise, x, Adaptive(tolerance, tolerance)), denoise.calls
        assert results[tolerance][0] < 100 * tolerance
    errors, calls = zip(*results.values(), strict=True)
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert calls[0] < calls[1] < calls[2]


@pytest.mark.parametrize("options", [{"rtol": 0.0, "atol": 1e-2}, {"rtol": 1e-2, "atol": 1e-9}])
def test_both_tolerances_count(options: dict[str, float]) -> None:
    tight = {"rtol": 1e-5, "atol": 1e-5}
    calls = [
        measure(Ideal(MIXTURE), normal(3, 1), Adaptive(**o)).network_calls
        for o in (options, {name: min(value, 1e-5) for name, value in options.items()}, tight)
    ]
    assert calls[0] < min(calls[1:])


def test_torchdiffeq_agrees() -> None:
    denoise, x = Ideal(MIXTURE), normal(3, 2) * 0.4
    times = Timeline.of(denoise)

    def slopes(u: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        t = times.time(min(float(u), times.last))
        alpha, sigma = denoise.schedule(t)
        with torch.enable_grad():
            y = state[0].detach().requires_grad_()
            eps = denoise(alpha * y, t).eps
            trace = torch.autograd.grad(eps.sum(), y)[0].sum(1)  # the dimensions are independent
        return sigma / alpha * eps.detach(), sigma / alpha * trace

    span = torch.tensor([times.first, times.last], dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    y, growth = (part[-1] for part in odeint(slopes, (x, zero), span, rtol=1e-8, atol=1e-8, method="dopri5"))
    alpha = denoise.schedule(denoise.diffusion.num_timesteps - 1)[0]
    end = torch.distributions.Normal(0, 1).log_prob(alpha * y).sum(1) + 2 * math.log(alpha) + growth
    ours = measure(denoise, x, Adaptive(1e-8, 1e-8), trace=Exact()).bpd
    torch.testing.assert_close(ours, -end / (2 * LN2), rtol=0, atol=1e-6)


# Traces


def test_rademacher_probes_are_exact_for_a_diagonal_jacobian() -> None:
    x = normal(3, 2, 2) * 0.5
    probed = measure(Ideal(MIXTURE), x, trace=Hutchinson(3))
    exact = measure(Ideal(MIXTURE), x, trace=Exact())
    torch.testing.assert_close(probed.bpd, exact.bpd, rtol=0, atol=1e-12)
    assert float(probed.error.max()) < 1e-12


def test_the_exact_trace_sees_correlations() -> None:
    x = normal(4, 3) * 0.5
    result = measure(CORRELATED, x, Adaptive(1e-8, 1e-8), trace=Exact())
    torch.testing.assert_close(result.bpd, CORRELATED.nll_bpd(x), rtol=0, atol=1e-4)
    assert result.error.tolist() == result.probe_error.tolist() == [0.0] * 4
    assert result.probes == 0


def test_the_mean_over_probes_is_the_exact_trace_within_its_error() -> None:
    x = (normal(1, 3) * 0.5).expand(200, 3)
    exact = measure(CORRELATED, x[:1], trace=Exact()).bpd
    result = measure(CORRELATED, x, trace=Hutchinson(8))
    assert float(result.error.square().mean() / result.bpd.var()) == pytest.approx(1, abs=0.3)
    assert abs(float((result.bpd - exact).mean() / result.bpd.std())) < 4 / math.sqrt(200)
    assert torch.equal(result.error, result.probe_error)
    assert result.probes == 8


def test_probes_are_even_and_independent_signs() -> None:
    signs = rademacher(torch.empty(2, 20_000), ("probe", 0), [3, 4])
    assert signs.abs().unique().tolist() == [1.0]
    for mean in (*signs.mean(1).tolist(), float((signs[0] * signs[1]).mean())):
        assert abs(mean) < 4 / math.sqrt(20_000)


def test_a_single_probe_has_no_error() -> None:
    assert bool(measure(CORRELATED, normal(2, 3), trace=Hutchinson(1)).error.isnan().all())


def test_probes_depend_on_the_seed_the_image_and_the_probe() -> None:
    x, indices = (
        normal(1, 3).expand(12, 3),
        [5, *range(5, 16)],
    )  # of 8 probes, 2 and 2 are alike up to their sign
    first = measure(CORRELATED, x, indices=indices, seed=1).bpd
    assert first[0] == first[1]
    assert len(set(first.tolist())) > 1
    assert not torch.equal(first, measure(CORRELATED, x, indices=indices, seed=2).bpd)
    assert bool((measure(CORRELATED, x, trace=Hutchinson(4)).error > 0).all())


@pytest.mark.parametrize("solver", [Heun(10), Adaptive(1e-4, 1e-4)])
@pytest.mark.parametrize("trace", [Hutchinson(2), Exact()])
def test_an_image_is_measured_alike_in_any_batch(solver: Solver, trace: Hutchinson | Exact) -> None:
    x = (
        torch.cat([normal(3, 2, 2), torch.full((1, 2, 2), 0.35)])
        * torch.tensor([0.1, 0.4, 1.5, 1])[:, None, None]
    )
    whole = measure(Ideal(MIXTURE), x, solver, trace=trace, indices=[3, 1, 4, 8])
    for i, index in enumerate([3, 1, 4, 8]):
        alone = measure(Ideal(MIXTURE), x[i : i + 1], solver, trace=trace, indices=[index])
        torch.testing.assert_close(alone.bpd[0], whole.bpd[i], rtol=0, atol=1e-12)
        assert alone.network_calls <= whole.network_calls
