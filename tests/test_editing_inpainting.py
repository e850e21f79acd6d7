"""Inpainting: against the exact conditional of a correlated Gaussian, and what it promises for every sampler."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from perrin import GaussianDiffusion, ModelMeanType, ModelVarType, SamplerDDIM, SamplerDDPM
from perrin.editing import SamplingOptions, inpaint, inpainting_moves
from perrin.errors import ArgumentError, ShapeError
from perrin.oracles import CorrelatedData, OptimalVariance, Oracle, arbitrary, normal
from perrin.samplers import SAMPLERS
from perrin.schedules import get_named_beta_schedule, zero_terminal_snr

# x_1 is known, x_2 follows it: N(rho x_1, s^2 (1 - rho^2)).
STD, RHO, KNOWN = 0.5, 0.9, 0.8
MEAN, VARIANCE = RHO * KNOWN, STD**2 * (1 - RHO**2)
DATA = CorrelatedData.decaying(2, correlation=RHO, std=STD)
CHAIN = GaussianDiffusion(
    betas=get_named_beta_schedule("linear", 100),
    model_mean_type=ModelMeanType.EPSILON,
    model_var_type=ModelVarType.LEARNED_RANGE,
)
IDEAL = Oracle(DATA, CHAIN, OptimalVariance(DATA, CHAIN))


def moments(name: str, *, resamples: int, jump: int = 1, rows: int = 4000) -> tuple[float, float]:
    """Mean and variance of the filled x_2."""
    generator = torch.Generator().manual_seed(0)

    def noise_fn(x: Tensor, t: float) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    x = torch.tensor([KNOWN, 9.0], dtype=torch.float64).expand(rows, 2)
    filled = inpaint(
        SAMPLERS[name](CHAIN, 100),
        IDEAL,
        x,
        fill=torch.tensor([False, True]),
        resamples=resamples,
        jump=jump,
        options=SamplingOptions(clip_denoised=False, noise_fn=noise_fn),
    )
    return float(filled[:, 1].mean()), float(filled[:, 1].var())


def test_one_step_at_a_time_tends_to_the_exact_conditional() -> None:
    """The figures for 1, 2, 5 and 10 resamples follow from the moments of each move, which are affine in x."""
    found = [moments("ddpm", resamples=r) for r in (1, 2, 5, 10)]
    means, variances = zip(*found, strict=True)
    assert means == pytest.approx((0.485, 0.595, 0.671, 0.693), abs=0.015)
    assert variances == pytest.approx((0.082, 0.064, 0.054, 0.051), abs=0.006)
    errors = [abs(mean - MEAN) for mean in means]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]
    assert variances[-1] == pytest.approx(VARIANCE, rel=0.15)


def test_plain_replacement_is_biased() -> None:
    mean, variance = moments("ddpm", resamples=1)
    assert mean < 0.7 * MEAN
    assert variance > 1.6 * VARIANCE


def test_longer_jumps_keep_a_bias_that_more_resamples_do_not_mend() -> None:
    (few, _), (many, spread) = (
        moments("ddpm", resamples=5, jump=10),
        moments("ddpm", resamples=10, jump=10, rows=2000),
    )
    assert few == pytest.approx(0.628, abs=0.02)
    assert many == pytest.approx(0.628, abs=0.02)
    assert spread > 1.3 * VARIANCE


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "ddpm"])
def test_resampling_brings_every_sampler_nearer(name: str) -> None:
    (once, _), (often, spread) = moments(name, resamples=1, rows=1000), moments(name, resamples=4, rows=1000)
    assert abs(often - MEAN) < 0.5 * abs(once - MEAN)
    assert 0.5 * VARIANCE < spread < 1.7 * VARIANCE


# The order of the moves


def test_one_resample_is_the_sampler_s_own_walk() -> None:
    assert list(inpainting_moves((9, 6, 3, -1), 1, 1)) == [(9, 6), (6, 3), (3, -1)]


def test_each_step_but_the_last_is_taken_again_from_renewed_noise() -> None:
    block = [(9, 6), (6, 9), (9, 6), (6, 3), (3, 6), (6, 3), (3, -1)]
    assert list(inpainting_moves((9, 6, 3, -1), 2, 1)) == block


def test_blocks_of_a_jump_end_above_the_data_and_the_first_is_the_short_one() -> None:
    found = list(inpainting_moves((9, 7, 5, 3, -1), 2, 2))
    assert found == [(9, 7), (7, 9), (9, 7), (7, 5), (5, 3), (3, 7), (7, 5), (5, 3), (3, -1)]


@pytest.mark.parametrize(
    ("steps", "resamples", "jump"), [(1, 5, 1), (2, 5, 2), (7, 3, 2), (7, 3, 7), (50, 10, 1)]
)
def test_every_step_is_taken_as_often_as_asked(steps: int, resamples: int, jump: int) -> None:
    times = (*range(steps - 1, -1, -1), -1)
    moves = list(inpainting_moves(times, resamples, jump))
    down = [move for move in moves if move[1] < move[0]]
    assert len(down) == resamples * (steps - 1) + 1
    assert all(s == t - 1 for t, s in down)
    assert all(first[1] == second[0] for first, second in pairwise(moves))


# What every sampler keeps to

PLAIN = GaussianDiffusion(betas=get_named_beta_schedule("linear", 30))
NETWORK = arbitrary(PLAIN.output_channels(1))
FILL = torch.tensor([[True, False, True], [False, False, True]])
each_sampler = pytest.mark.parametrize("name", SAMPLERS)


@each_sampler
def test_what_is_known_is_kept_to_the_bit_and_the_rest_is_new(name: str) -> None:
    x = normal(3, 1, 2, 3, seed=1).float()
    filled = inpaint(SAMPLERS[name](PLAIN, 6), NETWORK, x, fill=FILL, resamples=3)
    assert torch.equal(filled[..., ~FILL], x[..., ~FILL])
    assert (filled[..., FILL] != x[..., FILL]).all()
    assert filled.dtype == x.dtype


@each_sampler
def test_what_is_filled_has_no_influence(name: str) -> None:
    x = normal(2, 1, 2, 3, seed=2)
    first, second = (
        inpaint(SAMPLERS[name](PLAIN, 5), NETWORK, torch.where(FILL, v, x), fill=FILL, resamples=2)
        for v in (0.0, 9.0)
    )
    assert torch.equal(first, second)


@each_sampler
def test_the_network_sees_what_is_known_at_every_time(name: str) -> None:
    sampler, x = SAMPLERS[name](PLAIN, 6), normal(1, 1, 2, 3, seed=5)
    seen: dict[float, list[Tensor]] = {}

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.setdefault(float(t[0]), []).append(x[..., ~FILL])
        return NETWORK(x, t)

    options = SamplingOptions(noise_fn=lambda x, t: torch.zeros_like(x))
    inpaint(sampler, network, x, fill=FILL, resamples=1, options=options)
    for t in sampler.times[1:-1]:
        known = sampler.diffusion.level_of_batch(t).alpha * x[..., ~FILL]
        shown = next(values for time, values in seen.items() if time == pytest.approx(t, abs=1e-4))
        assert any(torch.allclose(values, known) for values in shown), t


@each_sampler
def test_a_row_does_not_depend_on_the_others(name: str) -> None:
    sampler, x = SAMPLERS[name](PLAIN, 5), normal(4, 1, 2, 3, seed=3)
    whole = inpaint(sampler, NETWORK, x, fill=FILL, resamples=2, jump=2, options=SamplingOptions(seed=6))
    alone = inpaint(
        sampler, NETWORK, x[2:3], fill=FILL, resamples=2, jump=2, options=SamplingOptions(seed=6, indices=[2])
    )
    torch.testing.assert_close(whole[2:3], alone, rtol=1e-10, atol=1e-10)
    other = inpaint(sampler, NETWORK, x, fill=FILL, resamples=2, jump=2, options=SamplingOptions(seed=7))
    assert not torch.allclose(whole[..., FILL], other[..., FILL])


def test_each_example_may_have_a_fill_of_its_own() -> None:
    x = normal(2, 1, 2, 3, seed=4)
    fill = torch.stack([FILL, ~FILL])[:, None]
    filled = inpaint(SamplerDDPM(PLAIN, 5), NETWORK, x, fill=fill, resamples=2)
    assert torch.equal(filled[~fill], x[~fill])
    assert (filled[fill] != x[fill]).all()


def test_to_fill_everything_once_is_plain_sampling() -> None:
    x = torch.zeros(3, 1, 2, 3)
    filled = inpaint(
        SamplerDDIM(PLAIN, 5),
        NETWORK,
        x,
        fill=torch.tensor(True),
        resamples=1,
        options=SamplingOptions(seed=8),
    )
    torch.testing.assert_close(filled, SamplerDDIM(PLAIN, 5).sample(NETWORK, x.shape, seed=8))


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_chain_without_terminal_signal_can_be_resampled(name: str) -> None:
    betas = zero_terminal_snr(get_named_beta_schedule("linear", 20))
    chain = GaussianDiffusion(betas=betas, model_mean_type=ModelMeanType.START_X)
    filled = inpaint(
        SAMPLERS[name](chain, 5), arbitrary(1), normal(2, 1, 2, 3), fill=FILL, resamples=2, jump=3
    )
    assert filled.isfinite().all()


def test_what_goes_with_sampling_reaches_the_steps() -> None:
    told, x = [], torch.zeros(2, 1, 2, 3)

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        told.append(y.tolist())
        return NETWORK(x, t)

    def filled(**options: object) -> Tensor:
        how = SamplingOptions(model_kwargs={"y": torch.tensor([4, 5])}, **options)  # type: ignore[arg-type]  # of a table of both kinds
        return inpaint(SamplerDDIM(PLAIN, 4), network, x, fill=FILL, resamples=2, options=how)[..., FILL]

    clipped = filled()
    assert told == [[4, 5]] * 7
    assert clipped.abs().max() <= 1
    assert filled(clip_denoised=False).abs().max() > 1
    assert (filled(denoised_fn=torch.zeros_like) == 0).all()
    assert (filled(cond_fn=lambda x, t, y: torch.full_like(x, -30.0)) < clipped).any()
    assert (filled(guidance=(lambda denoiser: _Known(denoiser),)) == 0.25).all()


class _Known:
    """A guidance that knows x_start to be 0.25."""

    def __init__(self, denoiser: object) -> None:
        self.base = denoiser.base  # type: ignore[attr-defined]  # a Guidable has it
        self.schedule = self.base.schedule

    def __call__(self, x: Tensor, t: float) -> object:
        return self.base.diffusion.processed(self.base.raw(x, t), x, t, True, lambda x: 0 * x + 0.25)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"resamples": 0}, ArgumentError, "resamples must be at least 1, got 0"),
        ({"jump": 0}, ArgumentError, "jump must be from 1 to 4, the number of steps, got 0"),
        ({"jump": 5}, ArgumentError, "jump must be from 1 to 4, the number of steps, got 5"),
        (
            {"fill": FILL.float()},
            ArgumentError,
            "fill must be of bool, True where to fill, got torch.float32",
        ),
        (
            {"fill": FILL.T},
            ShapeError,
            r"fill must expand to the shape of x_start, \(2, 1, 2, 3\), got \(3, 2\)",
        ),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        inpaint(SamplerDDPM(PLAIN, 4), NETWORK, torch.zeros(2, 1, 2, 3), **({"fill": FILL} | change))
