"""Random numbers depend on their key and on nothing else."""

import torch

from perrin.randomness import generator_for, normal_rows, seed_of


def test_a_seed_is_a_function_of_its_key() -> None:
    assert seed_of("train", 0, 5) == seed_of("train", 0, 5)
    assert 0 <= seed_of("train", 0, 5) < 2**63


def test_a_seed_stays_the_same_between_versions() -> None:
    """A run that is resumed, or samples drawn again, rest on this number."""
    assert seed_of(0) == 7210762507766007076


def test_keys_that_differ_anywhere_give_different_seeds() -> None:
    keys = [(a, b) for a in range(40) for b in range(40)] + [("1", 1), (1, "1"), (11,), (1, 1, 1), ()]
    assert len({seed_of(*key) for key in keys}) == len(keys)


def test_generators_start_from_their_key_whatever_ran_before() -> None:
    torch.manual_seed(1)
    first = torch.randn(4, generator=generator_for("cpu", 3, "x"))
    torch.randn(7)
    again = torch.randn(4, generator=generator_for("cpu", 3, "x"))
    other = torch.randn(4, generator=generator_for("cpu", 4, "x"))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, other)


def test_nothing_touches_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    normal_rows(torch.zeros(2, 3), [generator_for("cpu", i) for i in range(2)])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    like = torch.zeros(4, 3, 2, 2)
    together = normal_rows(like, [generator_for("cpu", i) for i in range(4)])
    alone = normal_rows(like[:1], [generator_for("cpu", 2)])
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=0)
    channels_last = like.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        normal_rows(channels_last, [generator_for("cpu", i) for i in range(4)]), together, rtol=0, atol=0
    )


def test_rows_are_standard_normal_in_the_dtype_asked_for() -> None:
    rows = normal_rows(
        torch.zeros(4, 20000, dtype=torch.float64), (generator_for("cpu", i) for i in range(4))
    )
    assert rows.dtype is torch.float64
    torch.testing.assert_close(rows.mean(1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=0.04)
    torch.testing.assert_close(rows.std(1), torch.ones(4, dtype=torch.float64), rtol=0, atol=0.03)
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.04
