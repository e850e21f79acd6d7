"""How results are worded for people, and which numbers JSON gets."""

import math

import pytest

from perrin.cli.console import cost_text, many, plain


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 steps"), (1, "1 step"), (1.0, "1 step"), (1.5, "1.5 steps"), (20, "20 steps")]
)
def test_one_has_no_plural(count, text):
    assert many(count, "step") == text


@pytest.mark.parametrize(
    ("calls", "text"),
    [(None, ""), (1.0, ", 1 network call each"), (2.5, ", 2.5 network calls each")],
)
def test_the_cost_goes_on_a_line_where_there_is_one(calls, text):
    assert cost_text(calls) == text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_gets_null_for_what_is_not_finite(value):
    assert plain({"bpd": value}) == {"bpd": None}


def test_json_gets_everything_else_as_it_is():
    figures = {"bpd": 1.5, "n": 3, "table": "x.csv", "curve": [2.5, True], "better": None}
    assert plain(figures) == figures


def test_json_gets_null_however_deep_the_number_lies():
    figures = {"a": {"bpd": math.nan}, "curve": [(math.inf, 1.0), {"se": math.nan}]}
    assert plain(figures) == {"a": {"bpd": None}, "curve": [[None, 1.0], {"se": None}]}
