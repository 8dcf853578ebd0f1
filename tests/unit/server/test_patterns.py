"""What a client's regular expression may cost."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.wire.patterns import MAX_PATTERN_CHARACTERS, MAX_WEIGHT, _measured, fault_of

ORDINARY = [
    r"^\d{4}-\d{2}-\d{2}$",
    r"^[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9.-]{1,190}\.[A-Za-z]{2,24}$",
    r"^(?:[0-9]{1,3}\.){3}[0-9]{1,3}$",
    r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$",
    r"^(https?://)?([\w-]+\.)+[a-z]{2,10}(/\S*)?$",
    "^.{1,500}$",
    "(.{1,9}){1,9}",
    "^(a+)+$",
]
COSTLY = [
    "(.{1,99}){1,99}",
    "(.{1,999}){1,999}",
    "^(.{1,99}){1,99}$",
    "((((.{1,99}){1,99}){1,99}){1,99}){1,99}",
    "[ab]{1,250}c" * 40,
    ".{0,99}" * 70,
    "([a-z]{1,99} ?){1,99}",
    ".?" * 250,
    "a{1001}",
    "a{1000,}",
    "(?:ab){501}",
    "((a{32}){32}",
    "x" * (MAX_PATTERN_CHARACTERS + 1),
]


@pytest.mark.parametrize("pattern", ORDINARY)
def test_what_people_check_text_with_is_allowed(pattern: str) -> None:
    """Dates, addresses, identifiers, lengths."""
    assert fault_of(pattern) is None


@pytest.mark.parametrize("pattern", COSTLY, ids=lambda pattern: pattern[:24])
def test_what_stalled_an_engine_is_refused(pattern: str) -> None:
    """Repeats of repeats, many of them side by side, many optional parts; groups that are not closed hide nothing."""
    assert fault_of(pattern) is not None


@pytest.mark.parametrize(
    ("pattern", "weight", "optional"),
    [
        ("abc", 3, 0),
        (r"\d{3}[a\]-z]{2}", 5, 0),
        ("[]{9}]{2}", 2, 0),
        ("[^]{9}]{2}", 2, 0),
        ("(ab|c){3}d?", 10, 1),
        ("a{0,4}b{2,}", 7, 1),
        ("(?=a{3})b", 5, 0),
        ("a{x}{,3}", 8, 0),
        ("", 0, 0),
    ],
)
def test_weight_counts_what_is_written_out(pattern: str, weight: int, optional: int) -> None:
    """Classes and escapes are one character, as is the sign of a group; counts multiply what they follow."""
    assert _measured(pattern) == (weight, optional)


@given(st.text(alphabet="a()[]{}|?*+\\^$.,:019", max_size=MAX_PATTERN_CHARACTERS))
def test_any_text_is_measured(pattern: str) -> None:
    """None raises, and none has a negative weight."""
    weight, optional = _measured(pattern)
    assert weight >= 0
    assert 0 <= optional <= len(pattern)


def test_measuring_takes_no_time() -> None:
    """The worst that is short enough: opened groups, and counts of counts."""
    began = time.process_time()
    for pattern in ("(" * 512, "a{9}" * 128, "(a{999999999})" * 36, "[" * 512, "{" * 512):
        fault_of(pattern)
    assert time.process_time() - began < 0.5
    assert MAX_WEIGHT == 1000
