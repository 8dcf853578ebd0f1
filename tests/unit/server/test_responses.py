"""Responses over the fake engine: input items, output items, and the events that OpenAI's SDK reads."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response as TheirResponse
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from server.confirmed import OpenStream
from server.effects import Effect
from server.wire.items import messages_of
from server.wire.parsing import parse
from server.wire.response_shape import ResponseShape
from server.wire.responses import ResponsesRequest
from steering.errors import CallerError, EngineError
from tests.fakes import MODEL, failing
from tests.unit.server.conftest import Make, Spoken

THEIR_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": None}


def request_of(**fields: Any) -> ResponsesRequest:
    """A checked request."""
    return parse(ResponsesRequest, json.dumps({"model": "m", "input": "hi", **fields}).encode())


async def respond(spoken: Spoken, **fields: Any) -> Any:
    """The answer to a request, which must be one."""
    response = await spoken.client.post("/v1/responses", json={"model": MODEL, "input": "hi", **fields})
    assert response.status_code == 200, response.text
    return response


def events_in(text: str) -> list[dict[str, Any]]:
    """Events of a stream, each of which must be one of the SDK's, under its own name and in order."""
    found = []
    for block in filter(None, text.split("\n\n")):
        name, _, rest = block.partition("\n")
        event = json.loads(rest.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return checked(found)


def checked(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events, as the SDK's own types take them."""
    for event in events:
        THEIR_EVENT.validate_python(event, strict=False)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return list(events)


MISSING = "missing_required_parameter"
BAD = [
    ({"input": None}, "input", "invalid_type"),
    ({"input": []}, "input", "invalid_type"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "invalid_value"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "invalid_value"),
    ({"input": [{"type": "web_search_call", "id": "x", "status": "completed"}]}, "input[0].type", "invalid_value"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0].type",
        "invalid_value",
    ),
    (
        {"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]},
        "input[0].call_id",
        MISSING,
    ),
    ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output", MISSING),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "invalid_value"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name", "invalid_value"),
    ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice.type", "invalid_value"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format", "invalid_value"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type", "invalid_value"),
    ({"reasoning": {"effort": "much"}}, "reasoning.effort", "invalid_value"),
    ({"include": ["web_search_call.results"]}, "include[0]", "unknown_parameter"),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "unknown_parameter"),
    ({"conversation": "conv_1"}, "conversation", "unknown_parameter"),
    ({"background": True}, "background", "unknown_parameter"),
    ({"store": True}, "store", "unknown_parameter"),
    ({"truncation": "auto"}, "truncation", "unknown_parameter"),
    ({"prompt": {"id": "p"}}, "prompt", "unknown_parameter"),
    ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
    ({"max_tokens": 3}, "max_tokens", "unknown_parameter"),
    ({"messages": []}, "messages", "unknown_parameter"),
    ({"top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"steering": {"mode": "Refuse"}}, "steering.mode", "steering_invalid"),
]


@pytest.mark.parametrize(("fields", "parameter", "code"), BAD, ids=lambda value: repr(value)[:60])
def test_bad_body_is_refused_with_its_field(fields: dict[str, Any], parameter: str, code: str) -> None:
    """Wrong types and combinations, and everything that would need memory or tools here, name the field."""
    with pytest.raises(CallerError) as caught:
        request_of(**fields)
    assert (caught.value.parameter, caught.value.code) == (parameter, code)


def test_items_become_the_conversation_they_were() -> None:
    """What the model gave in a row is one message of its; results of calls and users come between."""
    items = [
        {"role": "developer", "content": "rules"},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": text} for text in "ab"],
        },
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{}", "status": "completed"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
        {"role": "assistant", "content": "so"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ]
    asked = request_of(input=items, instructions="be brief")
    calls = [
        {"id": name, "type": "function", "function": {"name": function, "arguments": "{}"}}
        for name, function in (("c1", "f"), ("c2", "g"))
    ]
    assert messages_of(asked.instructions, asked.input) == [
        {"role": "system", "content": "be brief"},
        {"role": "developer", "content": "rules"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "I look.", "reasoning": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "assistant", "content": "so"},
        {"role": "assistant", "content": "no"},
    ]


def test_a_request_becomes_a_chat_completion() -> None:
    """Limits, tools, formats, effort and logprobs go to the engine by the names that chats have for them."""
    schema = {"type": "object", "properties": {"a": {"default": None}}}
    fields = request_of(
        max_output_tokens=9,
        tools=[{**TOOL, "description": "d", "strict": True}],
        tool_choice={"type": "function", "name": "f"},
        parallel_tool_calls=False,
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}, "verbosity": "low"},
        reasoning={"effort": "low", "summary": "auto"},
        top_logprobs=2,
    ).engine_fields()
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
    assert fields == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 9,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}},
        "reasoning_effort": "low",
        "logprobs": True,
        "top_logprobs": 2,
    }


async def test_a_response_has_the_sdks_shape(make: Make) -> None:
    """One message item, usage under its names, what was asked repeated, and the steering object at the top."""
    body = (
        await respond(make(), instructions="i", metadata={"a": "b"}, store=False, steering={"mode": "comply"})
    ).json()
    theirs = TheirResponse.model_validate(body)
    assert theirs.output_text == "Hello there!"
    assert (theirs.status, body["store"]) == ("completed", False)
    assert (body["instructions"], body["metadata"], body["incomplete_details"]) == ("i", {"a": "b"}, None)
    assert body["usage"]["input_tokens"] + body["usage"]["output_tokens"] == body["usage"]["total_tokens"]
    assert body["usage"]["input_tokens_details"]["cached_tokens"] == 0
    assert (body["steering"]["decision"], body["steering"]["applied"]) == ("comply", True)


async def test_events_are_the_sdks_and_end_with_the_response(make: Make) -> None:
    """OpenAI's order for one message; the last event holds the whole response, and steering beside it."""
    response = await respond(make(), stream=True, steering={"mode": "refuse"})
    assert response.headers["x-trimtab-decision"] == "refuse"
    events = events_in(response.text)
    kinds = [event["type"].removeprefix("response.") for event in events]
    texts = kinds.count("output_text.delta")
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * texts,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert "".join(event["delta"] for event in events[4 : 4 + texts]) == "Hello there!"
    last = events[-1]
    assert last["steering"] == last["response"]["steering"]
    assert last["steering"]["verdict"]["refused"] is True
    assert last["response"]["output"][0] == events[-2]["item"]
    assert last["response"]["usage"]["output_tokens"] == 4
    assert TheirResponse.model_validate(last["response"]).output_text == "Hello there!"


async def test_an_error_in_mid_stream_is_a_failed_response(make: Make) -> None:
    """What came until then is told as incomplete, the error with it; no other event follows."""
    events = events_in((await respond(make(failing(EngineError("broke"), after=2)), stream=True)).text)
    failed = events[-1]["response"]
    assert (events[-1]["type"], failed["status"], failed["error"]) == (
        "response.failed",
        "failed",
        {"code": "server_error", "message": "broke"},
    )
    assert failed["output"][0]["status"] == "incomplete"


def chunk(delta: dict[str, Any], finish: str | None = None, **fields: Any) -> dict[str, Any]:
    """A chunk of a chat completion, as vLLM gives it."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {"id": "chatcmpl-ab", "created": 1, "model": "m", "choices": [choice], **fields}


def call(index: int, name: str | None = None, arguments: str | None = None) -> dict[str, Any]:
    """A piece of a call."""
    function = {"name": name, "arguments": arguments}
    return {"index": index, "id": f"call_{index}" if name else None, "type": "function", "function": function}


CHUNKS = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"reasoning": "let me "}),
    chunk({"reasoning": "see"}),
    chunk({"content": "I "}),
    chunk({"content": "look."}),
    chunk({"tool_calls": [call(0, "f", "")]}),
    chunk({"tool_calls": [call(0, arguments='{"a":')]}),
    chunk({"tool_calls": [call(0, arguments="1}")]}),
    chunk({"tool_calls": [call(1, "g", "{}")]}),
    chunk({"content": ""}, "tool_calls", steering={"applied": False}),
    {
        **chunk({}),
        "choices": [],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 7,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    },
]


async def streamed(chunks: Sequence[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    """The events that these chunks become."""

    async def rest() -> AsyncGenerator[dict[str, Any], None]:
        for each in chunks[1:]:
            yield each

    opened = OpenStream(effect=Effect(decision="off"), first=chunks[0], rest=rest())
    return checked([event.data async for event in ResponseShape(request_of(**fields)).events(opened)])


async def test_reasoning_text_and_calls_are_items_in_turn() -> None:
    """Each kind of delta opens an item of its own once the one before has ended; pieces add up."""
    events = await streamed(CHUNKS, tools=[TOOL])
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "function_call"]
    assert output[0]["content"] == [{"type": "reasoning_text", "text": "let me see"}]
    assert output[1]["content"][0]["text"] == "I look."
    assert [(item["call_id"], item["name"], item["arguments"]) for item in output[2:]] == [
        ("call_0", "f", '{"a":1}'),
        ("call_1", "g", "{}"),
    ]
    added = [event["output_index"] for event in events if event["type"] == "response.output_item.added"]
    done = [event["output_index"] for event in events if event["type"] == "response.output_item.done"]
    assert added == done == [0, 1, 2, 3]
    assert len({item["id"] for item in output}) == 4
    assert events[-1]["response"]["usage"]["input_tokens_details"]["cached_tokens"] == 4
    TheirResponse.model_validate(events[-1]["response"])


async def test_the_sdks_own_accumulator_comes_to_the_same_items() -> None:
    """What `client.responses.stream` puts together of the events is the response that they end with."""
    events = await streamed(CHUNKS, tools=[TOOL])
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=[], text_format=omit)
    for event in events[:-1]:
        state.handle_event(THEIR_EVENT.validate_python(event))
    (last,) = state.handle_event(THEIR_EVENT.validate_python(events[-1]))
    assert last.type == "response.completed"
    told = [item.to_dict() for item in last.response.output]
    for mine, theirs in zip(events[-1]["response"]["output"], told, strict=True):
        assert {name: theirs[name] for name in mine if name != "content"} == {
            name: value for name, value in mine.items() if name != "content"
        }
    assert last.response.output_text == "I look."


async def test_the_whole_is_what_the_stream_ends_with() -> None:
    """The same message in one piece gives the same items, but for when it was made."""
    message = {
        "role": "assistant",
        "content": "I look.",
        "reasoning": "let me see",
        "tool_calls": [
            {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
            {"id": "call_1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls"}
    body = {"id": "chatcmpl-ab", "created": 1, "model": "m", "choices": [choice], "usage": CHUNKS[-1]["usage"]}
    whole = ResponseShape(request_of(tools=[TOOL])).whole(body | {"steering": {"applied": False}})
    told = (await streamed(CHUNKS, tools=[TOOL]))[-1]["response"]
    assert whole | {"completed_at": 0} == told | {"completed_at": 0}


async def test_a_cut_answer_is_incomplete() -> None:
    """The last event and the status say that tokens ran out."""
    events = await streamed([chunk({"content": "a"}), chunk({"content": "b"}, "length")])
    assert events[-1]["type"] == "response.incomplete"
    response = events[-1]["response"]
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert response["output"][0]["status"] == "incomplete"


async def test_an_empty_answer_is_an_empty_message() -> None:
    """Clients that read the first item find one."""
    events = await streamed([chunk({"content": ""}, "stop")])
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == ""


async def test_logprobs_come_with_the_text() -> None:
    """Each delta has those of its tokens, and the part has all."""
    first, second = chunk({"content": "a"}), chunk({"content": "b"}, "stop")
    for each, token in ((first, "a"), (second, "b")):
        told = {"token": token, "logprob": -0.5, "bytes": [97], "top_logprobs": []}
        each["choices"][0]["logprobs"] = {"content": [told]}
    events = await streamed([first, second], top_logprobs=1)
    part = events[-1]["response"]["output"][0]["content"][0]
    assert [each["token"] for each in part["logprobs"]] == ["a", "b"]
