"""Which of the compared arms becomes the default."""

from __future__ import annotations

from steering.fit.sources import Use
from steering.fit.topic_candidates import FREE, GATED, Candidate
from steering.fit.topic_compare import Arm, choose_default
from steering.fit.topic_directions import Method
from steering.fit.topic_finder import Found
from steering.fit.topic_prompts import Role
from steering.plan import Scope

UNSTEERED = {Use.CALIBRATE: {Role.REFUSED: {"rate": 0.9, "n": 60}, Role.SAFETY: {"rate": 1.0, "n": 60}}}


def arm(
    variant: str,
    *,
    topic: float,
    harmful: float = 1.0,
    shift: float = 0.1,
    is_safe: bool = True,
    is_met: bool = True,
) -> Arm:
    """An arm with these rates of refusal on calibration prompts."""
    candidate = Candidate(
        method=Method.MD, variant=variant, layers=(1,), alpha=-1.0, is_reposition=False, scope=Scope.GENERATED
    )
    return Arm(
        name=f"{variant} {topic} {shift}",
        found=Found(candidate=candidate, removal=1.0, shift=shift, is_met=is_met),
        comply_below=0.5 if variant == GATED else None,
        rates={Use.CALIBRATE: {Role.REFUSED: {"rate": topic}, Role.SAFETY: {"rate": harmful}}},
        is_safe=is_safe,
    )


def test_the_least_shift_among_safe_arms_that_remove_enough_wins() -> None:
    """An arm that loses harmful refusals is no candidate while another keeps them, nor a gate that removes too little
    while something else removes enough.
    """
    safe = arm(FREE, topic=0.1)
    others = [
        arm(GATED, topic=0.5, shift=0.01, is_met=False),
        arm(FREE, topic=0.0, shift=0.01, is_safe=False),
        arm(FREE, topic=0.05, shift=0.2),
    ]
    chosen, why = choose_default([*others, safe], UNSTEERED)
    assert chosen is safe
    assert "10.0 % of topic refusals (unsteered 90.0 %)" in why


def test_a_safe_gate_that_removes_enough_goes_before_what_is_not_gated() -> None:
    """Only a gate leaves alone what no calibration prompt stands for; equal shifts go to the least topic refusal."""
    gated = arm(GATED, topic=0.1, shift=0.3)
    others = [arm(GATED, topic=0.05, shift=0.4), arm(GATED, topic=0.2, shift=0.3)]
    arms = [arm(FREE, topic=0.0, shift=0.01), *others, gated]
    chosen, why = choose_default(arms, UNSTEERED)
    assert chosen is gated
    assert "ungated" in why


def test_where_none_removes_enough_the_least_topic_refusal_wins() -> None:
    """And the reason says so."""
    least = arm(FREE, topic=0.4, shift=0.9, is_met=False)
    chosen, why = choose_default([arm(GATED, topic=0.5, is_met=False), least], UNSTEERED)
    assert chosen is least
    assert "the least topic refusal" in why


def test_where_none_is_safe_a_gated_arm_that_keeps_most_is_taken_and_said_so() -> None:
    """The reason tells what it costs."""
    kept = arm(GATED, topic=0.5, harmful=0.8, is_safe=False)
    arms = [arm(FREE, topic=0.0, harmful=0.9, is_safe=False), arm(GATED, topic=0.1, harmful=0.6, is_safe=False), kept]
    chosen, why = choose_default(arms, UNSTEERED)
    assert chosen is kept
    assert "80.0 % of them, unsteered 100.0 %" in why
