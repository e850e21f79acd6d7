"""A diffusion and a network as a denoiser: whole, fractional and clean times."""

import math

import pytest
import torch
from torch import Tensor

from perrin import GaussianDiffusion, ModelMeanType, ModelVarType, get_named_beta_schedule
from perrin.denoiser import DiffusionDenoiser
from perrin.errors import ArgumentError
from perrin.noise import CLEAN
from perrin.oracles import GaussianData, Oracle, arbitrary, normal
from perrin.schedules import zero_terminal_snr

T = 40
CONTINUOUS = [ModelMeanType.EPSILON, ModelMeanType.START_X, ModelMeanType.VELOCITY]


def chain(mean_type: ModelMeanType = ModelMeanType.EPSILON, **options: object) -> GaussianDiffusion:
    return GaussianDiffusion(betas=get_named_beta_schedule("cosine", T), model_mean_type=mean_type, **options)


def exact_level(t: float) -> tuple[float, float]:
    """(alpha, sigma) by the definition: log-SNR linear between whole times."""
    signal = torch.cumprod(1 - torch.from_numpy(get_named_beta_schedule("cosine", T)), 0).tolist()
    log_snr = [math.log(s / (1 - s)) for s in signal]
    low = min(int(t), T - 2)
    mixed = log_snr[low] + (t - low) * (log_snr[low + 1] - log_snr[low])
    return math.sqrt(1 / (1 + math.exp(-mixed))), math.sqrt(1 / (1 + math.exp(mixed)))


@pytest.mark.parametrize("t", [0, 1, 17, T - 1])
def test_whole_times_are_exact(t: int) -> None:
    diffusion = chain()
    denoise = DiffusionDenoiser(diffusion, arbitrary(1))
    expected = float(diffusion.sqrt_alphas_cumprod[t]), float(diffusion.sqrt_one_minus_alphas_cumprod[t])
    assert denoise.schedule(t) == expected
    assert denoise.schedule(float(t)) == expected


@pytest.mark.parametrize("t", [0.25, 0.999, 16.5, T - 2 + 0.5])
def test_fractional_times_lie_between_in_log_snr(t: float) -> None:
    level = DiffusionDenoiser(chain(), arbitrary(1)).schedule(t)
    assert level == pytest.approx(exact_level(t), rel=1e-10)


def test_the_data_itself_is_clean() -> None:
    denoise = DiffusionDenoiser(chain(), arbitrary(1))
    assert denoise.schedule(CLEAN) == (1.0, 0.0)
    assert denoise.schedule(-1.0) == (1.0, 0.0)


def test_tensor_times_give_each_example_its_level() -> None:
    denoise = DiffusionDenoiser(chain(), arbitrary(1))
    alpha, sigma = denoise.schedule(torch.tensor([0, 17, CLEAN]).reshape(3, 1, 1))
    assert isinstance(alpha, Tensor)
    assert isinstance(sigma, Tensor)
    assert alpha.dtype == sigma.dtype == torch.float64
    assert alpha.shape == sigma.shape == (3, 1, 1)
    levels = [denoise.schedule(t) for t in (0, 17, CLEAN)]
    assert list(zip(alpha.flatten().tolist(), sigma.flatten().tolist(), strict=True)) == levels


@pytest.mark.parametrize("t", [-0.5, -2, T, T - 0.5, float("nan")])
def test_times_outside_the_chain_are_refused(t: float) -> None:
    denoise = DiffusionDenoiser(chain(), arbitrary(1))
    for call in (denoise.schedule, lambda t: denoise(normal(1, 2), t)):
        with pytest.raises(ArgumentError, match=f"t must be from 0 to {T - 1}, got"):
            call(t)


def test_the_data_cannot_be_denoised() -> None:
    with pytest.raises(ArgumentError, match="t must be from 0"):
        DiffusionDenoiser(chain(), arbitrary(1))(normal(1, 2), CLEAN)


def test_previous_x_refuses_fractional_times() -> None:
    denoise = DiffusionDenoiser(chain(ModelMeanType.PREVIOUS_X), arbitrary(1))
    assert denoise(normal(1, 2), 3.0).x_start.shape == (1, 2)
    with pytest.raises(ArgumentError, match=r"PREVIOUS_X network knows whole timesteps only, got t = 3\.5"):
        denoise(normal(1, 2), 3.5)


@pytest.mark.parametrize("options", [{}, {"clip_denoised": False}, {"denoised_fn": lambda x: x / 3}])
@pytest.mark.parametrize("mean_type", ModelMeanType)
@pytest.mark.parametrize("t", [0, 17, T - 2])
def test_x_start_and_eps_explain_x(mean_type: ModelMeanType, options: dict[str, object], t: int) -> None:
    denoise = DiffusionDenoiser(chain(mean_type), arbitrary(1), **options)
    x = normal(3, 4)
    for time in (t, t + 0.5) if mean_type in CONTINUOUS else (t,):
        (x_start, eps), (alpha, sigma) = denoise(x, time), denoise.schedule(time)
        torch.testing.assert_close(alpha * x_start + sigma * eps, x, rtol=1e-9, atol=1e-9)
    (x_start, eps), (alpha, sigma) = (
        f(torch.tensor([[t]] * 3)) for f in (lambda t: denoise(x, t), denoise.schedule)
    )
    torch.testing.assert_close(alpha * x_start + sigma * eps, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mean_type", CONTINUOUS)
def test_an_ideal_network_is_read_right_at_fractional_times(mean_type: ModelMeanType) -> None:
    data, (alpha, sigma) = GaussianData(0.3, 0.5), exact_level(12.4)
    x = normal(3, 4)
    x_start = data.x_start(x, alpha, sigma)
    eps = (x - alpha * x_start) / sigma
    output = {
        ModelMeanType.EPSILON: eps,
        ModelMeanType.START_X: x_start,
        ModelMeanType.VELOCITY: alpha * eps - sigma * x_start,
    }[mean_type]
    denoised = DiffusionDenoiser(chain(mean_type), lambda x, t: output, clip_denoised=False)(x, 12.4)
    torch.testing.assert_close(denoised.x_start, x_start)
    torch.testing.assert_close(denoised.eps, eps)


@pytest.mark.parametrize("mean_type", ModelMeanType)
def test_an_ideal_network_is_read_right_at_whole_times(mean_type: ModelMeanType) -> None:
    data, diffusion, x = GaussianData(0.3, 0.5), chain(mean_type), normal(3, 4)
    denoise = DiffusionDenoiser(diffusion, Oracle(data, diffusion), clip_denoised=False)
    for t in (0, 17, T - 2):
        expected = data.x_start(x, *exact_level(t))
        torch.testing.assert_close(denoise(x, t).x_start, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("t", "rescale", "expected"),
    [
        (4, False, torch.tensor([11, 11])),
        (4.0, False, torch.tensor([11, 11])),
        (4, True, torch.tensor([275.0, 275.0])),
        (torch.tensor([[4], [3]]), False, torch.tensor([11, 7])),
        (torch.tensor([[4], [3]]), True, torch.tensor([275.0, 175.0])),
    ],
)
def test_the_network_is_told_the_training_time(t: float | Tensor, rescale: bool, expected: Tensor) -> None:
    seen: list[Tensor] = []
    diffusion = chain(rescale_timesteps=rescale).respaced([0, 2, 5, 7, 11, 20])
    DiffusionDenoiser(diffusion, lambda x, t: (seen.append(t), x)[1])(normal(2, 3), t)
    torch.testing.assert_close(seen, [expected], rtol=0, atol=0)


def test_clipping_and_denoised_fn_are_in_order() -> None:
    diffusion, x = chain(ModelMeanType.START_X), normal(2, 3)

    def x_start(**options: object) -> float:
        denoise = DiffusionDenoiser(diffusion, lambda x, t: torch.full_like(x, 3.0), **options)
        return float(denoise(x, 5).x_start.flatten()[0])

    assert x_start() == 1.0
    assert x_start(clip_denoised=False) == 3.0
    assert x_start(denoised_fn=lambda x: x - 2.5) == 0.5
    assert x_start(denoised_fn=lambda x: x - 1.5, clip_denoised=False) == 1.5


def test_model_kwargs_reach_the_network() -> None:
    denoise = DiffusionDenoiser(chain(), lambda x, t, y: x * y, clip_denoised=False, model_kwargs={"y": 0.0})
    assert bool((denoise(normal(2, 3), 5).eps == 0).all())


def test_the_variance_half_is_apart() -> None:
    x = normal(2, 3, 4)
    plain = DiffusionDenoiser(chain(), arbitrary(1))(x, 5)
    learned = DiffusionDenoiser(chain(model_var_type=ModelVarType.LEARNED_RANGE), arbitrary(2))(x, 5)
    assert plain.extra is None
    assert learned.extra is not None
    assert torch.equal(learned.x_start, plain.x_start)
    assert torch.equal(learned.extra, arbitrary(2)(x, torch.tensor([5, 5]))[:, 3:])


def test_no_signal_is_a_level_too() -> None:
    betas = zero_terminal_snr(get_named_beta_schedule("cosine", T))
    diffusion = GaussianDiffusion(betas=betas, model_mean_type=ModelMeanType.VELOCITY)
    denoise = DiffusionDenoiser(diffusion, arbitrary(1))
    assert denoise.schedule(T - 1) == (0.0, 1.0)
    for t in (T - 1, T - 1.5):
        assert bool(denoise(normal(2, 3), t).x_start.isfinite().all())
