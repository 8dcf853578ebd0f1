"""Requests that a gate decides, over HTTP with a scripted engine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.engine import Call
from steering.errors import EngineError
from steering.plan import GateOrder
from tests.fakes import POLITICAL, RESPOND, SAFETY, FakeEngine, make_catalog, make_gated_bundle, read
from tests.unit.server.conftest import Make, Spoken, chat_body, content_of, read_events, unapplied

TOKENS = {"category_source": "refusal_tokens"}


@pytest.fixture
def auto(make: Make) -> Make:
    """Makes gateways whose default profile has a gate."""

    def build(engine: FakeEngine | None = None, **settings: Any) -> Spoken:
        return make(engine, make_catalog(make_gated_bundle()), **settings)

    return build


async def told(spoken: Spoken, stream: bool, **fields: Any) -> tuple[dict[str, Any], str]:
    """The steering object and the header of an answer."""
    response = await spoken.chat(stream=stream, **fields)
    assert response.status_code == 200, response.text
    body = read_events(response.text)[-1] if stream else response.json()
    return body["steering"], response.headers["x-trimtab-decision"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "decision", "edit", "refused"),
    [(0.95, "refuse", "refuse-safety", True), (0.05, "comply", "comply-safety", False), (0.4, "abstain", None, True)],
)
async def test_the_gate_decides_by_default_and_the_answer_says_what(
    auto: Make, refusal: float, decision: str, edit: str | None, refused: bool, stream: bool
) -> None:
    """Without a steering field: decision, edit and strength are the engine's, in the body and in the header."""
    engine = FakeEngine(scores=[read(refusal)])
    steering, header = await told(auto(engine), stream)
    assert header == decision
    assert steering == {
        "applied": edit is not None,
        "profile": "refusal-control",
        "bundle": make_gated_bundle().label,
        "decision": decision,
        "category": "Safety",
        "edit": edit,
        "strength": 1.0 if edit else None,
        "scope": "generated" if edit else None,
        "verdict": {"refused": refused, "category": "Safety" if refused else None, "detector": "refusal_token"},
        "category_source": "probe",
    }
    (call,) = engine.calls
    assert call.plan is not None
    assert call.plan.gate == GateOrder(profile="refusal-control", comply_below=0.2, refuse_above=0.6)
    assert engine.forgotten == [call.plan.id]


@pytest.mark.parametrize("stream", [False, True])
async def test_full_report_carries_scores_and_thresholds(auto: Make, stream: bool) -> None:
    """All that the decision was made of: every category's probability, and the thresholds that were used."""
    engine = FakeEngine(scores=[read(0.8)])
    asked = {"report": "full", "thresholds": {"comply_below": 0.1}, "graded": True}
    steering, _ = await told(auto(engine), stream, steering=asked)
    assert steering["scores"]["refusal"] == 0.8
    assert steering["scores"]["categories"] == pytest.approx({"Safety": 0.7, "Political": 0.3})
    assert steering["thresholds"] == {"comply_below": 0.1, "refuse_above": 0.6}
    assert steering["graded"] is True
    assert steering["strength"] == pytest.approx(0.5)


@pytest.mark.parametrize("stream", [False, True])
async def test_scores_are_told_rounded_and_decided_on_whole(auto: Make, stream: bool) -> None:
    """Four digits, of what follows from a score too; the decision is that of the score as it was read."""
    engine = FakeEngine(scores=[read(0.599960001, safety=0.712345678)])
    full = {"report": "full"}
    steering, header = await told(auto(engine), stream, steering=full)
    assert steering["scores"] == {"refusal": 0.6, "categories": {"Safety": 0.7123, "Political": 0.2877}}
    assert header == steering["decision"] == "abstain"
    engine = FakeEngine(scores=[read(0.812345678)])
    steering, _ = await told(auto(engine), stream, steering={**full, "graded": True})
    assert steering["strength"] == 0.5309
    (call,) = engine.calls
    assert call.plan is not None
    assert engine._apply(call.plan, 0).strength == pytest.approx(0.530864195)


async def test_report_none_still_has_the_header(auto: Make) -> None:
    """Asked for nothing, told the decision only."""
    for stream in (False, True):
        response = await auto().chat(stream=stream, steering={"report": "none"})
        assert "steering" not in response.text.replace('"steering_', "")
        assert response.headers["x-trimtab-decision"] == "refuse"


@pytest.mark.parametrize("stream", [False, True])
async def test_samples_that_were_decided_differently_are_listed(auto: Make, stream: bool) -> None:
    """The first sample's decision stands alone, and all are listed where they differ, as only rounding can do."""
    engine = FakeEngine(scores=[read(0.6), read(0.59999)])
    steering, header = await told(auto(engine), stream, n=2)
    assert (header, steering["decision"], steering["decisions"]) == ("refuse", "refuse", ["refuse", "abstain"])
    same, _ = await told(auto(), stream, n=2)
    assert "decisions" not in same


async def test_sides_can_still_be_named(auto: Make) -> None:
    """A mode that names its side sends no gate, and false sends nothing."""
    engine = FakeEngine()
    spoken = auto(engine)
    assert (await told(spoken, stream=False, steering={"mode": "comply"}))[0]["edit"] == "comply-safety"
    assert (await told(spoken, stream=False, steering=False))[1] == "off"
    first, second = engine.calls
    assert first.plan is not None
    assert first.plan.gate is None
    assert second.plan is None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "engine",
    [
        FakeEngine(confirms=False),
        FakeEngine(tampered={"error": "the probe's scores are not finite", "applied": False, "edit": None}),
        FakeEngine(scores=[read(0.05)], tampered={"edit": "refuse-safety"}),
        FakeEngine(scores=[read(0.4)], tampered={"edit": "comply-safety", "applied": True, "strength": 1.0}),
    ],
    ids=["silent", "error", "other edit", "edited after abstaining"],
)
async def test_a_decision_that_is_not_confirmed_withholds_the_answer(
    auto: Make, engine: FakeEngine, stream: bool
) -> None:
    """An abstention is an answer; an error, a silence or a contradiction is none, and is counted as what it was."""
    spoken = auto(engine)
    response = await spoken.chat(stream=stream)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "steering_not_applied"
    assert "Hello" not in response.text
    reason = "unconfirmed" if not engine.confirms else "failed" if "error" in engine.tampered else "contradicted"
    assert unapplied(spoken) == {"unconfirmed": 0, "failed": 0, "contradicted": 0, reason: 1}


@pytest.mark.parametrize("stream", [False, True])
async def test_refusal_tokens_take_one_unsteered_pass_before(auto: Make, stream: bool) -> None:
    """P1.4: the model's likeliest token names the category, whatever the probe's own head says."""
    engine = FakeEngine(likeliest=POLITICAL, scores=[read(0.95, safety=0.9)])
    spoken = auto(engine)
    asked = {"n": 2, "temperature": 0.7, "stop": "x", "logprobs": True, "max_tokens": 3, "seed": 4}
    steering, header = await told(spoken, stream, steering=TOKENS, **asked)
    assert (header, steering["category"], steering["edit"]) == ("refuse", "Political", "refuse-political")
    assert steering["category_source"] == "refusal_tokens"
    first, second = engine.calls
    assert first.plan is None
    assert first.fields == {
        **chat_body(),
        "max_tokens": 1,
        "temperature": 0.0,
        "allowed_token_ids": [SAFETY, POLITICAL],
    }
    assert first.samples == 1
    assert first.request_id == f"{second.request_id}-category"
    assert second.plan is not None
    assert second.plan.gate is not None
    assert second.plan.gate.categories == ("Political",)
    assert "allowed_token_ids" not in second.fields
    assert (second.samples, second.fields["max_tokens"]) == (2, 3)
    assert b"steering_category_passes_total 1.0" in spoken.gateway.metrics.exposition()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_first_pass_that_fails_or_strays_ends_the_request(auto: Make, stream: bool) -> None:
    """Without a category there is nothing to apply; nothing is sent in its place."""
    for engine in (FakeEngine(fails=EngineError("broke")), StrayingEngine()):
        response = await auto(engine).chat(stream=stream, steering=TOKENS)
        assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_error")
        assert len(engine.calls) == 1


class StrayingEngine(FakeEngine):
    """Does not keep to the tokens it is allowed."""

    def _first(self, call: Call, index: int) -> int:
        return RESPOND


@pytest.mark.parametrize("stream", [False, True])
async def test_the_first_pass_shares_the_requests_time(auto: Make, stream: bool) -> None:
    """A first pass that hangs is given up when the request would be, and aborted."""
    engine = FakeEngine(gate=asyncio.Event())
    spoken = auto(engine, total_timeout=0.05, first_token_timeout=0.05)
    response = await spoken.chat(stream=stream, steering=TOKENS)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "engine_timeout")
    assert engine.aborted == [engine.calls[0].request_id]
    assert spoken.gateway.service.inflight == 0
    (plan_id,) = engine.forgotten
    assert len(plan_id) == 32


@pytest.mark.parametrize("stream", [False, True])
async def test_faults_of_the_caller_are_told_before_the_engine_works(auto: Make, stream: bool) -> None:
    """Thresholds in the wrong order are a 400 that names both and whose they are."""
    engine = FakeEngine()
    response = await auto(engine).chat(stream=stream, steering={"thresholds": {"comply_below": 0.7}})
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["param"], error["code"]) == ("steering.thresholds", "steering_invalid")
    assert "0.7 (given)" in error["message"]
    assert "0.6 (that of profile 'refusal-control')" in error["message"]
    assert engine.calls == []


async def test_text_waits_for_its_own_samples_decision(auto: Make) -> None:
    """Where only the first of two samples reports, the second's text never leaves."""
    response = await auto(FakeEngine(silent=(1,))).chat(stream=True, n=2)
    events = read_events(response.text)
    assert events[-1]["error"]["code"] == "steering_not_applied"
    assert content_of(events, 1) == ""


async def test_decisions_scores_and_categories_are_counted(auto: Make) -> None:
    """By what was decided, not by what was asked; abstentions are no failures."""
    engine = FakeEngine()
    spoken = auto(engine)
    for refusal, safety in ((0.95, 0.7), (0.04, 0.7), (0.39, 0.2)):
        engine.scores = [read(refusal, safety)]
        await spoken.chat()
    await spoken.chat(steering=TOKENS)
    await spoken.chat(steering={"mode": "off"})
    text = spoken.gateway.metrics.exposition().decode()
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    for category, decision, count in (
        ("Safety", "refuse", 1),
        ("Safety", "comply", 1),
        ("Political", "abstain", 2),
        ("none", "off", 1),
    ):
        labels = (("category", category), ("decision", decision), ("mode", "enforce"))
        assert found["steering_decisions_total", *labels] == count
    assert found["steering_probe_score_count", ("profile", "refusal-control")] == 4
    assert found["steering_probe_score_bucket", ("le", "0.05"), ("profile", "refusal-control")] == 1
    assert found["steering_probe_score_bucket", ("le", "0.4"), ("profile", "refusal-control")] == 3
    assert found["steering_probe_categories_total", ("category", "Safety"), ("source", "probe")] == 2
    assert found["steering_probe_categories_total", ("category", "Political"), ("source", "refusal_tokens")] == 1
    assert sum(count for (name, *_), count in found.items() if name == "steering_unapplied_total") == 0
    for decision in ("refuse", "comply"):
        labels = (("decision", decision), ("kind", "completion"), ("steered", "true"))
        assert found["steering_tokens_total", *labels] == 4
