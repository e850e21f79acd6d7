"""The measurements between steps: which images, which labels, and the same figures however they are cut."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from perrin.data import Dataset, Facts
from perrin.training import evaluate as module
from perrin.training.evaluate import Evaluation, RangeCounter, evaluate
from perrin.training.step import Batches
from test_training_step import CPU, TIMESTEPS, Net, config, dataset, diffusion, network


def batches(data: Dataset | None = None, **kwargs: Any) -> Batches:
    return Batches(data or dataset(), config(**kwargs), CPU)


def measure(path: Path, net: Net | None = None, data: Dataset | None = None, **kwargs: Any) -> Evaluation:
    return evaluate((net or network()).eval(), diffusion(), batches(data, **kwargs), path / "grid.png")


def images(count: int, side: int) -> Dataset:
    values = np.random.default_rng(0).integers(0, 17, (count, 1, side, side), dtype=np.uint8)
    return Dataset(values, None, [str(i) for i in range(count)], Facts((1, side, side), 17, None, count))


def test_figures_and_samples_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    found = []
    for size in (1, 5, 64):
        (tmp_path / str(size)).mkdir()
        found.append(measure(tmp_path / str(size), batch_size=size))
    grids = [one.grid.read_bytes() for one in found if one.grid is not None]
    assert len(grids) == 3
    assert grids[0] == grids[1] == grids[2]
    for one in found[:2]:
        assert one.held_out_bpd == pytest.approx(found[2].held_out_bpd, rel=1e-6)
        assert one.outside_range == found[2].outside_range


def test_measuring_twice_gives_the_same_and_flips_nothing(tmp_path: Path) -> None:
    once, twice = measure(tmp_path), measure(tmp_path, flip=True)
    assert once == twice


def test_a_bound_that_is_not_finite_ends_no_training(tmp_path: Path) -> None:
    net = network()
    nn.init.constant_(net.exit.bias, 1e30)
    found = measure(tmp_path, net)
    assert math.isnan(found.held_out_bpd)
    assert math.isnan(found.held_out_bpd_se)
    assert found.outside_range is not None


def test_other_weights_give_other_samples(tmp_path: Path) -> None:
    measure(tmp_path)
    one = (tmp_path / "grid.png").read_bytes()
    net = network()
    nn.init.ones_(net.exit.weight)
    measure(tmp_path, net)
    assert (tmp_path / "grid.png").read_bytes() != one
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_a_large_held_out_part_is_sampled_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    inner = module.bound

    def watched(*args: Any, indices: list[int], **kwargs: Any) -> Any:
        asked.extend(indices)
        return inner(*args, indices=indices, **kwargs)

    monkeypatch.setattr(module, "bound", watched)
    monkeypatch.setattr(module, "MOST_IMAGES", 10)
    parts = batches(images(200, 4))
    evaluate(network().eval(), diffusion(), parts, tmp_path / "grid.png")
    assert len(parts.held_out) == 40
    assert asked == parts.held_out[::4].tolist()


@pytest.mark.parametrize(("timesteps", "terms"), [(17, None), (18, 16)])
def test_a_short_chain_is_measured_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timesteps: int, terms: int | None
) -> None:
    asked: list[int | None] = []

    def watched(*args: Any, terms: int | None, **kwargs: Any) -> Any:
        asked.append(terms)
        raise StopIteration

    monkeypatch.setattr(module, "bound", watched)
    chain = diffusion(timesteps)
    with pytest.raises(StopIteration):
        evaluate(lambda x, t: torch.cat([x, x], 1), chain, batches(), tmp_path / "grid.png")
    assert asked == [terms]


@pytest.mark.parametrize(("side", "count"), [(64, 64), (65, 16)])
def test_a_grid_of_large_images_has_fewer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int, count: int
) -> None:
    shapes: list[tuple[int, ...]] = []

    def write(path: Path, values: np.ndarray, levels: int | None) -> None:
        shapes.append(values.shape)
        path.touch()

    monkeypatch.setattr(module, "write_grid", write)
    monkeypatch.setattr(module, "SAMPLING_STEPS", 1)
    measure(tmp_path, data=images(10, side), batch_size=32)
    assert shapes == [(count, 1, side, side)]


def test_classes_take_turns_in_the_grid(tmp_path: Path) -> None:
    net = network(classes=2)
    measure(tmp_path, net, conditional=True, batch_size=7)
    grid_calls = net.inputs[-TIMESTEPS:]  # the last chunk: samples 63 to 63
    assert all(y is not None and y.tolist() == [1] for _, _, y in grid_calls)
    before = net.inputs[-2 * TIMESTEPS]
    assert before[2] is not None
    assert before[2].tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_the_share_outside_the_range_counts_the_variance_half_only() -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([torch.full_like(x, 9.0), torch.tensor([[1.5, 0.5, -2.0, 1.0]] * len(x))], dim=1)

    counter = RangeCounter(net)
    output = counter(torch.zeros(3, 4), torch.zeros(3))
    assert output.shape == (3, 8)
    assert counter.share() == 0.5


def test_a_fixed_variance_has_no_share(tmp_path: Path) -> None:
    found = measure(tmp_path)
    assert found.outside_range is not None
    assert "outside_range" in found.row(3)
    assert "outside_range" not in Evaluation(1.0, 0.1, None, None).row(3)
