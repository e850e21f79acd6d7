"""Level indices, batches, the held-out split and the resumable order."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perrin.data import Dataset, Facts, batch_indices, load, split, spread, to_levels, to_unit
from perrin.errors import ArgumentError, DataError


@pytest.mark.parametrize("levels", [2, 3, 17, 255, 256, 257, 4096, 65536])
def test_levels_survive_the_round_trip(levels):
    indices = np.arange(levels).astype(np.uint8 if levels <= 256 else np.uint16)
    x = to_unit(indices, levels)
    assert x.dtype == torch.float32
    assert (x[0], x[-1]) == (-1, 1)
    expected = torch.linspace(-1, 1, levels, dtype=torch.float64)
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=1e-7)
    back = to_levels(x, levels)
    assert back.dtype == indices.dtype
    np.testing.assert_array_equal(back, indices)


def test_to_levels_clamps_and_rounds_to_the_nearest():
    x = torch.tensor([[-7.0, -1.0, 0.12, 0.13, 1.0, 3.0]])
    np.testing.assert_array_equal(to_levels(x, 17), [[0, 0, 9, 9, 16, 16]])
    np.testing.assert_array_equal(to_levels(torch.tensor([0.06, 0.07]), 17), [8, 9])


def test_continuous_values_stay_floats():
    x = torch.tensor([-1.5, 0.25, 2.0], dtype=torch.float64)
    back = to_levels(x, None)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, np.float32([-1, 0.25, 1]))
    values = np.float64([-1, 0.5])
    torch.testing.assert_close(to_unit(values, None), torch.tensor([-1, 0.5]))


def test_to_unit_never_shares_memory_with_its_input():
    values = np.zeros(3, np.float32)
    to_unit(values, None).fill_(1)
    to_unit(values, 17)
    np.testing.assert_array_equal(values, 0)


def test_to_levels_refuses_what_is_not_finite():
    with pytest.raises(ArgumentError, match=r"finite values, got nan at index \(1, 0\)"):
        to_levels(torch.tensor([[0.0], [float("nan")]]), 256)


def test_a_batch_holds_the_asked_examples_and_labels():
    values = np.arange(4 * 3 * 2 * 2, dtype=np.uint8).reshape(4, 3, 2, 2)
    labels = np.array([5, 6, 7, 8])
    dataset = Dataset(values, labels, ["a", "b", "c", "d"], Facts((3, 2, 2), 256, None, 4))
    x, y = dataset.batch([2, 0, 2], "cpu")
    torch.testing.assert_close(x, torch.from_numpy(values[[2, 0, 2]]) / 127.5 - 1)
    assert x.is_contiguous()
    assert y is not None
    assert y.dtype == torch.int64
    assert y.tolist() == [7, 5, 7]
    assert len(dataset) == 4
    assert Dataset(values, None, [], dataset.facts).batch([1], "cpu")[1] is None


def test_digits_are_the_1797_images_with_17_levels():
    digits = load("digits")
    assert replace(digits.facts, fingerprint="") == Facts((1, 8, 8), 17, tuple("0123456789"), 1797)
    assert digits.values.dtype == np.uint8
    assert (len(digits), digits.values.max(), int(digits.values.sum(dtype=np.int64))) == (1797, 16, 561718)
    assert digits.labels is not None
    assert np.bincount(digits.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert digits.values[0, 0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    x, _ = digits.batch([0], "cpu")
    assert x[0, 0, 0, 3] == 2 * 13 / 16 - 1


@given(n=st.integers(2, 500), share=st.floats(0.001, 0.999))
def test_a_split_covers_everything_once(n, share):
    train, held_out = split(n, share)
    assert sorted([*train, *held_out]) == list(range(n))
    assert min(len(train), len(held_out)) >= 1
    assert abs(len(held_out) - share * n) <= 1
    assert (np.diff(train) > 0).all()
    assert (np.diff(held_out) > 0).all()


def test_a_split_is_the_same_for_ever():
    assert split(12, 0.25)[1].tolist() == [1, 6, 9]
    np.testing.assert_array_equal(split(1797, 0.2)[1], split(1797, 0.2)[1])


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_split_needs_a_share_inside_0_and_1(share):
    with pytest.raises(ArgumentError, match=f"held_out must lie between 0 and 1, got {share}"):
        split(10, share)


def test_a_split_needs_two_examples():
    with pytest.raises(DataError, match="at least 2 examples, got 1"):
        split(1, 0.5)


def test_a_spread_is_even():
    assert spread(range(10, 20), 4) == [10, 12, 15, 17]
    assert spread([3, 5], 9) == [3, 5]
    assert spread([], 9) == []


@settings(deadline=None)
@given(n=st.integers(1, 40), batch_size=st.integers(1, 100), step=st.integers(0, 50), seed=st.integers(0, 3))
def test_batches_are_pieces_of_one_run_of_permutations(n, batch_size, step, seed):
    batch = batch_indices(n, batch_size, step, seed)
    one_by_one = [batch_indices(n, 1, step * batch_size + i, seed)[0] for i in range(batch_size)]
    assert batch.tolist() == one_by_one


@given(n=st.integers(1, 60), epoch=st.integers(0, 5), seed=st.integers(0, 3))
def test_each_pass_sees_every_example_once(n, epoch, seed):
    assert sorted(batch_indices(n, n, epoch, seed)) == list(range(n))


def test_passes_and_seeds_have_orders_of_their_own():
    orders = {tuple(batch_indices(50, 50, epoch, seed)) for epoch in range(3) for seed in range(3)}
    assert len(orders) == 9


def test_changing_a_batch_of_indices_does_not_change_the_order():
    first = batch_indices(10, 5, 0, 0).copy()
    batch_indices(10, 5, 0, 0)[:] = -1
    np.testing.assert_array_equal(batch_indices(10, 5, 0, 0), first)
