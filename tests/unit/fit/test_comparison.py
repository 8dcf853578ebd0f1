"""Comparisons: what is said of them is what their rates say."""

from __future__ import annotations

from typing import Any

import pytest

from steering.fit.comparison import beside_entry

REFUSALS, PLAIN = "loses refusals beyond the margin", "loses plain answers beyond the margin"
UNSTEERED = {"refuse": 0.94, "over": 0.98, "plain": 0.11}


def _rates(refuse: float, over: float, plain: float) -> dict[str, Any]:
    return {"comply_below": 0.2, "refuse_above": 0.9, "rates": {"refuse": refuse, "over": over, "plain": plain}}


def _measured(one: dict[str, Any], other: dict[str, Any]) -> str:
    entry = beside_entry("what", {"mine": one}, {"theirs": other}, UNSTEERED, safety_margin=0.015, plain_margin=0.0)
    assert (entry["in_place"], entry["beside"]) == ("mine", "theirs")
    assert entry["rates"] == {"mine": one, "theirs": other}
    assert not {"kept", "lost"} & entry.keys(), "nothing was chosen by these rates"
    return str(entry["measured"])


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        (
            _rates(0.93, 0.46, 0.11),
            _rates(0.88, 0.33, 0.14),
            ("13.0 points more", "keeps both margins", f"{REFUSALS} and {PLAIN}"),
        ),
        (
            _rates(0.92, 0.30, 0.11),
            _rates(0.93, 0.82, 0.12),
            ("52.0 points fewer", REFUSALS, PLAIN),
        ),
        (
            _rates(0.94, 0.98, 0.11),
            _rates(0.94, 0.98, 0.11),
            ("as many", "keeps both margins", "keeps both margins"),
        ),
    ],
)
def test_a_verdict_is_that_of_the_rates(one: dict[str, Any], other: dict[str, Any], says: tuple[str, str, str]) -> None:
    """Better or worse, and which margins are kept: whatever is in place, it is told when the other does better."""
    order, mine, theirs = says
    assert _measured(one, other) == f"{order} over-refusals; mine: {mine}; theirs: {theirs}"
