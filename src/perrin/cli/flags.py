"""Flags to typed options: tyro reads them, and each of its error boxes becomes one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import TypeVar

import tyro
from tyro.constructors import ConstructorRegistry

from perrin.errors import ArgumentError, ConfigError

Options = TypeVar("Options")

MARKERS = (tyro.conf.OmitArgPrefixes, tyro.conf.PositionalMetavarFromFieldName)

FLAG = re.compile(r"--?\w[\w-]*(, --?\w[\w-]*)*( [A-Z{\[].*)?")
"""A flag with its other names and what it takes: ``--steps {None}|INT``; no sentence that begins with a flag."""

MISFIT = re.compile(
    r"(?P<flag>-\S+): (no type matching (?P<kinds>.+) could be instantiated from|Could not find valid parse for "
    r"arguments:|invalid literal for int\(\) with base 10:|could not convert string to float:) "
    r"(?P<got>.*?)(\. Got errors:.*)?"
)
"""What a box says of values that are not of a flag's kind, with what came."""

NUMBERS = {"INT": "whole number", "FLOAT": "number"}


def parse(
    options: type[Options], args: Sequence[str], *, command: str, registry: ConstructorRegistry | None = None
) -> Options:
    """The ``options`` that ``args`` give; ``--help`` prints and exits.

    Raises `ConfigError`, one line, for an unknown flag, a missing argument or a value of the wrong kind.
    """
    with _errors_on_one_line():
        return tyro.cli(options, args=list(args), prog=f"perrin {command}", config=MARKERS, registry=registry)


def parse_known(options: type[Options], args: Sequence[str]) -> Options:
    """The ``options`` among ``args``, whatever else is there. Raises `ConfigError` for a value of the wrong kind."""
    with _errors_on_one_line():
        return tyro.cli(options, args=list(args), add_help=False, return_unknown_args=True)[0]


def flag_of(name: str) -> str:
    """The flag of an option's field: ``--batch-size`` for ``batch_size``."""
    return f"--{name.replace('_', '-')}"


def check_at_least(options: object, names: Iterable[str], least: int = 1) -> None:
    """Raise `ArgumentError` unless the ``options`` called ``names`` are at least ``least``, or None."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise ArgumentError(f"{flag_of(name)} must be at least {least}, got {value}")


@contextmanager
def named_as_flags(*names: str) -> Iterator[None]:
    """Within it, an `ArgumentError` that begins with one of ``names``, which are arguments, begins with its flag."""
    try:
        yield
    except ArgumentError as error:
        name, _, rest = str(error).partition(" ")
        if name not in names:
            raise
        raise ArgumentError(f"{flag_of(name)} {rest}") from None


@contextmanager
def _errors_on_one_line() -> Iterator[None]:
    boxes = StringIO()
    try:
        with redirect_stderr(boxes):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(one_line(boxes.getvalue())) from None


def one_line(box: str) -> str:
    """What a tyro error box says, with the flags that it proposes, on one line.

    A box is a title, then sections divided by rules; where the terminal has no UTF-8, all of it in ASCII.
    """
    rows = [row.rstrip("│ ") for row in box.splitlines() if not row.startswith(("╭", "╰"))]
    sections: list[list[str]] = [[]]
    for row in filter(None, rows):
        if set(row.lstrip("│ ")) in ({"─"}, {"-"}):
            sections.append([])
        else:
            sections[-1].append(row)
    headline, *others = sections if box.startswith("╭") else sections[1:] or sections
    message = _lower(" ".join(row.lstrip("│ ") for row in headline).removeprefix("Error parsing "))
    proposed = [row for section in others for row in section]
    flags = " or ".join(_flags(proposed))
    message = message.replace("Expected 1 values", "Expected 1 value")
    misfit = MISFIT.fullmatch(message)
    if misfit is not None:
        return _misfit(misfit["flag"], misfit["kinds"] or "", misfit["got"], flags)
    label = "perhaps you meant" if any("Perhaps you meant:" in row for row in proposed) else "expected"
    return f"{message} ({label} {flags})" if flags else message


def _flags(rows: Sequence[str]) -> list[str]:
    """The flags among ``rows``: their descriptions, which may begin a row with another flag, are further in."""
    found = [row.lstrip("│ ") for row in rows]
    depths = [len(row) - len(text) for row, text in zip(rows, found, strict=True)]
    named = [(depth, text) for depth, text in zip(depths, found, strict=True) if FLAG.fullmatch(text)]
    least = min((depth for depth, _ in named), default=0)
    return [text for depth, text in named if depth == least]


def _misfit(flag: str, kinds: str, got: str, expected: str) -> str:
    """What ``flag`` takes, and the values that it ``got``; ``kinds`` and ``expected`` are tyro's words for the first.

    ``--steps must be a whole number, got 'a'``; ``--box takes 4 whole numbers (TOP LEFT HEIGHT WIDTH), got 0 0 4``.
    """
    named = _kind(re.sub(r"^-\S+ |, -.*", "", expected))
    kind = _kind(kinds) or named
    number = NUMBERS.get(kind.strip("[").split(" ")[0])
    values = [one or other for one, other in re.findall(r"'([^']*)'|\"([^\"]*)\"", got)]
    came = " ".join(values) or "nothing"
    if number is None:
        return f"{flag} takes {named}, got {came}"
    if " " not in kind:
        return f"{flag} must be a {number}, got {came!r}"
    count = None if "[" in kind else len(kind.split())
    names = "" if named == kind else f" ({named})"
    stray = len(values) > (count or 1) and not _is_number(values[-1])
    hint = f": what belongs to no flag goes before {flag}" if stray else ""
    return f"{flag} takes {'' if count is None else f'{count} '}{number}s{names}, got {came}{hint}"


def _kind(text: str) -> str:
    """tyro's word for a kind of values, without the None that stands for no value."""
    return re.sub(r"\{None\}\||[{}]", "", text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _lower(text: str) -> str:
    return re.sub(r"^[A-Z](?=[a-z])", lambda match: match[0].lower(), text)
