"""The probability-flow ODE of networks: every kind of them, what it costs, and what is refused."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from ideal import (
    FINE,
    GAUSSIAN,
    MIXTURE,
    Ideal,
    chain,
    first_noise,
    flow_nll_bpd,
    measure,
    noisy_nll_bpd,
)
from perrin import GaussianDiffusion, ModelMeanType, ModelVarType, get_named_beta_schedule
from perrin.denoiser import DiffusionDenoiser
from perrin.errors import ArgumentError, ShapeError
from perrin.guidance import MeanGuided, ScoreGuided
from perrin.likelihood.dequantization import TruncatedNormal, Uniform
from perrin.likelihood.flow import Exact, Hutchinson, Timeline
from perrin.likelihood.solvers import Adaptive, Heun, Solver
from perrin.networks import UNet
from perrin.oracles import Oracle, arbitrary, normal
from perrin.schedules import zero_terminal_snr

# Networks


@pytest.mark.parametrize("mean_type", ModelMeanType)
def test_every_parameterization_is_measured_on_the_chain_s_own_times(mean_type: ModelMeanType) -> None:
    diffusion, x = chain(total=400, model_mean_type=mean_type), GAUSSIAN.draw(2, 1, 3)
    denoise = DiffusionDenoiser(diffusion, Oracle(GAUSSIAN, diffusion), clip_denoised=False)
    result = measure(denoise, x, Heun(None))
    torch.testing.assert_close(result.bpd, flow_nll_bpd(diffusion, x), rtol=0, atol=3e-3)
    assert result.network_calls == 2 * 399 + 1


def test_a_learned_variance_is_left_aside() -> None:
    plain, learned = chain(), chain(model_var_type=ModelVarType.LEARNED_RANGE)
    x = normal(2, 1, 3)
    one, other = (
        measure(DiffusionDenoiser(diffusion, network, clip_denoised=False), x)
        for diffusion, network in ((plain, arbitrary(1)), (learned, arbitrary(2)))
    )
    assert torch.equal(one.bpd, other.bpd)


def small_unet(**options: object) -> UNet:
    torch.manual_seed(0)
    network = UNet(
        4, 1, 8, channel_mult=(1,), num_res_blocks=1, attention_levels=(0,), num_heads=2, **options
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.requires_grad_(False).eval()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_network_with_attention_has_an_exact_trace(checkpoint: bool) -> None:
    denoise = DiffusionDenoiser(chain(), small_unet(checkpoint=checkpoint), clip_denoised=False)
    x = normal(2, 1, 4, 4).float()
    exact = measure(denoise, x, Heun(1), trace=Exact())
    probed = measure(denoise, x, Heun(1), trace=Hutchinson(16))
    assert bool(((probed.bpd - exact.bpd).abs() < 5 * probed.error).all())
    assert exact.bpd.dtype == torch.float64
    assert exact.vjps == 2 * 16
    assert probed.vjps == 2 * 16


def test_classes_reach_the_network() -> None:
    network, x = small_unet(num_classes=2), normal(1, 1, 4, 4).float().expand(2, 1, 4, 4)
    one, other = (
        measure(
            DiffusionDenoiser(chain(), network, clip_denoised=False, model_kwargs={"y": torch.tensor(y)}),
            x,
            Adaptive(1e-2, 1e-2),
            indices=[0, 0],
        ).bpd
        for y in ([0, 1], [1, 0])
    )
    assert float((one[0] - one[1]).abs()) > 1e-3
    torch.testing.assert_close(one, other.flip(0), rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("solver", [Heun(10), Adaptive(1e-2, 1e-2)])
def test_a_cuda_device_measures_what_the_cpu_does(solver: Solver) -> None:
    x = normal(2, 1, 4, 4).float()
    bpd = [
        measure(
            DiffusionDenoiser(chain().to(device), small_unet().to(device), clip_denoised=False),
            x.to(device),
            solver,
            trace=Exact(),
        ).bpd
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(*bpd, rtol=0, atol=1e-2)


def test_score_guidance_moves_the_density() -> None:
    """The score -x of a unit Gaussian turns N(0, v) into the unnormalised product: another ODE, another density."""
    diffusion, x = chain(), normal(3, 2)
    plain = DiffusionDenoiser(diffusion, Oracle(GAUSSIAN, diffusion), clip_denoised=False)
    solver = Heun(None)
    unguided = measure(plain, x, solver).bpd
    guided = measure(ScoreGuided(plain, lambda x, t: -x), x, solver).bpd
    assert float((guided - unguided).abs().min()) > 0.01
    assert torch.equal(measure(ScoreGuided(plain, lambda x, t: 0 * x), x, solver).bpd, unguided)
    assert torch.equal(measure(MeanGuided(plain, lambda x, t: -x), x, solver).bpd, unguided)


def test_a_chain_that_ends_without_signal_is_followed_to_its_last_step_with_signal() -> None:
    betas = zero_terminal_snr(get_named_beta_schedule("cosine", 60))
    diffusion = GaussianDiffusion(betas=betas, model_mean_type=ModelMeanType.VELOCITY, levels=None)
    denoise, x = Ideal(GAUSSIAN, diffusion), GAUSSIAN.draw(3, 2)
    s = first_noise(denoise)
    assert len(Timeline.of(denoise).log_noise) == 59
    bpd = measure(denoise, x, Adaptive(1e-7, 1e-7)).bpd
    torch.testing.assert_close(bpd, noisy_nll_bpd(GAUSSIAN, x, s), rtol=0, atol=0.01)


def test_times_are_linear_in_log_snr_and_never_before_the_first() -> None:
    denoise = DiffusionDenoiser(chain(total=20), arbitrary(1))
    times = Timeline.of(denoise)
    for t in (0, 0.25, 7, 7.5, 18.9, 19):
        alpha, sigma = denoise.schedule(t)
        assert times.time(math.log(sigma / alpha)) == pytest.approx(t, abs=1e-9)
    seen: list[Tensor] = []
    watched = DiffusionDenoiser(chain(total=20), lambda x, t: (seen.append(t), x)[1])
    measure(watched, normal(1, 2), Adaptive())
    assert min(float(t.min()) for t in seen) == 0
    assert max(float(t.max()) for t in seen) == 19


# Costs and refusals


@pytest.mark.parametrize("solver", [Heun(7), Heun(None), Adaptive(1e-2, 1e-2)])
@pytest.mark.parametrize("draws", [1, 3])
def test_network_calls_and_products_are_counted(solver: Solver, draws: int) -> None:
    denoise = Ideal(MIXTURE)
    x = torch.tensor([[-1.0, 0.0, 1.0]], dtype=torch.float64)
    result = measure(denoise, x, solver, levels=3, dequantization=Uniform(draws), trace=Hutchinson(2))
    assert result.network_calls == denoise.calls
    if isinstance(solver, Heun):
        steps = solver.steps or FINE.num_timesteps - 1
        assert result.network_calls == draws * (2 * steps + 1)
        assert result.vjps == draws * 2 * (steps + 1)
    else:
        assert result.vjps == 2 * result.network_calls


def test_the_caller_s_gradient_mode_does_not_matter() -> None:
    denoise, x = Ideal(MIXTURE), normal(2, 2)
    expected = measure(denoise, x).bpd
    with torch.no_grad():
        assert torch.equal(measure(denoise, x).bpd, expected)
    assert not measure(denoise, x.clone().requires_grad_()).bpd.requires_grad


X = torch.zeros(2, 3, dtype=torch.float64)
REFUSED: list[tuple[dict[str, object], str]] = [
    ({"indices": [1]}, "indices must name 2 images, got 1"),
    ({"levels": 1, "dequantization": Uniform()}, "levels must be at least 2"),
    ({"levels": 3}, "dequantization must be chosen for levels, got None for levels = 3"),
    ({"dequantization": Uniform()}, "dequantization must be None for continuous data"),
    ({"levels": 4, "dequantization": Uniform()}, r"x_start must hold the 4 levels 2 k / 3 - 1"),
    (
        {"levels": 3, "dequantization": Uniform(start=1e-9)},
        r"start must be a sigma/alpha of the chain, from 0\.0",
    ),
    ({"levels": 3, "dequantization": TruncatedNormal(start=1e9)}, "start must be a sigma/alpha of the chain"),
    ({"levels": 3, "dequantization": Uniform(2, weighted=True)}, "weighted draws need the exact trace"),
    ({"solver": Adaptive(max_steps=3)}, "the adaptive solver needs more than 3 steps, at sigma/alpha = "),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_measured_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises((ArgumentError, ShapeError), match=message):
        measure(Ideal(MIXTURE), X, **options)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 3), "x_start must have shape"),
        (torch.zeros(3), "x_start must have shape"),
        (torch.full((1, 2), math.nan), "x_start must be finite"),
        (torch.zeros(1, 2, dtype=torch.int64), "x must be floating-point"),
    ],
)
def test_data_that_are_none_are_refused(x: Tensor, message: str) -> None:
    with pytest.raises((ArgumentError, ShapeError), match=message):
        measure(Ideal(MIXTURE), x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Heun(0), "steps must be at least 1, got 0"),
        (lambda: Hutchinson(0), "probes must be at least 1, got 0"),
        (lambda: Adaptive(atol=0.0), "atol above 0"),
        (lambda: Adaptive(rtol=math.nan), "rtol must be at least 0"),
        (lambda: Adaptive(max_steps=0), "max_steps must be at least 1, got 0"),
        (lambda: Uniform(0), "draws must be at least 1, got 0"),
        (lambda: TruncatedNormal(1, weighted=True), "draws must be at least 2, got 1"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_the_exact_trace_is_refused_above_1024_dimensions() -> None:
    with pytest.raises(ArgumentError, match="at most 1024 dimensions, got 1025: use Hutchinson"):
        measure(Ideal(MIXTURE), torch.zeros(1, 1025), trace=Exact())


@pytest.mark.parametrize("t", [1, 40])
@pytest.mark.parametrize("solver", [Heun(10), Adaptive()])
def test_a_network_that_is_not_finite_is_refused(solver: Solver, t: int) -> None:
    def network(x: Tensor, time: Tensor) -> Tensor:
        return torch.where(time[0] > t, math.nan, 1.0) * x

    with pytest.raises(ArgumentError, match=r"not finite|more than \d+ steps"):
        measure(DiffusionDenoiser(chain(), network, clip_denoised=False), X, solver)


@pytest.mark.parametrize("network", [lambda x, t: x.detach(), torch.no_grad()(lambda x, t: 2 * x)])
def test_a_network_without_gradients_is_refused(network: Callable[..., Tensor]) -> None:
    denoise = partial(DiffusionDenoiser, chain(), clip_denoised=False)
    with pytest.raises(ArgumentError, match="eps has no gradient with respect to x"):
        measure(denoise(network), X)


def test_a_chain_of_one_timestep_is_refused() -> None:
    with pytest.raises(ArgumentError, match="at least 2 timesteps with signal, got 1"):
        measure(DiffusionDenoiser(chain(total=1), arbitrary(1)), X)


def test_previous_x_between_the_steps_is_refused() -> None:
    diffusion = chain(model_mean_type=ModelMeanType.PREVIOUS_X)
    with pytest.raises(ArgumentError, match="PREVIOUS_X network knows whole timesteps only"):
        measure(DiffusionDenoiser(diffusion, arbitrary(1), clip_denoised=False), X, Heun(10))
