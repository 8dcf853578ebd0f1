"""Patterns: regular expressions that a client sends, and what they may cost whoever compiles and follows them.

A grammar compiler writes counted repeats out and looks at every way to match, for every generated token: some ten
characters keep an engine's only loop busy for seconds. Knows nothing of schemas.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_PATTERN_CHARACTERS = 512
MAX_WEIGHT = 1000
"""Characters that a pattern may match one after the other once its counted repeats are written out."""

MAX_OPTIONAL = 64
"""Parts that may be left out: each doubles the ways to match."""

_COUNTED = re.compile(r"\{(\d{1,9})(?:(,)(\d{0,9}))?\}")


@dataclass(slots=True)
class _Group:
    """What was read of a group, and of the part of it that a quantifier would repeat."""

    weight: int = 0
    last: int = 0


def fault_of(pattern: str) -> str | None:
    """What is too much about a pattern, as the end of a sentence about it; None where nothing is.

    Takes time in proportion to its length. What is no regular expression at all is left to whoever compiles it.
    """
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        return f"must have at most {MAX_PATTERN_CHARACTERS} characters"
    weight, optional = _measured(pattern)
    if weight > MAX_WEIGHT:
        return f"must match at most {MAX_WEIGHT} characters once its counted repeats are written out"
    if optional > MAX_OPTIONAL:
        return f"must have at most {MAX_OPTIONAL} parts that may be left out"
    return None


def _measured(pattern: str) -> tuple[int, int]:
    """Weight of a pattern and its optional parts."""
    groups, optional, at = [_Group()], 0, 0
    while at < len(pattern):
        group, character, step = groups[-1], pattern[at], 1
        counted = _COUNTED.match(pattern, at) if character == "{" else None
        if character == "(":
            groups.append(_Group())
            step = 2 if pattern.startswith("(?", at) else 1
        elif character == ")" and len(groups) > 1:
            _add(groups[-2], max(1, groups.pop().weight))
        elif counted is not None:
            least, comma, most = counted.groups()
            times = int(most) if most else int(least) + bool(comma)
            group.weight += group.last * (max(times, 1) - 1)
            group.last *= max(times, 1)
            optional += int(least) == 0
            step = counted.end() - at
        elif character in "?*+":
            optional += character == "?"
        elif character == "|":
            group.last = 0
        else:
            step = _length(pattern, at)
            _add(group, 1)
        at += step
    # Groups that are never closed count as if they were.
    return sum(group.weight for group in groups), optional


def _add(group: _Group, weight: int) -> None:
    group.weight, group.last = group.weight + weight, weight


def _length(pattern: str, at: int) -> int:
    """Characters of a single one, an escape or a class."""
    if pattern[at] == "\\":
        return 2
    if pattern[at] != "[":
        return 1
    end = at + 1 + pattern.startswith("^", at + 1)
    end += pattern.startswith("]", end)  # the first of a class stands for itself
    while end < len(pattern) and pattern[end] != "]":
        end += 2 if pattern[end] == "\\" else 1
    return end + 1 - at
