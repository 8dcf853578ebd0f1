"""Outcomes and responses survive their way as bytes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from steering.outcome import Outcome, Rejection, Response, Scores, report_from_bytes, report_to_bytes
from steering.plan import Decision, Reasoning, Scope


@given(
    request_id=st.text(),
    error=st.text(),
    strength=st.floats(width=32, allow_nan=False),
    scope=st.sampled_from(Scope),
    applied=st.booleans(),
    score=st.floats(allow_nan=False),
)
def test_everything_a_step_made_known_comes_out_as_it_went_in(
    request_id: str, error: str, strength: float, scope: Scope, applied: bool, score: float
) -> None:
    """Every field of every kind of outcome, of responses and of rejections."""
    plain = Outcome(
        plan_id="p", request_id=request_id, applied=applied, edit="e", strength=strength, scope=scope, error=error
    )
    decided = replace(
        plain, decision=Decision.COMPLY, category="c", scores=Scores(names=("c", "d"), logits=(-2.0, 0.75, score))
    )
    for report in (
        plain,
        decided,
        replace(plain, reasoning=Reasoning.SPARED, edit=None),
        Response(plan_id="p", request_id=request_id, tokens=3, score=score),
        Rejection(plan_id="p", error={"message": error, "code": None}),
    ):
        assert report_from_bytes(report_to_bytes(report)) == report


def test_probabilities_of_any_score() -> None:
    """No score overflows."""
    chances = [Response(plan_id="p", request_id="r", tokens=1, score=score).probability for score in (-1e6, 0.0, 1e6)]
    assert chances == [0.0, 0.5, 1.0]


def test_probabilities_of_a_prompt_are_a_sigmoid_and_a_softmax() -> None:
    """What is reported: the refusal probability, and categories that sum to 1, at any finite score."""
    names = ("safety", "political", "humanizing")
    found = Scores(names=names, logits=(math.log(0.25 / 0.75), 1.0, 0.0, -1.0))
    assert found.refusal == pytest.approx(0.25)
    assert list(found.categories) == list(names)
    assert sum(found.categories.values()) == pytest.approx(1.0)
    assert found.categories["safety"] == pytest.approx(math.exp(1) / (math.exp(1) + 1 + math.exp(-1)))
    for score, expected in ((-3e38, 0.0), (3e38, 1.0)):
        extreme = Scores(names=names, logits=(score, 3e38, 0.0, -3e38))
        assert extreme.refusal == expected
        assert list(extreme.categories.values()) == [1.0, 0.0, 0.0]
    assert Scores(names=(), logits=(0.0,)).categories == {}
