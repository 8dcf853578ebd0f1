"""Plans and outcomes: the wire between gateway and engine, in both directions.

A plan reaches the scheduler from outside under plain `vllm serve`, where only errors of our own tree abort the request
alone; anything else would stop the engine.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from steering.errors import InvalidSpec
from steering.plan import Outcome, Plan, Scope

FIELDS = {"version": 1, "id": "p", "bundle": "sha256:0", "edit": "e", "strength": 1.5, "scope": "all"}
STRENGTHS = st.floats(2.0**-126, 2.0**127) | st.floats(-(2.0**127), -(2.0**-126))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    plan_id=st.text(min_size=1, max_size=128),
    edit=st.text(),
    strength=STRENGTHS,
    scope=st.sampled_from(Scope),
)
def test_plan_round_trip(plan_id: str, edit: str, strength: float, scope: Scope) -> None:
    """Every valid plan comes out of its JSON as it went in, strength to the last bit."""
    plan = Plan(id=plan_id, bundle="sha256:0", edit=edit, strength=strength, scope=scope)
    assert Plan.from_json(plan.to_json()) == plan
    assert "\n" not in plan.to_json()


@given(text=st.text() | JSON.map(json.dumps))
@example(text="[" * 100_000)
@example(text='{"a":' * 100_000)
@example(text="9" * 5000)
def test_any_text_is_a_plan_or_an_invalid_spec(text: str) -> None:
    """No text from outside raises anything but InvalidSpec, which aborts that request alone."""
    try:
        plan = Plan.from_json(text)
    except InvalidSpec:
        return
    assert isinstance(plan, Plan)


@given(field=st.sampled_from(sorted(FIELDS)), value=JSON)
@example(field="scope", value=["all"])
@example(field="scope", value={})
@example(field="strength", value=10**400)
@example(field="strength", value=True)
def test_any_value_in_any_field_is_a_plan_or_an_invalid_spec(field: str, value: Any) -> None:
    """A wrong type in one field never raises anything but InvalidSpec, and never makes a plan of wrong types."""
    try:
        plan = Plan.from_json(json.dumps({**FIELDS, field: value}))
    except InvalidSpec:
        return
    assert [type(part) for part in (plan.id, plan.bundle, plan.edit, plan.strength, plan.scope)] == [
        str,
        str,
        str,
        float,
        Scope,
    ]


@pytest.mark.parametrize(
    "strength", [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e39, -1e300, 1e-60, 1e-320]
)
def test_strengths_that_float32_cannot_hold_are_refused(strength: float) -> None:
    """Neither an edit of infinities nor one that becomes 0 in the engine and says it was applied."""
    with pytest.raises(InvalidSpec, match="strength") as caught:
        Plan(id="p", bundle="b", edit="e", strength=strength)
    assert caught.value.parameter == "steering.strength"


@given(strength=STRENGTHS)
def test_strengths_that_are_accepted_survive_float32(strength: float) -> None:
    """What the engine keeps in its float32 row is finite and not 0."""
    kept = np.float32(strength)
    assert np.isfinite(kept)
    assert kept != 0


@pytest.mark.parametrize(
    "text", [json.dumps(FIELDS | {"strength": float(number)}) for number in ("nan", "inf", "-inf")]
)
def test_nan_and_infinity_in_json_are_refused(text: str) -> None:
    """Python's reader takes NaN and Infinity for numbers; a plan does not."""
    with pytest.raises(InvalidSpec, match="finite"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"extra": 1}, "keys"),
        ({"version": 2}, "version must be 1"),
        ({"id": ""}, "1 to 128 characters"),
        ({"id": "x" * 129}, "1 to 128 characters"),
        ({"id": 5}, "'id' must be a string"),
        ({"scope": "some"}, "scope"),
        ({"strength": "1"}, "must be a number"),
    ],
)
def test_refusals_name_the_field(changed: dict[str, Any], message: str) -> None:
    """The message of a refused plan says which field and what it needs."""
    with pytest.raises(InvalidSpec, match=message):
        Plan.from_json(json.dumps(FIELDS | changed))


@pytest.mark.parametrize("missing", sorted(FIELDS))
def test_every_field_is_required(missing: str) -> None:
    """A plan is complete: the engine fills in no default."""
    with pytest.raises(InvalidSpec, match="keys"):
        Plan.from_json(json.dumps({name: value for name, value in FIELDS.items() if name != missing}))


@pytest.mark.parametrize("given_value", [None, 1, {"id": "p"}, b"{}"])
def test_only_a_string_is_a_plan(given_value: object) -> None:
    """`extra_args` may hold anything; only a string is read."""
    with pytest.raises(InvalidSpec, match="one JSON string"):
        Plan.from_json(given_value)


@given(request_id=st.text(), error=st.text(), strength=STRENGTHS, scope=st.sampled_from(Scope), applied=st.booleans())
def test_outcome_round_trip(request_id: str, error: str, strength: float, scope: Scope, applied: bool) -> None:
    """Every outcome comes out of its bytes as it went in."""
    outcome = Outcome(
        plan_id="p", request_id=request_id, applied=applied, edit="e", strength=strength, scope=scope, error=error
    )
    assert Outcome.from_json(outcome.to_json()) == outcome
