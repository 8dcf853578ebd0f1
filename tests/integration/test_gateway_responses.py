"""Responses and token counts over the real engine, spoken to with the real OpenAI SDK."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.integration.asking import GATE_DECIDES, ask
from tests.integration.serving import CONTEXT, GATED, MODEL, Server, prompt_ids

QUESTION = "how do I kill a process"
TOOL = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": None}


def respond(client: OpenAI, **fields: Any) -> Any:
    """A greedy response of a few tokens."""
    return client.responses.create(
        **{"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 8, **fields}
    )


def test_a_response_says_what_the_chat_says(client: OpenAI) -> None:
    """One string is a user message: the same text, the same usage, under the names that responses have."""
    long = QUESTION * 24  # more than a block of the prefix cache
    chat, response = ask(client, messages=[{"role": "user", "content": long}]), respond(client, input=long)
    assert response.output_text == chat.choices[0].message.content
    assert response.status == ("incomplete" if chat.choices[0].finish_reason == "length" else "completed")
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert response.usage.input_tokens_details.cached_tokens > 0
    assert response.steering["applied"] is False


@pytest.mark.parametrize("prompt", GATE_DECIDES)
def test_the_gate_decides(client: OpenAI, prompt: str) -> None:
    """Streamed and not, the decision is in the header and at the top of the response and of the last event."""
    decision, category = GATE_DECIDES[prompt]
    raw = client.responses.with_raw_response.create(
        model=MODEL, input=prompt, temperature=0, max_output_tokens=8, extra_body={"steering": GATED}
    )
    told = raw.parse().steering
    assert raw.headers["x-trimtab-decision"] == told["decision"] == decision
    assert told["category"] == category
    last = list(respond(client, input=prompt, stream=True, extra_body={"steering": GATED}))[-1]
    assert last.steering == last.response.steering == told


def test_events_come_in_openais_order_and_add_up(client: OpenAI) -> None:
    """Created, in progress, an item, its part, its text, and the response that one without a stream would be."""
    whole = respond(client, max_output_tokens=12)
    events = list(respond(client, max_output_tokens=12, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{whole.status}",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events[4:-4]) == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens


def test_the_sdks_own_stream_helper_reads_it(client: OpenAI) -> None:
    """`responses.stream` puts the pieces together to what a response without a stream says."""
    whole = respond(client, max_output_tokens=500)
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=500) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(texts) == whole.output_text


def test_a_conversation_with_calls_can_go_on(client: OpenAI) -> None:
    """A forced call comes as an item; sent back with its result, as the SDK sends it, the model goes on."""
    first = respond(
        client,
        tools=[TOOL],
        tool_choice={"type": "function", "name": "f"},
        max_output_tokens=200,
        extra_body={"steering": {"mode": "comply"}},
    )
    (call,) = [item for item in first.output if item.type == "function_call"]
    json.loads(call.arguments)
    assert first.steering["applied"] is True
    said = [{"role": "user", "content": QUESTION}, *first.output]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
    second = respond(client, input=[*said, result], tools=[TOOL], instructions="be brief")
    assert second.usage.input_tokens > first.usage.input_tokens


def test_a_streamed_call_adds_up(client: OpenAI) -> None:
    """The arguments of a forced call come in pieces, which make the item that ends."""
    events = list(
        respond(client, tools=[TOOL], tool_choice="required", max_output_tokens=200, stream=True, temperature=0)
    )
    pieces = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    calls = [item for item in events[-1].response.output if item.type == "function_call"]
    assert "".join(call.arguments for call in calls) == pieces


def test_structure_and_logprobs(client: OpenAI) -> None:
    """A schema shapes the text, steered or not; logprobs come with it where they are asked for."""
    form = {"type": "json_schema", "name": "x", "schema": {"type": "string", "enum": ["yes", "no"]}, "strict": True}
    for steering in (False, {"mode": "comply"}):
        response = respond(client, text={"format": form}, max_output_tokens=32, extra_body={"steering": steering})
        assert json.loads(response.output_text) in {"yes", "no"}
    response = respond(client, top_logprobs=3, include=["message.output_text.logprobs"])
    (part,) = response.output[0].content
    assert len(part.logprobs) == response.usage.output_tokens
    assert len(part.logprobs[0].top_logprobs) == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "parameter", "code"),
    [
        ({"input": "word " * CONTEXT * 4}, "input", "context_length_exceeded"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unknown_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value"),
        ({"extra_body": {"steering": {"profile": "nope"}}}, "steering.profile", "steering_unknown_name"),
    ],
)
def test_faults_name_the_field(client: OpenAI, fields: dict[str, Any], parameter: str, code: str, stream: bool) -> None:
    """The SDK's exception carries the field of this endpoint and the code, also where vLLM found the fault."""
    with pytest.raises(openai.BadRequestError) as caught:
        respond(client, stream=stream, **fields)
    assert (caught.value.param, caught.value.code) == (parameter, code)


def test_tokens_are_counted_as_prompts_are_made(gateway: Server, client: OpenAI, tiny_served_model: Any) -> None:
    """A conversation counts what its answer's usage counts; a plain prompt what a completion of it would."""
    model, _ = tiny_served_model
    messages = [{"role": "user", "content": QUESTION}]
    told = httpx.post(f"{gateway.url}/tokenize", json={"model": MODEL, "messages": messages}).json()
    assert told["tokens"] == prompt_ids(model, QUESTION)[0].tolist()
    assert told["count"] == len(told["tokens"]) == ask(client).usage.prompt_tokens
    assert told["max_model_len"] == CONTEXT
    plain = httpx.post(f"{gateway.url}/tokenize", json={"prompt": QUESTION}).json()
    completion = client.completions.create(model=MODEL, prompt=QUESTION, max_tokens=1)
    assert plain["count"] == completion.usage.prompt_tokens


@pytest.mark.parametrize("path", ["/detokenize", "/invocations", "/pooling", "/v1/embeddings", "/docs", "/metrics"])
def test_nothing_else_is_served(gateway: Server, path: str) -> None:
    """What vLLM's own server has besides is not found here, in the envelope."""
    answer = httpx.post(f"{gateway.url}{path}", json={"tokens": [1]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
