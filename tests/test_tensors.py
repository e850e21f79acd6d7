"""Arithmetic by shape, and the tables that no cast can coarsen."""

import copy
import pickle

import pytest
import torch

from perrin import mean_flat
from perrin.diffusion import GaussianDiffusion
from perrin.schedules import cosine_betas
from perrin.tensors import Remembered, Tables, affine, append_dims, gather, mix, root, scale, scale_


def test_mean_flat_keeps_the_first_dimension() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    torch.testing.assert_close(mean_flat(x), torch.tensor([5.5, 17.5]))
    torch.testing.assert_close(mean_flat(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))


def test_what_is_remembered_is_made_once_and_forgotten_when_there_is_too_much() -> None:
    asked: list[float] = []
    doubled = Remembered(lambda t: asked.append(t) or 2 * t, most=3)
    assert [doubled[t] for t in (1, 0.5, 1.0, 1)] == [2, 1, 2, 2]
    assert asked == [1, 0.5]
    assert [doubled[t] for t in (3, 4, 1)] == [6, 8, 2]
    assert asked == [1, 0.5, 3, 4, 1]
    assert len(doubled) == 2


def test_append_dims() -> None:
    assert append_dims(torch.zeros(4), 3).shape == (4, 1, 1)
    assert append_dims(torch.zeros(4, 2), 2).shape == (4, 2)


def test_gather_looks_up_each_example() -> None:
    table = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    found = gather(table, torch.tensor([2, 0]), torch.zeros(2, 3, 4))
    assert found.dtype is torch.float64
    torch.testing.assert_close(found, torch.tensor([3.0, 1.0], dtype=torch.float64).reshape(2, 1, 1))


@pytest.mark.parametrize("a", [0.0, 1.0, -0.7])
@pytest.mark.parametrize("b", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("kinds", ["floats", "tensors", "first", "second"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_mix_is_the_linear_combination(a: float, b: float, kinds: str, dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = x.clone(), y.clone()
    first = torch.full((2, 1), a, dtype=torch.float64) if kinds in ("tensors", "first") else a
    second = torch.full((2, 1), b, dtype=torch.float64) if kinds in ("tensors", "second") else b
    found = mix(first, x, second, y)
    assert found.dtype is torch.promote_types(dtype, torch.float32)
    tolerance = 4 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(
        found.double(), a * x.double() + b * y.double(), rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close((x, y), before, rtol=0, atol=0)


def test_mix_and_scale_combine_coefficients_in_float64_before_the_cast() -> None:
    third = torch.full((2, 1), 1 / 3, dtype=torch.float64)
    x = torch.ones(2, 3)
    torch.testing.assert_close(scale(third, x), torch.full((2, 3), 1 / 3), rtol=0, atol=0)
    torch.testing.assert_close(affine(third, x, third), torch.full((2, 3), 2 / 3), rtol=1e-7, atol=0)


@pytest.mark.parametrize("a", [0.0, -0.7, 1e-6])
def test_scaling_in_place_is_scaling(a: float) -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    expected = a * x
    assert scale_(a, x) is x
    torch.testing.assert_close(x, expected, rtol=0, atol=0)


def test_scaling_in_place_has_a_gradient() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    scale_(3.0, x + 1).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2, 3), 3.0))


def test_root_of_a_rounded_negative_is_zero() -> None:
    assert root(-1e-18) == 0.0
    assert root(4.0) == 2.0
    torch.testing.assert_close(root(torch.tensor([-1e-18, 4.0])), torch.tensor([0.0, 2.0]))


def chain() -> GaussianDiffusion:
    return GaussianDiffusion(betas=cosine_betas(20))


@pytest.mark.parametrize("how", ["half", "bfloat16", "float", "to", "twice"])
def test_no_cast_coarsens_the_tables(how: str) -> None:
    diffusion = chain()
    expected = {name: buffer.clone() for name, buffer in diffusion.named_buffers()}
    assert len(expected) > 15
    {
        "half": diffusion.half,
        "bfloat16": diffusion.bfloat16,
        "float": diffusion.float,
        "to": lambda: diffusion.to(torch.float32),
        "twice": lambda: torch.nn.Sequential(diffusion).half().to(torch.float32),
    }[how]()
    for name, buffer in diffusion.named_buffers():
        assert buffer.dtype is torch.float64, name
        torch.testing.assert_close(buffer, expected[name], rtol=0, atol=0)


def test_tables_move_to_a_device() -> None:
    diffusion = chain().to("meta")
    assert {buffer.device.type for buffer in diffusion.buffers()} == {"meta"}


def test_tables_are_not_part_of_a_checkpoint() -> None:
    diffusion = chain()
    assert diffusion.state_dict() == {}
    assert torch.nn.Sequential(diffusion, torch.nn.Linear(1, 1)).state_dict().keys() == {"1.weight", "1.bias"}
    assert diffusion.load_state_dict({}).missing_keys == []


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_computes_the_same(how: str) -> None:
    diffusion = chain().respaced([0, 3, 11, 19])
    other = copy.deepcopy(diffusion) if how == "deepcopy" else pickle.loads(pickle.dumps(diffusion))
    x, t = torch.ones(2, 3), torch.tensor([1, 3])
    noise = torch.zeros(2, 3)
    for step in (t, 2):
        torch.testing.assert_close(
            other.q_sample(x, step, noise), diffusion.q_sample(x, step, noise), rtol=0, atol=0
        )
    assert other.network_time(t, torch.zeros(2, 1)).tolist() == [3, 19]


def test_a_table_takes_the_place_of_its_namesake() -> None:
    tables = Tables({"a": torch.tensor([1.0, 2.0])})
    tables.add_tables({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    assert tables.at("a", 0, torch.zeros(1)) == 3.0
    assert tables.get_buffer("a").tolist() == [3.0]
    assert tables.get_buffer("b").dtype is torch.float64


def test_tables_follow_the_timesteps_to_their_device() -> None:
    diffusion = GaussianDiffusion(betas=cosine_betas(10))
    x, t = torch.zeros(2, 3, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    assert diffusion.q_sample(x, t).device.type == "meta"
    assert diffusion.network_time(t, x).device.type == "meta"
    assert diffusion.betas.device.type == "meta"
    assert diffusion.q_sample(torch.zeros(1, 3), torch.tensor([9])).isfinite().all()
