"""What the networks are told: times, classes, Fourier features."""

import math

import pytest
import torch
from torch.testing import assert_close

from perrin.errors import ArgumentError, ShapeError
from perrin.networks import timestep_embedding
from perrin.networks.embeddings import NO_CLASS, Conditioning, FourierFeatures


@pytest.mark.parametrize(
    "t",
    [
        torch.tensor([0, 7, 999]),
        torch.tensor([0.0, 7.25, 998.5]),
        torch.tensor([0.5, 1.5], dtype=torch.float64),
    ],
)
def test_timestep_embedding_is_cosines_then_sines_at_geometric_frequencies(t: torch.Tensor) -> None:
    expected = [
        [f(float(time) * 10_000 ** (-k / 3)) for f in (math.cos, math.sin) for k in range(3)] for time in t
    ]
    tolerance = 1e-12 if t.dtype == torch.float64 else 1e-4  # float32 rounds angles up to 999 by 3e-5
    assert_close(
        timestep_embedding(t, 6).double(), torch.tensor(expected, dtype=torch.float64), atol=tolerance, rtol=0
    )


def test_timestep_embedding_follows_max_period() -> None:
    embedding = timestep_embedding(torch.tensor([3.0]), 4, max_period=100.0)
    expected = torch.tensor([[math.cos(3), math.cos(0.3), math.sin(3), math.sin(0.3)]])
    assert_close(embedding, expected)


@pytest.mark.parametrize("dim", [1, 2, 5, 8])
def test_timestep_embedding_pads_odd_dimensions_with_a_zero(dim: int) -> None:
    embedding = timestep_embedding(torch.tensor([1, 2, 3]), dim)
    assert embedding.shape == (3, dim)
    assert (embedding[:, -1] == 0).all() == (dim % 2 == 1)


def test_timestep_embedding_of_half_precision_times_is_float32() -> None:
    half = timestep_embedding(torch.tensor([900.0], dtype=torch.float16), 8)
    assert_close(half, timestep_embedding(torch.tensor([900]), 8))


def test_fourier_features_are_sines_and_cosines_of_doubling_frequencies() -> None:
    x = torch.rand(2, 3, 4, 5) * 2 - 1
    features = FourierFeatures((0, 3))
    out = features(x)
    assert out.shape[1] == features.channels(3) == 15
    angle = [2 * math.pi * x, 16 * math.pi * x]
    assert_close(out, torch.cat([x, angle[0].sin(), angle[1].sin(), angle[0].cos(), angle[1].cos()], dim=1))


def test_fourier_features_of_half_precision_are_computed_in_float32() -> None:
    x = torch.tensor([[0.3, -0.7]], dtype=torch.bfloat16)
    assert_close(FourierFeatures((6,))(x), FourierFeatures((6,))(x.float()))


def test_fourier_features_tell_neighbouring_levels_apart() -> None:
    levels = torch.tensor([[-1 / 255], [1 / 255]])
    sine_and_cosine = FourierFeatures((6,))(levels)[:, 1:]
    assert (
        sine_and_cosine[0] - sine_and_cosine[1]
    ).norm() > 1.9  # half a turn apart: distance 2 on the circle


def test_conditioning_adds_the_embedding_of_the_class_before_the_last_silu() -> None:
    conditioning = Conditioning(8, 16, num_classes=3)
    t, y = torch.tensor([4, 9]), torch.tensor([2, 0])
    assert conditioning.classes is not None
    h = conditioning.time_in(timestep_embedding(t, conditioning.time_features))
    h = conditioning.time_out(torch.nn.functional.silu(h)) + conditioning.classes.weight[y]
    assert_close(conditioning(t, y, 2), torch.nn.functional.silu(h))


def test_a_class_that_is_not_told_adds_nothing() -> None:
    conditioning = Conditioning(8, 16, num_classes=3)
    t = torch.tensor([4, 9])
    alone = torch.nn.functional.silu(
        conditioning.time_out(
            torch.nn.functional.silu(conditioning.time_in(timestep_embedding(t, conditioning.time_features)))
        )
    )
    told = conditioning(t, torch.tensor([NO_CLASS, 1]), 2)
    assert_close(told[0], alone[0])
    assert not torch.allclose(told[1], alone[1])


def test_narrow_networks_still_see_the_time() -> None:
    conditioning = Conditioning(1, 16, num_classes=None)
    near, far = conditioning(torch.tensor([1, 700]), None, 2)
    assert (near - far).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("t", "y", "kind", "message"),
    [
        (torch.zeros(3), torch.zeros(2, dtype=torch.long), ShapeError, r"t must have shape \(2,\).*\(3,\)"),
        (torch.zeros(2), None, ArgumentError, "y must hold class labels for a network of 5 classes"),
        (torch.zeros(2), torch.zeros(2), ArgumentError, "integer class labels, got torch.float32"),
        (
            torch.zeros(2),
            torch.tensor([0, 5]),
            ArgumentError,
            "y must hold classes from 0 to 4, or -1, got 0 to 5",
        ),
        (
            torch.zeros(2),
            torch.tensor([-2, 4]),
            ArgumentError,
            "y must hold classes from 0 to 4, or -1, got -2 to 4",
        ),
        (torch.zeros(2), torch.zeros(1, dtype=torch.long), ShapeError, r"y must have shape \(2,\).*\(1,\)"),
    ],
)
def test_conditioning_refuses_what_does_not_fit(
    t: torch.Tensor, y: torch.Tensor | None, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        Conditioning(8, 16, num_classes=5)(t, y, 2)


def test_conditioning_refuses_classes_where_there_are_none() -> None:
    with pytest.raises(ArgumentError, match="y must be None"):
        Conditioning(8, 16, num_classes=None)(torch.zeros(2), torch.zeros(2, dtype=torch.long), 2)
