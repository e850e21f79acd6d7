"""The entropy coder and the integer frequencies that it is given."""

import sys
from math import log2

import numpy as np
import pytest
import torch
from scipy.stats import norm

from perrin.codec.coder import TOTAL, BorrowingStack, Stack, is_untouched, random_words, require, table
from perrin.codec.gaussians import PARTS, SCALES, Gaussians, frequencies
from perrin.codec.values import Values
from perrin.errors import ArgumentError, DataError
from perrin.gaussian import discretized_gaussian_log_likelihood

LEVELS = [2, 17, 256, 257, 1000, 65536]


def a_stack() -> Stack:
    return Stack(np.random.default_rng(0).integers(1, 2**32, 10_000, np.uint32))


def cost(distribution, numbers) -> float:
    """Bits that ``numbers`` take."""
    stack = a_stack()
    before = stack.bits()
    distribution.push(stack, np.asarray(numbers))
    return stack.bits() - before


def test_a_symbol_costs_what_its_frequency_says():
    shares = np.array([1, 5, 1000, TOTAL - 1006])
    for symbol, share in enumerate(shares):
        stack = a_stack()
        before = stack.bits()
        stack.push(np.full(500, symbol), table(shares))
        assert (stack.bits() - before) / 500 == pytest.approx(24 - log2(share), rel=1e-3)


def test_pushed_symbols_come_back_and_leave_the_stack_as_it_was():
    stack, draw = a_stack(), np.random.default_rng(1)
    before = stack.words()
    shares = table(np.array([TOTAL - 30, 10, 20]))
    rows = np.stack([np.array([TOTAL // 4, TOTAL // 2, TOTAL // 4])] * 5)
    some, each, plain = draw.integers(0, 3, 9), draw.integers(0, 3, 5), draw.integers(0, 2**40, 7)
    stack.push(some, shares)
    stack.push_rows(each, rows)
    stack.push_bits(plain, 40)
    pushed = stack.take_notes()
    np.testing.assert_array_equal(stack.pop_bits(7, 40), plain)
    np.testing.assert_array_equal(stack.pop_rows(rows), each)
    np.testing.assert_array_equal(stack.pop(9, shares), some)
    np.testing.assert_array_equal(stack.words(), before)
    assert stack.take_notes()[::-1] == pushed
    assert stack.take_notes() == []


def test_the_random_words_are_those_of_version_1_of_the_format():
    source = random_words()
    assert [next(source) for _ in range(3)] == [1551017371, 3571569196, 2474445350]


def test_the_tables_are_those_of_version_1_of_the_format():
    some = [
        frequencies(scale, part, escape=True)
        for scale in range(-SCALES, 7 * SCALES, 37)
        for part in (0, 5, PARTS - 1)
    ]
    stack = a_stack()
    stack.push_rows(np.zeros(1), np.concatenate(some)[None])
    assert stack.take_notes() == [bytes.fromhex("33fc673508a1914a")]


def test_borrowed_bits_are_counted_and_given_back():
    stack = BorrowingStack()
    assert (stack.initial_bits, stack.net_bits()) == (64, 0)
    even = table(np.array([TOTAL // 2, TOTAL // 2]))
    symbols = stack.pop(3200, even)
    assert abs(symbols.mean() - 0.5) < 0.05
    assert stack.initial_bits == 3200 + 64
    assert stack.net_bits() == pytest.approx(-3200, abs=0.01)
    stack.push(symbols, even)
    assert stack.net_bits() == pytest.approx(0, abs=0.01)
    assert is_untouched(stack.touched_words())
    assert 32 * len(stack.touched_words()) == stack.initial_bits
    stack.push(symbols[:1], even)
    assert not is_untouched(stack.touched_words())


@pytest.mark.parametrize("escape", [True, False])
@pytest.mark.parametrize("scale", [-SCALES, 0, 300, 7 * SCALES - 1])
@pytest.mark.parametrize("part", [0, 3, PARTS - 1])
def test_the_frequencies_are_those_of_a_normal_distribution(scale, part, escape):
    found = frequencies(scale, part, escape=escape)
    assert found.sum() == TOTAL
    assert found.min() >= 1
    body = found[:-1] if escape else found
    reach, std = len(body) // 2, 2 ** (scale / SCALES)
    cells = np.arange(-reach, reach + 1) - (part / PARTS - 0.5)
    expected = norm.cdf((cells + 0.5) / std) - norm.cdf((cells - 0.5) / std)
    np.testing.assert_allclose(body / TOTAL, expected, atol=1e-6)


@pytest.mark.parametrize("std", [0.7, 5.0, 100.0, 3e3, 2.0**20])
def test_normal_numbers_cost_their_entropy(std):
    draw = np.random.default_rng(0)
    mean = draw.uniform(-1e6, 1e6, 4000)
    numbers = np.rint(mean + std * draw.standard_normal(4000)).astype(np.int64)
    found = cost(Gaussians.of(mean, np.full(4000, log2(std)), 32), numbers) / 4000
    z = (numbers - mean) / std
    exact = -np.log2(norm.cdf(z + 0.5 / std) - norm.cdf(z - 0.5 / std)).mean()
    assert found == pytest.approx(exact, abs=0.003)


@pytest.mark.parametrize("log2_std", [-60.0, -1.0, 0.0, 3.3, 8.0, 20.0, 50.0])
def test_numbers_far_from_the_mean_come_back(log2_std):
    draw = np.random.default_rng(0)
    mean = draw.choice([-1e9, -3.7, 0.0, 0.5, 12.25, 2e8, 1e30], 300)
    numbers = draw.choice([1 - 2**39, -5, 0, 4, 13, 2**39 - 1], 300)
    some = Gaussians.of(mean, np.full(300, log2_std), 40)
    stack = a_stack()
    before = stack.words()
    some.push(stack, numbers)
    np.testing.assert_array_equal(some.pop(stack), numbers)
    np.testing.assert_array_equal(stack.words(), before)


def test_a_distribution_that_ends_refuses_what_lies_beyond():
    some = Gaussians.of(np.zeros(1), np.zeros(1), None)
    some.push(a_stack(), np.array([6]))
    with pytest.raises(DataError, match="further from its mean"):
        some.push(a_stack(), np.array([60]))


def test_a_number_too_wide_for_its_escape_is_refused():
    some = Gaussians.of(np.zeros(1), np.zeros(1), 10)
    some.push(a_stack(), np.array([511]))
    with pytest.raises(DataError, match="beyond 10 bits"):
        some.push(a_stack(), np.array([512]))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("log_std", [-7.0, -2.0, 0.5])
def test_a_level_costs_what_the_decoder_of_the_bound_says(levels, log_std):
    draw = np.random.default_rng(0)
    mean = draw.uniform(-1.2, 1.2, 200)
    noise = np.exp(log_std) * draw.standard_normal(200)
    numbers = np.rint((np.clip(mean + noise, -1, 1) + 1) * (levels - 1) / 2).astype(np.int64)
    exact = -discretized_gaussian_log_likelihood(
        torch.from_numpy(2 * numbers / (levels - 1) - 1),
        means=torch.from_numpy(mean),
        log_scales=torch.full((200,), log_std, dtype=torch.float64),
        levels=levels,
    ) / np.log(2)
    usual = (exact < 15).numpy()
    some = Values.of(mean[usual], np.full(usual.sum(), log_std / np.log(2)), levels)
    assert usual.sum() > 100
    assert cost(some, numbers[usual]) / usual.sum() == pytest.approx(exact[usual].mean().item(), abs=0.02)


@pytest.mark.parametrize("levels", LEVELS)
def test_every_level_comes_back_whatever_is_predicted(levels):
    draw = np.random.default_rng(0)
    numbers = np.unique(np.concatenate([[0, levels - 1], draw.integers(0, levels, 60)]))
    for mean, log2_std in [(-1.0, -300.0), (1.0, -12.0), (0.3, 0.0), (1e9, 300.0)]:
        some = Values.of(np.full(len(numbers), mean), np.full(len(numbers), log2_std), levels)
        stack = a_stack()
        before = stack.words()
        some.push(stack, numbers)
        np.testing.assert_array_equal(some.pop(stack), numbers)
        np.testing.assert_array_equal(stack.words(), before)


def test_more_values_than_are_held_at_a_time_come_back():
    draw = np.random.default_rng(0)
    numbers = draw.integers(0, 3, 9000)
    some = Values.of(draw.uniform(-1, 1, 9000), np.full(9000, -1.0), 3)
    stack = a_stack()
    some.push(stack, numbers)
    np.testing.assert_array_equal(some.pop(stack), numbers)


def test_a_level_that_does_not_exist_is_refused():
    levels = 300  # 256 and 44: of the second high symbol, most low ones are no levels
    some = Values.of(np.full(1, 1.0), np.full(1, -20.0), levels)
    high, low = some._high(), some._low(np.array([1]))
    stack = a_stack()
    stack.push_rows(np.array([200]), low)
    stack.push_rows(np.array([1]), high)
    with pytest.raises(DataError, match="456, beyond the 300 levels"):
        some.pop(stack)


def test_a_missing_coder_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ArgumentError, match=r"pip install 'perrin\[codec\]'"):
        require()
