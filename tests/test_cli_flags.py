"""Flags by the names of the options' fields, and the check that several of them share."""

import re
from dataclasses import dataclass

import pytest

from perrin.cli.flags import check_at_least, flag_of
from perrin.errors import ArgumentError


@dataclass(frozen=True)
class Options:
    batch_size: int = 1
    limit: int | None = None


@pytest.mark.parametrize(("name", "flag"), [("seed", "--seed"), ("batch_size_a", "--batch-size-a")])
def test_a_flag_has_the_name_of_its_field(name, flag):
    assert flag_of(name) == flag


@pytest.mark.parametrize("options", [Options(), Options(3, 1)])
def test_options_that_are_large_enough_or_not_given_pass(options):
    check_at_least(options, ("batch_size", "limit"))


@pytest.mark.parametrize(
    ("options", "least", "message"),
    [
        (Options(0), 1, "--batch-size must be at least 1, got 0"),
        (Options(9, -2), 1, "--limit must be at least 1, got -2"),
        (Options(15), 16, "--batch-size must be at least 16, got 15"),
        (Options(0, 0), 1, "--batch-size must be at least 1, got 0"),
    ],
)
def test_the_first_that_is_too_small_is_named(options, least, message):
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        check_at_least(options, ("batch_size", "limit"), least)


def test_only_the_named_options_are_checked():
    check_at_least(Options(0), ("limit",))
