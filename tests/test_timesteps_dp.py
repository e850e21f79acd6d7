"""The best timesteps by dynamic programming, and the rules of thumb."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perrin.errors import ArgumentError, ShapeError
from perrin.likelihood.timesteps import (
    SPACINGS,
    BestTimesteps,
    dense_head_timesteps,
    even_timesteps,
    quadratic_timesteps,
)


def random_costs(total, seed=0):
    """Costs (T, T) of which no two are equal."""
    costs = torch.rand(total, total, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    above = torch.arange(total)[None] > torch.arange(total)[:, None]  # column s + 1 needs s < t
    return costs.masked_fill(above, torch.inf)


def cost_of(costs, path):
    return float(costs[path[0], 0] + sum(costs[t, s + 1] for s, t in pairwise(path)))


@pytest.mark.parametrize("seed", range(3))
def test_no_choice_of_timesteps_costs_less(seed):
    costs = random_costs(8, seed)
    best = BestTimesteps(costs)
    assert best.most == 8
    for steps in range(1, 9):
        every = [[*some, 7] for some in combinations(range(7), steps - 1)]
        expected = min(every, key=lambda path: cost_of(costs, path))
        assert best.timesteps(steps) == expected
        assert float(best.totals[steps - 1]) == pytest.approx(cost_of(costs, expected), abs=1e-12)


def test_long_chains_are_added_up_block_by_block():
    costs = random_costs(300)
    best = BestTimesteps(costs, 3)
    t = 299
    ends = costs[:, 0]
    twice = torch.stack(
        [(costs[t, 1 : t + 1] + ends[:t]).min() if t else torch.tensor(torch.inf) for t in range(300)]
    )
    assert float(best.totals[1]) == float(twice[t])
    assert float(best.totals[2]) == float((costs[t, 1 : t + 1] + twice[:t]).min())
    assert cost_of(costs, best.timesteps(3)) == pytest.approx(float(best.totals[2]), abs=1e-12)


def test_all_timesteps_are_the_whole_chain():
    costs = random_costs(20)
    best = BestTimesteps(costs)
    assert best.timesteps(20) == list(range(20))
    assert float(best.totals[-1]) == pytest.approx(cost_of(costs, range(20)), rel=1e-12)


def test_a_single_step_is_the_decoder_at_the_end():
    costs = random_costs(5)
    best = BestTimesteps(costs)
    assert best.timesteps(1) == [4]
    assert best.totals[0] == costs[4, 0]


@pytest.mark.parametrize("steps", [0, 5])
def test_steps_out_of_range_are_refused(steps):
    best = BestTimesteps(random_costs(6), 4)
    with pytest.raises(ArgumentError, match=f"steps must be from 1 to 4, got {steps}"):
        best.timesteps(steps)


def test_costs_must_be_square():
    with pytest.raises(ShapeError, match=r"\(T, T\), got \(2, 3\)"):
        BestTimesteps(torch.zeros(2, 3))


@pytest.mark.parametrize("spacing", SPACINGS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_spacing_gives_as_many_distinct_timesteps_as_asked_up_to_the_end(spacing, data):
    total = data.draw(st.integers(1, 1200))
    steps = data.draw(st.integers(1, total))
    found = SPACINGS[spacing](total, steps)
    assert len(found) == steps
    assert found == sorted(set(found))
    assert found[0] >= 0
    assert found[-1] == total - 1


def test_the_spacings_are_what_their_names_say():
    assert even_timesteps(10, 4) == [0, 3, 6, 9]
    assert quadratic_timesteps(101, 5) == [0, 6, 25, 56, 100]
    assert quadratic_timesteps(10, 8) == [0, 1, 2, 3, 4, 5, 7, 9]  # squares would repeat themselves at first
    assert dense_head_timesteps(1000, 64)[:18] == [*range(16), 16, 37]
    assert dense_head_timesteps(1000, 4) == [0, 1, 2, 999]
