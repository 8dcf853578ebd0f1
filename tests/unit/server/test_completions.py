"""Completions over the fake engine: prompts as they are, one or several, whole and streamed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from server.engine import Prompting
from server.wire.completions import MAX_ANSWERS, CompletionRequest
from server.wire.parsing import parse
from steering.errors import CallerError, EngineError
from tests.fakes import MODEL, FakeEngine, failing, make_catalog, make_gated_bundle, read
from tests.unit.server.conftest import Make, Spoken, read_events

BAD = [
    ({}, "prompt", "missing_required_parameter"),
    ({"prompt": None}, "prompt", "invalid_type"),
    ({"prompt": ""}, "prompt", "invalid_value"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": [[]]}, "prompt[0]", "invalid_value"),
    ({"prompt": ["a", ""]}, "prompt[1]", "invalid_value"),
    ({"prompt": ["a"] * 65}, "prompt", "invalid_value"),
    ({"prompt": [[1]] * 65}, "prompt", "invalid_value"),
    ({"prompt": [True]}, "prompt[0]", "invalid_type"),
    ({"prompt": [1, "a"]}, "prompt[1]", "invalid_type"),
    ({"prompt": ["a", 1]}, "prompt[1]", "invalid_type"),
    ({"prompt": [-1]}, "prompt[0]", "invalid_value"),
    ({"prompt": [2**31]}, "prompt[0]", "invalid_value"),
    ({"prompt": [[1], [1.5]]}, "prompt[1][0]", "invalid_type"),
    ({"prompt": {"text": "x"}}, "prompt", "invalid_type"),
    ({"prompt": "x", "logprobs": 21}, "logprobs", "invalid_value"),
    ({"prompt": "x", "logprobs": True}, "logprobs", "invalid_type"),
    ({"prompt": "x", "echo": 1}, "echo", "invalid_type"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"prompt": "x", "max_tokens": -1}, "max_tokens", "invalid_value"),
    ({"prompt": "x", "n": 9}, "n", "invalid_value"),
    ({"prompt": "x", "n": 2, "temperature": 0}, "n", "invalid_value"),
    ({"prompt": ["x"] * 17, "n": 8}, "n", "invalid_value"),
    ({"prompt": "x", "suffix": "y"}, "suffix", "unknown_parameter"),
    ({"prompt": "x", "best_of": 2}, "best_of", "unknown_parameter"),
    ({"prompt": "x", "prompt_embeds": "AA"}, "prompt_embeds", "unknown_parameter"),
    ({"prompt": "x", "messages": []}, "messages", "unknown_parameter"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"prompt": "x\0"}, "prompt", "invalid_value"),
]


async def complete(spoken: Spoken, **fields: Any) -> Any:
    """The answer to a request, which must be one."""
    response = await spoken.client.post("/v1/completions", json={"model": MODEL, "prompt": "Once upon", **fields})
    assert response.status_code == 200, response.text
    return response


@pytest.mark.parametrize(("fields", "parameter", "code"), BAD, ids=lambda value: repr(value)[:50])
def test_bad_body_is_refused_with_its_field(fields: dict[str, Any], parameter: str, code: str) -> None:
    """Wrong forms, ranges and combinations name the field and a stable code."""
    with pytest.raises(CallerError) as caught:
        parse(CompletionRequest, json.dumps({"model": "m", **fields}).encode())
    assert (caught.value.parameter, caught.value.code) == (parameter, code)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a b", ["a b"]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_each_form_of_a_prompt_becomes_its_generations(prompt: Any, prompts: list[Any]) -> None:
    """A string and a list of ids are one prompt; lists of either are several."""
    made = parse(CompletionRequest, json.dumps({"model": "m", "prompt": prompt}).encode()).to_generations()
    assert [each.prompt for each in made] == prompts
    assert {each.prompting for each in made} == {Prompting.PLAIN}
    assert {each.default_tokens for each in made} == {16}
    assert not any("max_tokens" in each.fields for each in made)
    assert all(set(each.prompt_fields) == {"model", "prompt"} for each in made)


async def test_a_completion_has_openais_shape(make: Make) -> None:
    """Text in the place of a message, an id of its own kind, and the steering object beside it."""
    engine = FakeEngine()
    body = (await complete(make(engine), steering={"mode": "comply"})).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [{"index": 0, "text": "Hello there!", "logprobs": None, "finish_reason": "stop"}]
    assert (body["steering"]["applied"], body["steering"]["verdict"]["refused"]) == (True, False)
    (call,) = engine.calls
    assert (call.prompting, call.fields["prompt"]) == (Prompting.PLAIN, "Once upon")


async def test_a_stream_adds_up_to_the_whole(make: Make) -> None:
    """Chunks are text completions; the last with a choice carries the steering object, then comes the usage."""
    response = await complete(make(), stream=True, stream_options={"include_usage": True}, steering={"mode": "refuse"})
    events = read_events(response.text)
    assert {event["object"] for event in events} == {"text_completion"}
    assert "".join(choice["text"] for event in events for choice in event["choices"]) == "Hello there!"
    assert events[-2]["steering"]["decision"] == "refuse"
    assert (events[-1]["choices"], events[-1]["usage"]["completion_tokens"]) == ([], 4)
    assert all("delta" not in choice for event in events for choice in event["choices"])


@pytest.mark.parametrize("prompt", ["Once upon", [7, 8]])
@pytest.mark.parametrize("n", [1, 2])
async def test_an_echo_goes_before_each_text(make: Make, prompt: Any, n: int) -> None:
    """Streamed and not, each choice begins with the prompt, in one chunk with the first of its own text."""
    spoken = make(FakeEngine(shows_markers=True))
    fields = {"prompt": prompt, "echo": True, "n": n, "steering": {"mode": "refuse"}}
    whole = (await complete(spoken, **fields)).json()
    echoed = prompt if isinstance(prompt, str) else str(prompt)
    assert [choice["text"] for choice in whole["choices"]] == [f"{echoed}Hello there!"] * n
    events = read_events((await complete(spoken, stream=True, **fields)).text)
    for index in range(n):
        pieces = [choice["text"] for event in events for choice in event["choices"] if choice["index"] == index]
        assert pieces[0].startswith(echoed)
        assert "".join(pieces) == f"{echoed}Hello there!"


def gated() -> tuple[FakeEngine, Any]:
    """An engine and the catalog of a bundle whose gate decides every prompt by itself."""
    bundle = make_gated_bundle()
    return FakeEngine(bundles=[bundle], scores=(read(0.95),)), make_catalog(bundle)


async def test_several_prompts_are_each_planned_and_confirmed(make: Make) -> None:
    """One request of three prompts: three calls with ids and plans of their own, none of which is left behind."""
    engine, catalog = gated()
    spoken = make(engine, catalog)
    body = (await complete(spoken, prompt=["a", "b", "c"], n=2, temperature=1, steering={"mode": "auto"})).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert body["usage"] == {"prompt_tokens": 15, "completion_tokens": 24, "total_tokens": 39}
    assert len(body["steering"]["prompts"]) == 3
    plans = [call.plan.id for call in engine.calls if call.plan is not None]
    assert len({call.request_id for call in engine.calls}) == len(set(plans)) == 3
    assert sorted(engine.forgotten) == sorted(plans)
    assert body["id"].removeprefix("cmpl-") == engine.calls[0].request_id.rpartition("-")[0]


async def test_several_prompts_stream_as_one(make: Make) -> None:
    """Choices of all prompts, one id, one steering object with the last choice, one usage, and the end."""
    engine, catalog = gated()
    response = await complete(
        make(engine, catalog),
        prompt=["a", "b", "c"],
        stream=True,
        stream_options={"include_usage": True},
        steering={"mode": "auto"},
    )
    events = read_events(response.text)
    assert response.headers["x-trimtab-decision"] == "refuse"
    assert {event["id"] for event in events} == {events[0]["id"]}
    for index in range(3):
        pieces = [choice["text"] for event in events for choice in event["choices"] if choice["index"] == index]
        assert "".join(pieces) == "Hello there!"
    assert [len(event["steering"]["prompts"]) for event in events if "steering" in event] == [3]
    assert [event["usage"]["completion_tokens"] for event in events if not event["choices"]] == [12]


@pytest.mark.parametrize("stream", [False, True])
async def test_one_prompt_that_fails_fails_the_request(make: Make, stream: bool) -> None:
    """No answer of half the prompts: the error is told, and nothing runs on."""
    spoken = make(failing(EngineError("broke"), after=1))
    fields = {"model": MODEL, "prompt": ["a", "b", "c"], "stream": stream, "steering": {"mode": "refuse"}}
    response = await spoken.client.post("/v1/completions", json=fields)
    assert "broke" in response.text
    assert "[DONE]" not in response.text
    assert spoken.gateway.service.inflight == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unconfirmed_prompt_withholds_every_answer(make: Make, stream: bool) -> None:
    """One prompt whose edit is not confirmed, and none of the request's answers is given."""
    spoken = make(FakeEngine(confirms=False))
    fields = {"model": MODEL, "prompt": ["a", "b"], "stream": stream, "steering": {"mode": "refuse"}}
    response = await spoken.client.post("/v1/completions", json=fields)
    assert response.status_code == 500
    assert "Hello" not in response.text
    assert spoken.gateway.service.inflight == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_the_end_of_a_drain_ends_every_prompt(make: Make, stream: bool) -> None:
    """Prompts that wait for the engine when the server gives up are answered with an error, all of them."""
    engine = FakeEngine(gate=asyncio.Event(), gate_after=1)
    spoken = make(engine)
    fields = {"model": MODEL, "prompt": ["a", "b"], "stream": stream}
    asking = asyncio.create_task(spoken.client.post("/v1/completions", json=fields))
    while spoken.gateway.service.inflight < 2:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    spoken.gateway.service.abort_all()
    response = await asyncio.wait_for(asking, 5)
    assert "server_is_overloaded" in response.text or "shut down" in response.text
    assert spoken.gateway.service.inflight == 0
    assert len(engine.aborted) == 2


def test_the_bound_on_answers_is_what_the_message_says() -> None:
    """Prompts times n, which is what the engine would have to hold at once."""
    with pytest.raises(CallerError, match=str(MAX_ANSWERS)):
        parse(CompletionRequest, json.dumps({"model": "m", "prompt": ["x"] * 64, "n": 3}).encode())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("prompts", "n", "status"), [(3, 1, 200), (4, 1, 400), (2, 2, 400), (1, 3, 200)])
async def test_more_prompts_than_there_is_ever_room_for_are_refused(
    make: Make, prompts: int, n: int, status: int, stream: bool
) -> None:
    """Sending it again would not help: 400 before the engine is asked, where a full server answers 503."""
    engine = FakeEngine()
    spoken = make(engine, max_inflight=3)
    body = {"model": MODEL, "prompt": ["x"] * prompts, "n": n, "temperature": 1, "stream": stream}
    response = await spoken.client.post("/v1/completions", json=body)
    assert response.status_code == status
    if status == 400:
        error = response.json()["error"]
        assert (error["param"], error["code"]) == ("n", "steering_invalid")
        assert f"{prompts * n} answers" in error["message"]
        assert engine.calls == []
