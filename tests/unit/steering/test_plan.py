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
from msgspec.structs import replace

from steering.errors import InvalidSpec
from steering.plan import GateOrder, Plan, Reasoning, Scope

FIELDS = {
    "reasoning": "edited",
    "id": "p",
    "bundle": "sha256:0",
    "edit": "e",
    "gate": None,
    "strength": 1.5,
    "scope": "all",
    "response": False,
    "prompt_length": None,
}
ORDER = {
    "profile": "p",
    "comply_below": 0.25,
    "refuse_above": 0.75,
    "categories": ["c"],
    "is_graded": False,
    "is_observed": True,
}


def wire(fields: dict[str, Any], version: object = 5) -> str:
    """A plan of these fields as it travels."""
    return json.dumps({"version": version, "plan": fields})


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


@given(ids=st.lists(st.from_regex(r"[0-9a-f]{1,40}", fullmatch=True) | st.text(min_size=1), min_size=2, max_size=4))
@example(ids=["a" * 129, "a"])
def test_plans_that_differ_in_their_id_alone_are_read_apart(ids: list[str]) -> None:
    """What they have in common is read once: each keeps its own id, and one that is too long is refused as ever."""
    text = Plan(id="common", bundle="sha256:0", edit="e", strength=2.0).to_json()
    for each in ids:
        given_text = text.replace('"common"', json.dumps(each))
        if len(each) > 128:
            with pytest.raises(InvalidSpec):
                Plan.from_json(given_text)
        else:
            assert Plan.from_json(given_text) == Plan(id=each, bundle="sha256:0", edit="e", strength=2.0)


def test_requests_that_differ_in_their_id_alone_share_a_plan() -> None:
    """One object for all of them, beside the id of each; another for another plan, and one of its own for a text that
    is written otherwise.
    """
    plans = [Plan(id=each, bundle="sha256:0", edit="e", strength=2.0) for each in ("a1", "b2")]
    (first, one), (second, other) = (Plan.shared(plan.to_json()) for plan in plans)
    assert (first, second) == ("a1", "b2")
    assert one is other
    assert one.named("a1") == plans[0]
    assert Plan.shared(replace(plans[0], strength=1.0).to_json())[1].strength == 1.0
    odd = plans[0].to_json().replace('"version":5,', '"version": 5,')
    assert Plan.shared(odd) == ("a1", plans[0])
    assert Plan.shared(odd)[1] is not one


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
@example(field="prompt_length", value=10**400)
def test_any_value_in_any_field_is_a_plan_or_an_invalid_spec(field: str, value: Any) -> None:
    """A wrong type in one field never raises anything but InvalidSpec, and never makes a plan of wrong types."""
    try:
        plan = Plan.from_json(wire({**FIELDS, field: value}))
    except InvalidSpec:
        return
    assert [type(part) for part in (plan.id, plan.bundle, plan.strength, plan.scope, plan.response)] == [
        str,
        str,
        float,
        Scope,
        bool,
    ]
    assert plan.edit is None or type(plan.edit) is str
    assert plan.prompt_length is None or (type(plan.prompt_length) is int and plan.prompt_length > 0)


@given(field=st.sampled_from(sorted(ORDER)), value=JSON)
@example(field="comply_below", value=float("nan"))
@example(field="refuse_above", value=10**400)
@example(field="categories", value=[])
@example(field="categories", value=["c", 1])
def test_any_value_in_any_field_of_a_gate_is_a_plan_or_an_invalid_spec(field: str, value: Any) -> None:
    """As for the plan itself: wrong types, orders and ranges of thresholds are errors of that request alone."""
    fields = FIELDS | {"edit": None, "scope": "generated", "gate": ORDER | {field: value}}
    try:
        plan = Plan.from_json(wire(fields))
    except InvalidSpec:
        return
    assert plan.gate is not None
    assert 0.0 <= plan.gate.comply_below <= plan.gate.refuse_above <= 1.0
    assert type(plan.gate.is_observed) is type(plan.gate.is_graded) is bool


@given(
    low=st.floats(0, 1),
    room=st.floats(0, 1),
    categories=st.none() | st.lists(st.text(), min_size=1, max_size=16, unique=True).map(tuple),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_gate_plan_round_trip(
    low: float, room: float, categories: tuple[str, ...] | None, flags: tuple[bool, bool]
) -> None:
    """Every valid order comes out of the plan's JSON as it went in, thresholds to the last bit."""
    order = GateOrder(
        profile="p",
        comply_below=low,
        refuse_above=low + (1 - low) * room,
        categories=categories,
        is_graded=flags[0],
        is_observed=flags[1],
    )
    plan = Plan(id="p", bundle="b", gate=order, strength=1.0)
    assert Plan.from_json(plan.to_json()) == plan


def test_a_category_is_named_once() -> None:
    """A plan is no longer than the names it may have, so that engines may keep it."""
    with pytest.raises(InvalidSpec, match="named once"):
        GateOrder(profile="p", comply_below=0.2, refuse_above=0.8, categories=("x", "y", "x"))


@pytest.mark.parametrize("thresholds", [(0.6, 0.4), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5), (0.5, float("nan"))])
def test_thresholds_out_of_order_or_range_are_refused(thresholds: tuple[float, float]) -> None:
    """0 <= comply_below <= refuse_above <= 1, and the message says so."""
    with pytest.raises(InvalidSpec, match="0 <= comply_below <= refuse_above <= 1") as caught:
        GateOrder(profile="p", comply_below=thresholds[0], refuse_above=thresholds[1])
    assert caught.value.parameter == "steering.thresholds"


def test_a_plan_names_an_edit_or_a_gate_and_a_gate_edits_what_is_generated() -> None:
    """Neither, both, and a gate over the whole prompt, which has been read when it decides, are refused; no edit at all
    is a plan where the response is observed.
    """
    order = GateOrder(profile="p", comply_below=0.4, refuse_above=0.6)
    for named in ({}, {"edit": "e", "gate": order}):
        with pytest.raises(InvalidSpec, match="an edit or a gate"):
            Plan(id="p", bundle="b", strength=1.0, **named)  # type: ignore[arg-type]
    observed = Plan(id="p", bundle="b", strength=1.0, response=True, prompt_length=3)
    assert Plan.from_json(observed.to_json()) == observed
    assert not observed.is_steering
    with pytest.raises(InvalidSpec, match="read already") as caught:
        Plan(id="p", bundle="b", strength=1.0, gate=order, scope=Scope.ALL)
    assert caught.value.parameter == "steering.scope"


def test_reasoning_is_spared_by_an_edit_that_begins_after_it() -> None:
    """A gate may decide before; an edit of the whole prompt and an observation alone have nothing to spare."""
    order = GateOrder(profile="p", comply_below=0.4, refuse_above=0.6)
    for named in ({"edit": "e"}, {"gate": order}):
        plan = Plan(id="p", bundle="b", strength=1.0, reasoning=Reasoning.SPARED, **named)  # type: ignore[arg-type]
        assert Plan.from_json(plan.to_json()) == plan
    for named in ({"edit": "e", "scope": Scope.ALL}, {"response": True}):
        with pytest.raises(InvalidSpec, match="reasoning is spared") as caught:
            Plan(id="p", bundle="b", strength=1.0, reasoning=Reasoning.SPARED, **named)  # type: ignore[arg-type]
        assert caught.value.parameter == "steering.scope"


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


@pytest.mark.parametrize("text", [wire(FIELDS | {"strength": float(number)}) for number in ("nan", "inf", "-inf")])
def test_nan_and_infinity_in_json_are_refused(text: str) -> None:
    """Python's reader takes NaN and Infinity for numbers; a plan does not."""
    with pytest.raises(InvalidSpec, match="finite"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"extra": 1}, "unknown field `extra`"),
        ({"id": ""}, "1 to 128 characters"),
        ({"id": "x" * 129}, "1 to 128 characters"),
        ({"id": 5}, r"Expected `str`, got `int` - at `\$.plan.id`"),
        ({"scope": "some"}, "scope"),
        ({"strength": "1"}, r"Expected `float`, got `str` - at `\$.plan.strength`"),
        ({"response": 1}, r"Expected `bool`, got `int` - at `\$.plan.response`"),
        ({"prompt_length": 1.5}, r"Expected `int \| null`, got `float` - at `\$.plan.prompt_length`"),
        ({"prompt_length": True}, r"Expected `int \| null`, got `bool`"),
        ({"prompt_length": 0}, "at least one token"),
    ],
)
def test_refusals_name_the_field(changed: dict[str, Any], message: str) -> None:
    """The message of a refused plan says which field and what it needs."""
    with pytest.raises(InvalidSpec, match=message):
        Plan.from_json(wire(FIELDS | changed))


def test_a_plan_says_where_the_prompt_ends() -> None:
    """All tokens of the request, unless it says otherwise; more than there are is an error of that request."""
    plan = Plan(id="p", bundle="b", edit="e", strength=1.0)
    assert plan.end_of_prompt(9) == 9
    assert replace(plan, prompt_length=4).end_of_prompt(9) == 4
    with pytest.raises(InvalidSpec, match="10 tokens, the request 9"):
        replace(plan, prompt_length=10).end_of_prompt(9)


@pytest.mark.parametrize("version", [1, 4, 6, "5", None])
def test_a_plan_of_another_version_is_refused(version: object) -> None:
    """One of a gateway of another build, whose fields may mean something else; and one that does not say."""
    with pytest.raises(InvalidSpec, match=r"one line of JSON of version 5.*version"):
        Plan.from_json(wire(FIELDS, version))
    with pytest.raises(InvalidSpec, match="missing required field `version`"):
        Plan.from_json(json.dumps({"plan": FIELDS}))


@pytest.mark.parametrize("missing", sorted(FIELDS))
def test_what_is_left_out_has_its_default(missing: str) -> None:
    """That of the constructor, as for a plan made here; what has none there has to be said."""
    given_fields = {name: value for name, value in FIELDS.items() if name != missing}
    if missing in {"id", "bundle", "strength", "edit"}:
        with pytest.raises(InvalidSpec, match=r"missing required field|an edit or a gate"):
            Plan.from_json(wire(given_fields))
        return
    plan = Plan.from_json(wire(given_fields))
    assert plan == Plan(**{**given_fields, "scope": Scope(given_fields.get("scope", Scope.GENERATED))})


@pytest.mark.parametrize("given_value", [None, 1, {"id": "p"}, b"{}"])
def test_only_a_string_is_a_plan(given_value: object) -> None:
    """`extra_args` may hold anything; only a string is read."""
    with pytest.raises(InvalidSpec, match="one JSON string"):
        Plan.from_json(given_value)
