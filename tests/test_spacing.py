"""Which timesteps a shorter chain keeps: exact counts with both ends, and the reference's own rounding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perrin import space_timesteps
from perrin.errors import ArgumentError


def accumulated_sections(num_timesteps: int, counts: list[int]) -> set[int]:
    """The reference's rule: positions summed up in floating point, then rounded half to even."""
    chosen: list[int] = []
    lengths = [num_timesteps // len(counts)] * len(counts)
    for i in range(num_timesteps % len(counts)):
        lengths[i] += 1
    for i, count in enumerate(counts):
        step = 1 if count <= 1 else (lengths[i] - 1) / (count - 1)
        position = 0.0
        for _ in range(count):
            chosen.append(sum(lengths[:i]) + round(position))
            position += step
    return set(chosen)


@pytest.mark.parametrize("num_timesteps", [1, 2, 10, 100, 999, 1000])
def test_even_spacing_is_exact_for_every_count(num_timesteps: int) -> None:
    for count in range(1, num_timesteps + 1):
        kept = sorted(space_timesteps(num_timesteps, count))
        assert len(kept) == count
        assert kept[-1] == num_timesteps - 1
        assert kept[0] == (0 if count > 1 else num_timesteps - 1)
        if count > 2:
            gaps = np.diff(kept)
            assert gaps.min() >= 1
            assert gaps.max() - gaps.min() <= 1


def test_even_spacing_takes_numpy_integers() -> None:
    assert space_timesteps(10, np.int64(2)) == {0, 9}


def test_the_documented_example_of_sections() -> None:
    """Of 300 timesteps in three sections of 100: 10, 15 and 20 of them."""
    kept = sorted(space_timesteps(300, "10,15,20"))
    assert [sum(100 * i <= t < 100 * (i + 1) for t in kept) for i in range(3)] == [10, 15, 20]
    assert kept[:10] == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    # Seven strides of 99 / 14 sum up to just below 49.5, which a product would round to 50.
    assert kept[10:25] == [100, 107, 114, 121, 128, 135, 142, 149, 157, 164, 171, 178, 185, 192, 199]
    assert kept[25:] == [200 + round(i * 99 / 19) for i in range(20)]
    assert space_timesteps(300, [10, 15, 20]) == set(kept)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("1", {0}), ("1,1,1", {0, 334, 667}), ("2,1", {0, 499, 500}), ("1000", set(range(1000)))],
)
def test_section_specs_keep_the_reference_rounding(spec: str, expected: set[int]) -> None:
    assert space_timesteps(1000, spec) == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.data())
def test_sections_accumulate_their_stride(sections: int, data: st.DataObject) -> None:
    num_timesteps = data.draw(st.integers(sections, 1200))
    counts = data.draw(
        st.lists(st.integers(1, num_timesteps // sections), min_size=sections, max_size=sections)
    )
    spec = ",".join(map(str, counts))
    assert space_timesteps(num_timesteps, spec) == accumulated_sections(num_timesteps, counts)


@pytest.mark.parametrize("count", [25, 50, 100, 250, 400, 4000])
def test_the_usual_counts_of_4000_accumulate_their_stride(count: int) -> None:
    assert space_timesteps(4000, str(count)) == accumulated_sections(4000, [count])


def test_accumulation_differs_from_multiplication_somewhere() -> None:
    """So that the test above can fail: this is a case where rounding i * stride gives another timestep."""
    different = [
        (num_timesteps, count)
        for num_timesteps in range(2, 200)
        for count in range(2, num_timesteps)
        if accumulated_sections(num_timesteps, [count])
        != {round(i * (num_timesteps - 1) / (count - 1)) for i in range(count)}
    ]
    assert different
    for num_timesteps, count in different:
        kept = space_timesteps(num_timesteps, str(count))
        assert kept == accumulated_sections(num_timesteps, [count])


@pytest.mark.parametrize("count", [1, 2, 10, 20, 25, 50, 100, 250, 500, 1000])
def test_ddim_specs_are_a_stride_from_zero(count: int) -> None:
    assert space_timesteps(1000, f"ddim{count}") == set(range(0, 1000, 1000 // count))


def test_ddim_specs_exist_for_the_counts_that_a_stride_gives() -> None:
    possible = {len(range(0, 1000, stride)) for stride in range(1, 1001)}
    for count in range(1, 1001):
        if count in possible:
            assert len(space_timesteps(1000, f"ddim{count}")) == count
        else:
            with pytest.raises(
                ArgumentError, match=f"no integer stride of 1000 timesteps gives 'ddim{count}'"
            ):
                space_timesteps(1000, f"ddim{count}")


@pytest.mark.parametrize(
    "spec",
    [
        0,
        -1,
        11,
        "0",
        "",
        "11",
        "5,6",
        "5,0",
        "ten",
        "1,,2",
        "ddim0",
        "ddim",
        "ddim-5",
        "ddim7",
        "ddim1.5",
        [],
    ],
)
def test_impossible_spacings_are_refused(spec: int | str | list[int]) -> None:
    with pytest.raises(ArgumentError):
        space_timesteps(10, spec)


def test_more_sections_than_timesteps_are_refused() -> None:
    with pytest.raises(ArgumentError, match="section 2 of 0 timesteps cannot be spaced into 1"):
        space_timesteps(2, "1,1,1")
