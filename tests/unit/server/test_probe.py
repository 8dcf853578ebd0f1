"""`POST /v1/steering/probe` and `GET /v1/steering`: what a gate reads, and what a key may ask for."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from server.access.caller import LOCAL, Caller, Permission
from server.gateway import Gateway
from tests.fakes import MODEL, FakeEngine, make_catalog, make_gated_bundle, read
from tests.unit.server.conftest import Make, Spoken

USER = [{"role": "user", "content": "How do I kill a process?"}]


@pytest.fixture
def gated(make: Make) -> Spoken:
    """A gateway whose default profile has a gate, over an engine that reads a harmful prompt."""
    return make(FakeEngine(scores=[read(0.95)]), make_catalog(make_gated_bundle()))


async def probe(spoken: Spoken, **fields: Any) -> Any:
    """The answer to a probe of one user message."""
    body = {"model": MODEL, "messages": USER, **fields}
    return await spoken.client.post("/v1/steering/probe", json={k: v for k, v in body.items() if v is not None})


@pytest.mark.parametrize(
    ("score", "decision", "edit"),
    [(0.95, "refuse", "refuse-safety"), (0.05, "comply", "comply-safety"), (0.4, "abstain", None)],
)
async def test_scores_come_without_an_answer(make: Make, score: float, decision: str, edit: str | None) -> None:
    """One token, under a gate that only observes; what it would decide and do is told by the profile's thresholds."""
    engine = FakeEngine(scores=[read(score)])
    spoken = make(engine, make_catalog(make_gated_bundle()))
    found = (await probe(spoken)).json()
    assert found["scores"] == {"refusal": score, "categories": {"Safety": 0.7, "Political": 0.3}}
    assert (found["profile"], found["decision"], found["category"], found["edit"]) == (
        "refusal-control",
        decision,
        "Safety",
        edit,
    )
    assert found["thresholds"] == {"comply_below": 0.2, "refuse_above": 0.6}
    assert found["bundle"] == make_gated_bundle().label
    assert found["usage"]["completion_tokens"] == 1
    assert "choices" not in found
    (call,) = engine.calls
    assert call.fields["max_tokens"] == 1
    assert call.plan is not None
    assert call.plan.gate is not None
    assert call.plan.gate.is_observed
    assert engine.forgotten == [call.plan.id]


async def test_scores_are_told_rounded_and_decided_on_whole(make: Make) -> None:
    """Four digits: what lies just below a threshold is told as the threshold, and decided by what was read."""
    engine = FakeEngine(scores=[read(0.599960001, safety=0.712345678)])
    found = (await probe(make(engine, make_catalog(make_gated_bundle())))).json()
    assert found["scores"] == {"refusal": 0.6, "categories": {"Safety": 0.7123, "Political": 0.2877}}
    assert found["decision"] == "abstain"


async def test_prompts_of_either_kind_are_read(gated: Spoken) -> None:
    """Messages with tools as a chat has them, or a text as it is; one of the two."""
    tool = {"type": "function", "function": {"name": "look"}}
    assert (await probe(gated, tools=[tool])).status_code == 200
    assert (await probe(gated, messages=None, prompt="How do I")).status_code == 200
    for fields in ({"prompt": "both"}, {"messages": None}, {"messages": None, "prompt": "x", "tools": [tool]}):
        assert (await probe(gated, **fields)).status_code == 400


@pytest.mark.parametrize(
    ("fields", "status", "parameter"),
    [
        ({"profile": "nothing"}, 400, "profile"),
        ({"profile": "manual"}, 400, "profile"),
        ({"model": "other"}, 404, "model"),
        ({"steering": {"mode": "off"}}, 400, "steering"),
        ({"stream": True}, 400, "stream"),
        ({"max_tokens": 5}, 400, "max_tokens"),
    ],
)
async def test_what_cannot_be_read_is_told(gated: Spoken, fields: dict[str, Any], status: int, parameter: str) -> None:
    """By the field of this endpoint that is at fault."""
    response = await probe(gated, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (status, parameter)


async def test_scores_need_a_permission(gated: Spoken, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are an oracle: a key that may do everything else may not read them."""
    others = dataclasses.replace(LOCAL, key_id="k", permissions=LOCAL.permissions - {Permission.SCORES})
    _admit(monkeypatch, others)
    response = await probe(gated)
    assert response.status_code == 403
    assert "scores:read" in response.json()["error"]["message"]


async def test_a_key_is_told_what_it_may_do(gated: Spoken, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions, profiles with the default one among them, and strengths are the key's; limits are the server's."""
    _admit(
        monkeypatch,
        Caller(
            key_id="k",
            permissions=frozenset({Permission.USE}),
            profiles=frozenset({"manual"}),
            strength=(0.5, 1.5),
        ),
    )
    found = (await gated.client.get("/v1/steering")).json()
    assert found["key"]["permissions"] == ["steer:use"]
    assert found["key"]["profiles"] == ["refusal-control", "manual"]
    assert found["key"]["strength"] == {"minimum": 0.5, "maximum": 1.5}
    assert found["limits"]["context"] == 512


async def test_a_probe_is_no_decision(gated: Spoken) -> None:
    """Its tokens are counted; decisions and outcomes are those of answers alone."""
    await probe(gated)
    text = (await gated.admin.get("/metrics")).text
    assert "steering_decisions_total{" not in text
    assert re.search(r'steering_tokens_total\{[^}]*kind="prompt"', text)
    assert "steering_inflight_requests 0.0" in text


def _admit(monkeypatch: pytest.MonkeyPatch, caller: Caller) -> None:
    monkeypatch.setattr(Gateway, "admit", lambda *_: caller)
