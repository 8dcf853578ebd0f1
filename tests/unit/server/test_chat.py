"""Chat completions over HTTP with a scripted engine: what is asked, done, confirmed and told."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from steering.errors import (
    CapacityExceeded,
    EngineDied,
    EngineError,
    EngineOverloaded,
    InvalidSpec,
)
from steering.plan import Scope
from tests.fakes import DIGEST, MODEL, RESPOND, FakeEngine, failing, make_bundle, make_catalog
from tests.unit.server.conftest import Make, chat_body, scrape, unapplied, value

LABEL = make_bundle().label


async def test_unsteered_answer_has_openais_shape_and_says_that_nothing_was_applied(make: Make) -> None:
    """Without the field no plan reaches the engine, and the answer says so beside the verdict."""
    engine = FakeEngine()
    response = await make(engine).chat(temperature=0.5)
    body = response.json()
    assert response.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"] == "Hello there!"
    assert response.headers["x-trimtab-decision"] == "off"
    assert body["steering"] == {
        "applied": False,
        "profile": "refusal-control",
        "bundle": LABEL,
        "decision": "off",
        "category": None,
        "edit": None,
        "strength": None,
        "scope": None,
        "verdict": {"refused": True, "category": "Safety", "detector": "refusal_token"},
    }
    (call,) = engine.calls
    assert call.plan is None
    assert call.fields["temperature"] == 0.5
    assert "steering" not in call.fields


async def test_comply_reaches_the_engine_and_is_told(make: Make) -> None:
    """The plan names the bundle, edit, strength and scope; the answer repeats what was applied."""
    engine = FakeEngine()
    response = await make(engine).chat(steering={"mode": "comply", "strength": 1.5, "scope": "all"})
    steering = response.json()["steering"]
    plan = engine.calls[0].plan
    assert plan is not None
    assert (plan.bundle, plan.edit, plan.strength, plan.scope) == (DIGEST, "comply-safety", 1.5, Scope.ALL)
    assert response.headers["x-trimtab-decision"] == "comply"
    assert steering == {
        "applied": True,
        "profile": "refusal-control",
        "bundle": LABEL,
        "decision": "comply",
        "category": "Safety",
        "edit": "comply-safety",
        "strength": 1.5,
        "scope": "all",
        "verdict": {"refused": False, "category": None, "detector": "refusal_token"},
    }
    assert engine.forgotten == [plan.id]


async def test_plan_ids_cannot_be_guessed(make: Make) -> None:
    """Each plan has its own id of 128 random bits."""
    engine = FakeEngine()
    spoken = make(engine)
    for _ in range(3):
        await spoken.chat(steering={"mode": "refuse"})
    ids = {call.plan.id for call in engine.calls if call.plan}
    assert len(ids) == 3
    assert all(len(name) == 32 for name in ids)


@pytest.mark.parametrize("steering", [False, None, "refusal-control", {"mode": "off"}, {}])
async def test_ways_to_ask_for_nothing(make: Make, steering: object) -> None:
    """Every way to ask for no steering sends no plan."""
    engine = FakeEngine()
    response = await make(engine).chat(steering=steering)
    assert response.json()["steering"]["applied"] is False
    assert engine.calls[0].plan is None


async def test_report_none_leaves_the_object_out(make: Make) -> None:
    """The header still tells what was decided."""
    response = await make().chat(steering={"mode": "refuse", "report": "none"})
    assert "steering" not in response.json()
    assert response.headers["x-trimtab-decision"] == "refuse"


async def test_every_choice_has_a_verdict(make: Make) -> None:
    """With n > 1 the verdicts are listed, the first also standing alone."""
    body = (await make().chat(n=3, steering={"mode": "comply"})).json()
    assert [verdict["refused"] for verdict in body["steering"]["verdicts"]] == [False] * 3
    assert body["steering"]["verdict"] == body["steering"]["verdicts"][0]


async def test_markers_that_are_text_never_show(make: Make) -> None:
    """A model whose refusal token is ordinary text is answered without it."""
    body = (await make(FakeEngine(shows_markers=True)).chat()).json()
    assert body["choices"][0]["message"]["content"] == "Hello there!"
    assert body["steering"]["verdict"]["category"] == "Safety"


async def test_transferred_bundle_is_told(make: Make) -> None:
    """An edit made for another model says so in every answer."""
    body = (await make(catalog=make_catalog(make_bundle(is_transferred=True))).chat()).json()
    assert body["steering"]["transferred"] is True


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "engine",
    [
        FakeEngine(confirms=False),
        FakeEngine(tampered={"edit": "refuse-safety"}),
        FakeEngine(tampered={"strength": 0.5}),
        FakeEngine(tampered={"applied": False, "error": "no row"}),
        FakeEngine(tampered={"scope": Scope.ALL}),
    ],
    ids=["silent", "other edit", "other strength", "not applied", "other scope"],
)
async def test_unconfirmed_edit_withholds_the_answer(make: Make, engine: FakeEngine, stream: bool) -> None:
    """Without a confirmation that matches the plan the client gets an error and no text, and must not retry."""
    engine.unsteered = RESPOND
    spoken = make(engine)
    response = await spoken.chat(stream=stream, steering={"mode": "comply"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "steering_not_applied"
    assert response.headers["x-should-retry"] == "false"
    assert "Hello" not in response.text
    reason = "unconfirmed" if not engine.confirms else "failed" if "error" in engine.tampered else "contradicted"
    assert unapplied(spoken) == {"unconfirmed": 0, "failed": 0, "contradicted": 0, reason: 1}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidSpec("too long", parameter="messages", code="context_length_exceeded"), 400, "context_length_exceeded"),
        (CapacityExceeded("no row is free"), 503, "steering_capacity"),
        (EngineOverloaded("queue full"), 503, "server_is_overloaded"),
        (EngineDied("gone"), 503, "engine_dead"),
        (EngineError("broken"), 500, "engine_error"),
    ],
)
async def test_engine_errors_before_the_first_token_have_a_status(
    make: Make, error: EngineError, status: int, code: str, stream: bool
) -> None:
    """Also a stream is answered with a status while nothing has been sent."""
    response = await make(failing(error)).chat(stream=stream)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert ("retry-after" in response.headers) == (status == 503)


async def test_bug_is_a_500_without_its_text(make: Make) -> None:
    """What went wrong inside is for the log; the client gets a request id to quote."""
    spoken = make(FakeEngine(fails=RuntimeError("secret /path")))
    with pytest.raises(RuntimeError):  # re-raised for the server's log once the answer is out
        await spoken.chat()


@pytest.mark.parametrize("path", ["model", "steering.profile"])
async def test_unknown_names_are_told_with_what_there_is(make: Make, path: str) -> None:
    """404 for a model, 400 for a profile, both in the envelope."""
    fields: dict[str, Any] = {"model": "gpt-x"} if path == "model" else {"steering": "nope"}
    response = await make().client.post("/v1/chat/completions", json=chat_body(**fields))
    error = response.json()["error"]
    assert response.status_code == (404 if path == "model" else 400)
    assert error["code"] == ("model_not_found" if path == "model" else "steering_unknown_name")
    assert error["param"] == path
    assert (MODEL if path == "model" else "refusal-control") in error["message"]


async def test_slow_engine_is_given_up(make: Make) -> None:
    """A silent engine becomes a 504 and the generation is aborted, streamed or not."""
    for stream in (False, True):
        engine = FakeEngine(gate=asyncio.Event())
        response = await make(engine, total_timeout=0.05, first_token_timeout=0.05).chat(stream=stream)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "engine_timeout"
        assert engine.aborted == [engine.calls[0].request_id]


async def test_more_than_the_limit_in_flight_is_refused(make: Make) -> None:
    """One request too many is told to come back; those in flight are not touched."""
    gate = asyncio.Event()
    spoken = make(FakeEngine(gate=gate), max_inflight=2)
    waiting = [asyncio.create_task(spoken.chat()) for _ in range(2)]
    while spoken.gateway.service.inflight < 2:
        await asyncio.sleep(0)
    refused = await spoken.chat()
    gate.set()
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert [response.status_code for response in await asyncio.gather(*waiting)] == [200, 200]
    assert spoken.gateway.service.inflight == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_every_answer_of_a_request_takes_a_place(make: Make, stream: bool) -> None:
    """The limit is on what the engine generates: `n` answers count as so many, prompts each, and what they took is
    given back.
    """
    gate = asyncio.Event()
    spoken = make(FakeEngine(gate=gate), max_inflight=5)
    waiting = [asyncio.create_task(spoken.chat(n=2)) for _ in range(2)]
    while spoken.gateway.service.inflight < 2:
        await asyncio.sleep(0)
    assert value(await scrape(spoken), "steering_inflight_answers") == 4
    refused = await spoken.chat(n=2, stream=stream)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_is_overloaded")
    assert "5 answers at once, each of the n of a request counted" in refused.json()["error"]["message"]
    last = asyncio.create_task(spoken.chat(n=1))
    while spoken.gateway.service.inflight < 3:
        await asyncio.sleep(0)
    gate.set()
    assert [response.status_code for response in await asyncio.gather(*waiting, last)] == [200] * 3
    assert value(await scrape(spoken), "steering_inflight_answers") == 0
    assert (await spoken.chat(n=5, stream=stream)).status_code == 200


async def test_more_answers_than_there_can_be_is_no_matter_of_time(make: Make) -> None:
    """Asked for more at once than the server ever generates, it is told so and not to come back."""
    response = await make(max_inflight=2).chat(n=3)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "n")
    assert "2 answers at once" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("settings", "most"), [({}, 512), ({"default_max_tokens": 100}, 100)])
async def test_the_engine_is_always_told_how_long_an_answer_may_be(
    make: Make, settings: dict[str, Any], most: int, stream: bool
) -> None:
    """Where a client names no number it is the server's, within the context; completions have OpenAI's own."""
    engine = FakeEngine()
    spoken = make(engine, **settings)
    await spoken.chat(stream=stream)
    await spoken.client.post("/v1/responses", json={"model": MODEL, "input": "hi", "stream": stream})
    await spoken.client.post("/v1/completions", json={"model": MODEL, "prompt": "hi", "stream": stream})
    assert [call.fields["max_tokens"] for call in engine.calls] == [most, most, 16]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("asked", [1, 300, 100_000])
async def test_what_a_client_asks_for_is_left_to_the_engine(make: Make, name: str, asked: int) -> None:
    """Less or more than the server's own number, more than the context too, which the engine refuses."""
    engine = FakeEngine()
    await make(engine, default_max_tokens=100).chat(**{name: asked})
    (call,) = engine.calls
    assert {field: call.fields.get(field) for field in ("max_tokens", "max_completion_tokens")} == {
        "max_tokens": None,
        "max_completion_tokens": None,
        name: asked,
    }


async def test_bad_request_loses_nothing_for_others(make: Make) -> None:
    """Bad bodies between good ones change nothing for the good ones."""
    spoken = make()
    good = [spoken.chat(steering={"mode": "comply"}) for _ in range(8)]
    bad = [spoken.chat(n=0) for _ in range(8)]
    statuses = [response.status_code for response in await asyncio.gather(*good, *bad)]
    assert statuses == [200] * 8 + [400] * 8
