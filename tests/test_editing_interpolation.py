"""Interpolation: the arc, and that its ends are what sampling gives there."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from perrin import GaussianDiffusion, ModelMeanType, SamplerDDIM, SamplerDDPM
from perrin.editing import SamplingOptions, interpolate, interpolate_data, interpolate_seeds, slerp
from perrin.errors import ArgumentError, ShapeError
from perrin.guidance import Guidance, classifier_free
from perrin.oracles import GaussianData, Oracle, arbitrary, normal
from perrin.samplers import SAMPLERS, SampleNoise
from perrin.schedules import get_named_beta_schedule

T = 20
CHAIN = GaussianDiffusion(betas=get_named_beta_schedule("linear", T), model_mean_type=ModelMeanType.EPSILON)
NETWORK = arbitrary(CHAIN.output_channels(1))
SHAPE = (1, 3, 4)


# The arc


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 99), st.floats(0, 1))
def test_the_norm_stays_where_the_ends_have_the_same(seed: int, u: float) -> None:
    a, b = (v / v.flatten(1).norm(dim=1)[:, None, None] for v in normal(2, 4, 3, 5, seed=seed))
    norms = slerp(3 * a, 3 * b, u).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 3), rtol=1e-12, atol=0)


def test_the_norm_goes_evenly_from_one_end_to_the_other() -> None:
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 6.0]])
    torch.testing.assert_close(
        slerp(a, b, 0.25), 3 * torch.tensor([[math.cos(math.pi / 8), math.sin(math.pi / 8)]])
    )


def test_each_row_has_its_own_angle_and_place() -> None:
    a, b = normal(2, 5, 2, 3, seed=1)
    u = torch.linspace(0, 1, 5, dtype=torch.float64)
    alone = [slerp(a[i : i + 1], b[i : i + 1], float(u[i])) for i in range(5)]
    torch.testing.assert_close(slerp(a, b, u), torch.cat(alone), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_are_exact(dtype: torch.dtype) -> None:
    a, b = normal(2, 4, 7, seed=2).to(dtype)
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)
    assert torch.equal(slerp(a, b, torch.tensor([0.0, 1, 0, 1]))[1], b[1])


@pytest.mark.parametrize("angle", [0.0, 1e-7, 1e-5, 2e-4, 1.0, math.pi - 2e-4, math.pi - 1e-5, math.pi])
def test_no_angle_loses_the_norm(angle: float) -> None:
    a = torch.tensor([[1.0, 0.0, 0.0]])
    b = torch.tensor([[math.cos(angle), math.sin(angle), 0.0]])
    u = torch.linspace(0, 1, 9)
    points = slerp(a.expand(9, 3), b.expand(9, 3), u)
    torch.testing.assert_close(points.norm(dim=1), torch.ones(9), rtol=1e-5, atol=0)
    steps = (points[1:] - points[:-1]).norm(dim=1)
    torch.testing.assert_close(steps, torch.full((8,), 2 * math.sin(angle / 16)), rtol=1e-2, atol=3e-5)


def test_nearly_opposite_ends_keep_the_norm_in_float32() -> None:
    first = normal(16, 64).float()
    second = -first + 3e-4 * normal(16, 64, seed=1).float()
    second = second * (first.norm(dim=1) / second.norm(dim=1))[:, None]
    between = slerp(first, second, 0.5)
    torch.testing.assert_close(between.norm(dim=1), first.norm(dim=1), rtol=1e-5, atol=0)


def test_a_zero_end_is_joined_by_a_straight_line() -> None:
    b = torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(slerp(torch.zeros(1, 2), b, 0.5), b / 2)


@pytest.mark.parametrize(
    ("a", "b", "u", "kind", "message"),
    [
        ((2, 3), (2, 4), 0.5, ShapeError, "slerp needs two of one shape"),
        ((2, 3), (2, 3), torch.zeros(3), ShapeError, r"u \(\) or \(B,\), got .* and \(3,\)"),
        ((2, 3), (2, 3), 1.5, ArgumentError, "u must be from 0 to 1, got 1.5"),
        ((2, 3), (2, 3), float("nan"), ArgumentError, "u must be from 0 to 1"),
    ],
)
def test_bad_ends_and_places_are_refused(a, b, u, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        slerp(torch.ones(a), torch.ones(b), u)


# Sampling between two x_T


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_ends_are_what_sampling_gives_there(name: str) -> None:
    sampler = SAMPLERS[name](CHAIN, 5)
    first, second = normal(2, *SHAPE, seed=3).float()
    row = interpolate(sampler, NETWORK, first=first, second=second, count=4, options=SamplingOptions(seed=7))
    for end, x in ((first, row[0]), (second, row[-1])):
        noise = SampleNoise(7, [0])
        noise.initial((1, *SHAPE), "cpu")
        alone = sampler.sample(NETWORK, (1, *SHAPE), noise=end[None], noise_fn=noise)
        torch.testing.assert_close(x, alone[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(row[0], row[1])


def test_a_row_depends_on_its_place_alone() -> None:
    first, second = normal(2, *SHAPE, seed=4)
    three, five = (
        interpolate(SamplerDDPM(CHAIN), NETWORK, first=first, second=second, count=count) for count in (3, 5)
    )
    torch.testing.assert_close(three, five[::2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm-2m-sde"])
def test_between_seeds_the_ends_are_the_samples_of_the_seeds(name: str) -> None:
    sampler = SAMPLERS[name](CHAIN, 6)
    row = interpolate_seeds(
        sampler, NETWORK, SHAPE, seeds=(3, 8), count=3, options=SamplingOptions(indices=[5])
    )
    for seed, x in ((3, row[0]), (8, row[-1])):
        noise = SampleNoise(seed, [5])
        start = noise.initial((1, *SHAPE), "cpu")
        alone = sampler.sample(NETWORK, (1, *SHAPE), noise=start, noise_fn=noise)
        torch.testing.assert_close(x, alone[0], rtol=1e-5, atol=1e-6)


def test_between_seeds_the_noise_is_on_the_model_s_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    initial = SampleNoise.initial

    def recorded(self: SampleNoise, shape: tuple[int, ...], device: torch.device) -> Tensor:
        asked.append(device)
        return initial(self, shape, "cpu")

    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, device="meta"))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x

    monkeypatch.setattr(SampleNoise, "initial", recorded)
    interpolate_seeds(SAMPLERS["ddim"](CHAIN, 2), Elsewhere(), SHAPE, seeds=(3, 8), count=2)
    assert asked == [torch.device("meta")] * 2


def test_noise_of_the_caller_is_shared_by_all_places() -> None:
    def noise_fn(x: Tensor, t: float) -> Tensor:
        assert len(x) == 1
        return torch.full_like(x, 0.3)

    start = normal(*SHAPE, seed=1)
    row = interpolate(
        SamplerDDPM(CHAIN, 4),
        NETWORK,
        first=start,
        second=start,
        count=3,
        options=SamplingOptions(noise_fn=noise_fn),
    )
    torch.testing.assert_close(row[1], row[0])


# Between two examples

DATA = GaussianData(mean=0.2, std=0.4)


def test_between_examples_the_ends_come_back() -> None:
    first, second = DATA.draw(2, *SHAPE, seed=5)
    errors = []
    for steps in (50, 200):
        chain = GaussianDiffusion(betas=get_named_beta_schedule("linear", 200))
        row = interpolate_data(
            SamplerDDIM(chain, steps), Oracle(DATA, chain), first=first, second=second, count=3
        )
        errors.append(max(float((row[0] - first).abs().max()), float((row[-1] - second).abs().max())))
    assert errors[1] < 0.03
    assert errors[1] < 0.5 * errors[0]


def test_clipping_enters_both_ways_if_asked() -> None:
    first, second = DATA.draw(2, *SHAPE, seed=6)
    plain, clipped = (
        interpolate_data(
            SamplerDDIM(CHAIN),
            NETWORK,
            first=first,
            second=second,
            count=2,
            options=SamplingOptions(clip_denoised=c),
        )
        for c in (False, True)
    )
    assert plain.abs().max() > 1
    assert clipped.abs().max() <= 1


def test_the_network_is_told_of_each_end_and_of_each_row() -> None:
    told = []

    def network(x: Tensor, t: Tensor, y: Tensor, scale: float) -> Tensor:
        told.append(y.tolist())
        return NETWORK(x, t) * scale

    first, second = normal(2, *SHAPE, seed=1)
    interpolate_data(
        SamplerDDIM(CHAIN, 2),
        network,
        first=first,
        second=second,
        count=4,
        options=SamplingOptions(model_kwargs={"y": torch.tensor([5, 6, 7, 8]), "scale": 0.1}),
    )
    assert told == [[5, 8]] * 2 + [[5, 6, 7, 8]] * 2


def test_guidance_enters_both_ways() -> None:
    """A guidance that takes the class away: the row is that of the network without a class."""
    first, second = normal(2, *SHAPE, seed=1)

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return NETWORK(x, t) + 0.1 * y[:, None, None, None]

    def row(label: int, *guidance: Guidance) -> Tensor:
        told = {"y": torch.full((3,), label)}
        options = SamplingOptions(clip_denoised=False, model_kwargs=told, guidance=guidance)
        return interpolate_data(
            SamplerDDIM(CHAIN, 4), network, first=first, second=second, count=3, options=options
        )

    torch.testing.assert_close(row(3, classifier_free(0.0)), row(-1), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(row(3), row(-1))


def test_what_cannot_be_is_refused() -> None:
    x = torch.zeros(SHAPE)
    with pytest.raises(ArgumentError, match="count must be at least 2, both ends, got 1"):
        interpolate(SamplerDDIM(CHAIN), NETWORK, first=x, second=x, count=1)
    with pytest.raises(ShapeError, match="slerp needs two of one shape"):
        interpolate(SamplerDDIM(CHAIN), NETWORK, first=x, second=x[:, :2])
    with pytest.raises(ArgumentError, match="eta must be 0"):
        interpolate_data(SamplerDDIM(CHAIN, eta=1.0), NETWORK, first=x, second=x)
