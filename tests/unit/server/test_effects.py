"""An outcome is believed only where it is what the plan allows and what its own scores demand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import structs

from server.effects import TOLERANCE, effect_of
from server.policy import Resolution, SteeringSpec, resolve
from steering.errors import EditNotApplied
from steering.outcome import Outcome, Scores
from steering.plan import Decision, Mode, Scope
from tests.fakes import FakeEngine, make_catalog, make_gated_bundle, read

CATALOG = make_catalog(make_gated_bundle())


def resolved(**fields: Any) -> Resolution:
    """A resolution against the gated bundle."""
    return resolve(SteeringSpec(**fields), CATALOG, plan_id="p")


def reported(resolution: Resolution, scores: Scores | None = None, **changes: Any) -> Outcome:
    """What the fake engine reports of a resolution, with changes."""
    engine = FakeEngine(scores=[scores or read(0.95)], tampered=changes)
    assert resolution.plan is not None
    return engine._apply(resolution.plan, 0)


@pytest.mark.parametrize(
    ("scores", "decision", "edit", "category"),
    [
        (read(0.95), "refuse", "refuse-safety", "Safety"),
        (read(0.95, safety=0.2), "refuse", "refuse-political", "Political"),
        (read(0.05), "comply", "comply-safety", "Safety"),
        (read(0.05, safety=0.2), "abstain", None, "Political"),
        (read(0.4), "abstain", None, "Safety"),
    ],
    ids=["refuse", "other category", "comply", "no edit for the side", "neutral band"],
)
def test_effect_is_what_the_gate_did(scores: Scores, decision: str, edit: str | None, category: str) -> None:
    """Decision, category and edit are the outcome's; where nothing was edited there is no strength and no scope."""
    resolution = resolved()
    effect = effect_of(resolution, reported(resolution, scores))
    assert (effect.decision, effect.edit, effect.category, effect.scores) == (decision, edit, category, scores)
    assert effect.applied is (edit is not None)
    assert (effect.strength, effect.scope) == ((1.0, Scope.GENERATED) if edit else (None, None))


@pytest.mark.parametrize(
    ("scores", "changes"),
    [
        (read(0.95), {"decision": Decision.COMPLY, "edit": "comply-safety"}),
        (read(0.95), {"decision": Decision.ABSTAIN, "edit": None, "applied": False, "strength": 0.0}),
        (read(0.05), {"decision": Decision.REFUSE, "edit": "refuse-safety"}),
        (read(0.4), {"decision": Decision.COMPLY, "edit": "comply-safety", "applied": True, "strength": 1.0}),
        (read(0.4), {"edit": "comply-safety", "applied": True, "strength": 1.0}),
        (read(0.95), {"edit": "refuse-political"}),
        (read(0.95), {"edit": None}),
        (read(0.95), {"applied": False}),
        (read(0.95), {"category": "Political", "edit": "refuse-political"}),
        (read(0.95), {"category": "Other"}),
        (read(0.95), {"category": None}),
        (read(0.95), {"strength": 0.9}),
        (read(0.95), {"scope": Scope.ALL}),
        (read(0.95), {"decision": None}),
        (read(0.95), {"scores": None}),
        (read(0.95), {"scores": Scores(names=("Safety",), logits=(2.9, 0.0))}),
        (read(0.95), {"scores": read(float("nan"))}),
        (read(0.95), {"scores": read(0.95, safety=float("nan"))}),
        (read(0.95), {"error": "scores are not finite"}),
        (read(0.4), {"error": "no row is free"}),
    ],
)
def test_what_the_plan_does_not_allow_is_not_believed(scores: Scores, changes: dict[str, Any]) -> None:
    """Another decision, edit, category, strength or scope than the scores and the plan demand withholds the answer."""
    resolution = resolved()
    with pytest.raises(EditNotApplied):
        effect_of(resolution, structs.replace(reported(resolution, scores), **changes))


def test_a_category_that_was_not_allowed_is_not_believed() -> None:
    """Also where it is the likeliest of all."""
    allowed = resolved(category="Political")
    assert effect_of(allowed, reported(allowed, read(0.9))).category == "Political"
    with pytest.raises(EditNotApplied, match="Political"):
        effect_of(allowed, reported(resolved(), read(0.9)))


@example(refusal=0.0, low=1e-9, high=1e-5, graded=False, shift=1e-5)
@given(
    refusal=st.floats(0, 1),
    low=st.floats(0, 1),
    high=st.floats(0, 1),
    graded=st.booleans(),
    shift=st.floats(-TOLERANCE / 3, TOLERANCE / 3),
)
def test_rounding_near_a_threshold_is_believed_either_way(
    refusal: float, low: float, high: float, graded: bool, shift: float
) -> None:
    """An engine that reads a score a little off decides as it reads; its answer is not withheld for that."""
    low, high = sorted((low, high))
    resolution = resolved(comply_below=low, refuse_above=high, is_graded=graded)
    outcome = reported(resolution, read(refusal))
    assert outcome.scores is not None
    score, *others = outcome.scores.logits
    shifted = structs.replace(outcome.scores, logits=(score + shift * max(1.0, abs(score)), *others))
    assert effect_of(resolution, structs.replace(outcome, scores=shifted)).decision == outcome.decision


@given(refusal=st.floats(0, 1), off=st.floats(0.02, 1))
def test_a_decision_far_from_its_threshold_must_be_the_rules(refusal: float, off: float) -> None:
    """No score is believed that would have led to another decision."""
    resolution = resolved()
    outcome = reported(resolution, read(refusal))
    for other in (refusal - off, refusal + off):
        expected = reported(resolution, read(other))
        if 0 <= other <= 1 and expected.decision != outcome.decision:
            edges = [abs(other - edge) for edge in (0.2, 0.6)]
            if min(edges) > 1e-3:
                with pytest.raises(EditNotApplied):
                    effect_of(resolution, structs.replace(outcome, scores=read(other)))


def test_graded_strength_must_follow_the_score() -> None:
    """Half the way past the threshold is half the strength, and nothing else is believed."""
    resolution = resolved(is_graded=True, strength=1.5)
    outcome = reported(resolution, read(0.8))
    assert outcome.strength == pytest.approx(0.75)
    assert effect_of(resolution, outcome).strength == outcome.strength
    for wrong in (0.0, 1.5, 0.7, 1.6):
        with pytest.raises(EditNotApplied, match="strength"):
            effect_of(resolution, structs.replace(outcome, strength=wrong))


def test_modes_that_name_a_side_need_that_very_edit() -> None:
    """No gate decides, so no decision of one is taken over."""
    resolution = resolved(mode=Mode.COMPLY)
    effect = effect_of(resolution, reported(resolution))
    assert (effect.decision, effect.edit, effect.scores) == ("comply", "comply-safety", None)
    for changes in ({"edit": "refuse-safety"}, {"strength": 0.5}, {"applied": False}, {"scope": Scope.ALL}):
        with pytest.raises(EditNotApplied):
            effect_of(resolution, reported(resolution, **changes))


def test_no_plan_no_effect() -> None:
    """What was not asked for was not done."""
    effect = effect_of(resolved(mode=Mode.OFF), None)
    assert (effect.decision, effect.applied, effect.category) == ("off", False, None)
