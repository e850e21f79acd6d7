"""Which times a sampler visits, and the inverse of the schedule that some of them take."""

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest

from perrin import GaussianDiffusion, ModelMeanType, SamplerDDIM, SamplerDDPM, get_named_beta_schedule
from perrin.errors import ArgumentError
from perrin.noise import level_at
from perrin.samplers import grid_times
from perrin.samplers.grids import MAX_SIGMA, RHO
from perrin.schedules import log_snr_linear_betas, zero_terminal_snr

GRIDS = "uniform", "quadratic", "trailing", "log-snr", "karras"
BY_LEVEL = "log-snr", "karras"
each = pytest.mark.parametrize("grid", GRIDS)


def chain(name: str = "linear", total: int = 1000, terminal: bool = False) -> GaussianDiffusion:
    betas = get_named_beta_schedule(name, total)
    return GaussianDiffusion(
        betas=zero_terminal_snr(betas) if terminal else betas, model_mean_type=ModelMeanType.VELOCITY
    )


def counts(total: int) -> list[int]:
    return sorted({1, 2, 3, 10, 37, total // 2, total - 1, total} & set(range(1, total + 1)))


def noise(diffusion: GaussianDiffusion, t: float) -> float:
    """sigma / alpha."""
    level = diffusion.level_of_batch(t)
    return level.sigma / level.alpha


def check(times: Sequence[float], count: int, total: int) -> None:
    assert len(times) == count
    assert all(t > s for t, s in pairwise(times))
    assert 0 <= times[-1] <= times[0] <= total - 1


# The times


@each
@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("total", [2, 3, 100, 1000, 4000])
def test_there_are_as_many_falling_times_as_asked(grid: str, terminal: bool, name: str, total: int) -> None:
    diffusion = chain(name, total, terminal)
    for count in counts(total):
        check(grid_times(diffusion, grid, count), count, total)
        whole = grid_times(diffusion, grid, count, whole=True)
        check(whole, count, total)
        assert all(isinstance(t, int) for t in whole)


@each
def test_a_chain_of_one_step_has_one_time(grid: str) -> None:
    diffusion = GaussianDiffusion(betas=[0.3])
    assert grid_times(diffusion, grid) == grid_times(diffusion, grid, 1) == (0,)


@each
@pytest.mark.parametrize("total", [2, 10, 300])
def test_none_is_as_many_times_as_the_chain_has(grid: str, total: int) -> None:
    diffusion = chain(total=total)
    check(grid_times(diffusion, grid), total, total)
    assert grid_times(diffusion, grid, whole=True) == tuple(range(total - 1, -1, -1))


@pytest.mark.parametrize("grid", ["uniform", "quadratic", "trailing"])
def test_the_grids_in_time_begin_at_the_noisiest_and_are_whole(grid: str) -> None:
    for count in counts(1000):
        times = grid_times(chain("cosine"), grid, count)
        assert times[0] == 999
        assert all(isinstance(t, int) for t in times)


@pytest.mark.parametrize("grid", ["uniform", "quadratic", *BY_LEVEL])
@pytest.mark.parametrize("terminal", [False, True])
def test_the_grids_with_both_ends_end_at_the_first_timestep(grid: str, terminal: bool) -> None:
    for count in (3, 10, 1000):
        assert grid_times(chain(terminal=terminal), grid, count)[-1] == 0


def test_each_grid_is_even_in_its_own_measure() -> None:
    diffusion = GaussianDiffusion(betas=log_snr_linear_betas(1000, 9.0, -8.0))
    measures = {
        "uniform": lambda t: t,
        "quadratic": math.sqrt,
        "trailing": lambda t: t,
        "log-snr": lambda t: diffusion.level_of_batch(t).log_snr,
        "karras": lambda t: noise(diffusion, t) ** (1 / RHO),
    }
    for grid, measure in measures.items():
        places = [measure(t) for t in grid_times(diffusion, grid, 10)]
        gaps = [later - earlier for later, earlier in pairwise(places)]
        assert max(gaps) / min(gaps) == pytest.approx(1, abs=0.06 if grid == "quadratic" else 0.02)


def test_the_uniform_and_trailing_times_are_the_published_ones() -> None:
    assert grid_times(chain(), "uniform", 5) == (999, 749, 500, 250, 0)
    assert grid_times(chain(), "trailing", 5) == (999, 799, 599, 399, 199)  # arXiv:2305.08891 table 2


def test_the_karras_levels_are_those_of_edm() -> None:
    diffusion = chain("cosine")
    low, found = noise(diffusion, 0), [noise(diffusion, t) for t in grid_times(diffusion, "karras", 6)]
    ends = MAX_SIGMA ** (1 / 7), low ** (1 / 7)
    expected = [(ends[0] + i / 5 * (ends[1] - ends[0])) ** 7 for i in range(6)]  # arXiv:2206.00364 eq. 5
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("total", [1000, 4000])
@pytest.mark.parametrize("grid", BY_LEVEL)
def test_cosine_chains_begin_where_sigma_is_80_alpha(grid: str, total: int) -> None:
    diffusion = chain("cosine", total)
    assert noise(diffusion, total - 1) > 2e4
    for count in (1, 2, 20, total):
        assert noise(diffusion, grid_times(diffusion, grid, count)[0]) == pytest.approx(80, rel=1e-9)


@pytest.mark.parametrize("grid", BY_LEVEL)
def test_chains_with_less_noise_begin_at_their_last_timestep(grid: str) -> None:
    diffusion = GaussianDiffusion(betas=[0.02] * 100)
    assert noise(diffusion, 99) < MAX_SIGMA
    assert grid_times(diffusion, grid, 5)[0] == 99


@pytest.mark.parametrize("grid", [*BY_LEVEL, "uniform", "trailing"])
@pytest.mark.parametrize("total", [2, 50, 1000])
def test_chains_without_signal_at_the_end_begin_there(grid: str, total: int) -> None:
    diffusion = chain(total=total, terminal=True)
    for count in counts(total):
        times = grid_times(diffusion, grid, count)
        assert times[0] == total - 1
        assert all(diffusion.level_of_batch(t).alpha > 0 for t in times[1:])


def test_rounded_times_lie_next_to_the_fractional_ones() -> None:
    diffusion = chain("cosine")
    exact, whole = (grid_times(diffusion, "log-snr", 20, whole=whole) for whole in (False, True))
    assert max(abs(t - s) for t, s in zip(exact, whole, strict=True)) <= 1
    assert any(t != s for t, s in zip(exact, whole, strict=True))


# Lists and mistakes


@pytest.mark.parametrize("own", [[9, 4, 0], (9, 4.5, 1), [9.0, 4, 0, -1], [3.25]])
def test_a_list_of_times_is_taken_as_it_is(own: Sequence[float]) -> None:
    diffusion = chain(total=10)
    times = tuple(t for t in own if t != -1)
    assert grid_times(diffusion, own) == grid_times(diffusion, own, len(times)) == times
    assert SamplerDDIM(diffusion, grid=own).times == (*times, -1)


def test_whole_numbers_in_a_list_are_integers() -> None:
    assert all(isinstance(t, int) for t in grid_times(chain(total=10), [9.0, 3.0], whole=True))


@pytest.mark.parametrize(
    ("own", "shown"),
    [
        ([], r"\[\]"),
        ([-1], r"\[-1\]"),
        ([10, 3], r"\[10, 3\]"),
        ([3, 3], r"\[3, 3\]"),
        ([3, 5], r"\[3, 5\]"),
        ([3, -0.5], r"\[3, -0.5\]"),
        ([7, -1, 3], r"\[7, -1, 3\]"),
        ([7, math.nan, 3], r"\[7, nan, 3\]"),
        ([math.inf, 3], r"\[inf, 3\]"),
        ([*range(12)], r"\[0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\]"),
    ],
)
def test_lists_that_do_not_fall_within_the_chain_are_refused(own: list[float], shown: str) -> None:
    with pytest.raises(ArgumentError, match=f"grid must hold falling times from 0 to 9, got {shown}"):
        grid_times(chain(total=10), own)


def test_a_list_of_another_length_than_steps_is_refused() -> None:
    with pytest.raises(ArgumentError, match="steps must be 3, the number of times in grid, or None, got 4"):
        grid_times(chain(total=10), [9, 4, 0], 4)


def test_fractional_times_are_refused_where_only_whole_ones_have_a_meaning() -> None:
    previous = GaussianDiffusion(
        betas=get_named_beta_schedule("linear", 10), model_mean_type=ModelMeanType.PREVIOUS_X
    )
    for make, diffusion in ((SamplerDDPM, chain(total=10)), (SamplerDDIM, previous)):
        with pytest.raises(ArgumentError, match=r"grid must hold whole times .*, got \[9, 4.5\]"):
            make(diffusion, grid=[9, 4.5])


@pytest.mark.parametrize("name", ["even", "", "Karras"])
def test_another_name_is_refused_with_those_there_are(name: str) -> None:
    expected = f"grid must be one of {', '.join(GRIDS)} or a list of times, got '{name}'"
    with pytest.raises(ArgumentError, match=expected):
        grid_times(chain(), name)


@each
@pytest.mark.parametrize("steps", [0, -3, 11, 2.5])
def test_steps_out_of_range_are_refused(grid: str, steps: int) -> None:
    with pytest.raises(ArgumentError, match=f"steps must be from 1 to 10, got {steps}"):
        grid_times(chain(total=10), grid, steps)


# The inverse of the schedule


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_time_of_inverts_the_schedule(name: str) -> None:
    diffusion = chain(name, 200)
    for t in (0, 0.25, 1, 17, 17.5, 100.001, 198.75, 199):
        assert diffusion.time_of(diffusion.level_of_batch(t).log_snr) == pytest.approx(t, abs=1e-9)


def test_time_of_a_timestep_is_whole() -> None:
    diffusion = chain("cosine", 50)
    assert [diffusion.time_of(diffusion.log_snr(t)) for t in range(50)] == list(range(50))


def test_time_of_is_linear_in_log_snr_between_timesteps() -> None:
    diffusion = chain("cosine", 50)
    first, second = diffusion.log_snr(20), diffusion.log_snr(21)
    assert diffusion.time_of(0.3 * first + 0.7 * second) == pytest.approx(20.7)
    level = diffusion.level_of_batch(20.7)
    assert level == pytest.approx(level_at(0.3 * first + 0.7 * second))


def test_time_of_knows_the_end_without_signal() -> None:
    diffusion = chain(total=50, terminal=True)
    assert diffusion.log_snr(49) == -math.inf
    assert diffusion.time_of(-math.inf) == 49
    assert diffusion.time_of(diffusion.log_snr(48)) == 48
    assert diffusion.time_of(diffusion.log_snr(48) - 5) == 48  # nothing lies between in log-SNR


@pytest.mark.parametrize("log_snr", [-30.0, 30.0, math.nan])
def test_levels_outside_the_chain_have_no_time(log_snr: float) -> None:
    with pytest.raises(ArgumentError, match=f"log_snr must be from -10.1177 to 9.21024, got {log_snr:g}"):
        chain().time_of(log_snr)


@pytest.mark.parametrize("grid", ["log-snr", "karras"])
@pytest.mark.parametrize(("keep", "times"), [([999], (0,)), ([998, 999], (1, 0))])
def test_a_chain_of_much_noise_alone_still_has_its_grids(
    grid: str, keep: list[int], times: tuple[int, ...]
) -> None:
    for name in ("linear", "cosine"):
        assert grid_times(chain(name).respaced(keep), grid) == times
