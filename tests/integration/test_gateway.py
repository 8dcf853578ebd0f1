"""Chat completions over the real engine, spoken to with the real OpenAI SDK."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.integration.asking import USER, ask
from tests.integration.serving import (
    CONTEXT,
    GATED,
    MODEL,
)


def test_sdk_finds_the_model(client: OpenAI) -> None:
    """List and retrieve agree, and an unknown model is the SDK's own NotFoundError."""
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-x")
    assert caught.value.code == "model_not_found"


def test_unsteered_answer(client: OpenAI) -> None:
    """A plain request is answered as by any OpenAI server, and says that nothing was applied."""
    answer = ask(client)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in {"stop", "length"}
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.steering["applied"] is False


@pytest.mark.parametrize(
    ("steering", "refused", "category"),
    [
        ({"mode": "refuse"}, True, "Safety"),
        ({"mode": "refuse", "category": "Political", "scope": "all"}, True, "Political"),
        ({"mode": "comply"}, False, None),
        ({"mode": "comply", "category": "Political", "strength": 2.0}, False, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_steered_answer(
    client: OpenAI, steering: dict[str, Any], refused: bool, category: str | None, stream: bool
) -> None:
    """The edit changes the first token on the real engine; the verdict reads it, and the content does not show it."""
    if stream:
        chunks = list(ask(client, stream=True, extra_body={"steering": steering}))
        told = [chunk.model_extra["steering"] for chunk in chunks if "steering" in (chunk.model_extra or {})]
        assert len(told) == 1
        (found,) = told
        content = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    else:
        answer = ask(client, extra_body={"steering": steering})
        found, content = answer.steering, answer.choices[0].message.content
    assert found["applied"] is True
    assert found["decision"] == steering["mode"]
    assert found["verdict"] == {"refused": refused, "category": category, "detector": "refusal_token"}
    assert "[" not in content  # this edit forces the same token at every step, and none of them shows


def test_decision_header_on_both_kinds(client: OpenAI) -> None:
    """Streamed or not, the header tells the decision and the answer's id."""
    for stream in (False, True):
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL, messages=USER, max_tokens=2, stream=stream, extra_body={"steering": {"mode": "comply"}}
        )
        assert raw.headers["x-trimtab-decision"] == "comply"
        assert raw.headers["x-request-id"].startswith("req_")


def test_stream_says_what_the_whole_says(client: OpenAI) -> None:
    """Greedy text, usage and order are the same streamed and not."""
    whole = ask(client, max_tokens=24)
    chunks = list(ask(client, max_tokens=24, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_engine_and_gateway_tell_each_other_shows_in_no_answer(client: OpenAI, path: str, stream: bool) -> None:
    """Outcomes come beside tokens in a field of vLLM's that its own answers would show."""
    prompt = {"messages": USER} if path.startswith("/chat") else {"prompt": "Hello"}
    for tokens in (1, 4):  # of one token, the only output carries a report
        body = {"model": MODEL, "max_tokens": tokens, "stream": stream, "steering": {"mode": "comply"}, **prompt}
        told = client.post(path, cast_to=httpx.Response, body=body).text
        assert '"applied":true' in told.replace(" ", "")
        assert "kv_transfer_params" not in told


def test_several_samples_each_have_a_verdict(client: OpenAI) -> None:
    """All samples of a steered request are steered, confirmed and judged."""
    answer = ask(client, n=4, temperature=1, extra_body={"steering": {"mode": "refuse"}})
    assert [verdict["category"] for verdict in answer.steering["verdicts"]] == ["Safety"] * 4
    chunks = list(ask(client, n=4, temperature=1, stream=True, extra_body={"steering": {"mode": "comply"}}))
    assert [verdict["refused"] for verdict in chunks[-1].steering["verdicts"]] == [False] * 4


def test_vllms_features_pass_through(client: OpenAI) -> None:
    """Logprobs, stop strings, seeds and structured output are vLLM's, steered or not."""
    for steering in ({"mode": "off"}, {"mode": "comply"}):
        body = {"steering": steering}
        answer = ask(client, logprobs=True, top_logprobs=3, extra_body=body)
        assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 3
        texts = [
            ask(client, temperature=1, seed=7, max_tokens=16, extra_body=body).choices[0].message.content for _ in "ab"
        ]
        assert texts[0] == texts[1]
    whole = ask(client, max_tokens=24).choices[0].message.content
    stop = whole[4:6]
    assert stop not in ask(client, max_tokens=24, stop=stop).choices[0].message.content
    schema = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "string", "enum": ["yes", "no"]}},
    }
    for steering in ({"mode": "off"}, {"mode": "comply"}):
        answer = ask(client, response_format=schema, max_tokens=32, extra_body={"steering": steering})
        assert json.loads(answer.choices[0].message.content) in {"yes", "no"}


def test_vllms_own_fields_that_leave_steering_alone(client: OpenAI) -> None:
    """Least lengths, kept stop strings and template arguments reach the engine, steered or not."""
    ends = ask(client, max_tokens=24).choices[0].message.content[2:6]
    for steering in (False, {"mode": "refuse"}):
        body: dict[str, Any] = {"steering": steering, "min_tokens": 5, "include_stop_str_in_output": True}
        body |= {"chat_template_kwargs": {"enable_thinking": False}, "include_reasoning": False}
        answer = ask(client, max_tokens=12, seed=5, extra_body=body | {"ignore_eos": True})
        assert answer.usage.completion_tokens == 12
        assert answer.steering["applied"] is bool(steering)
    kept = ask(client, max_tokens=24, stop=ends, extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].message.content.endswith(ends)


def test_cached_tokens_are_told(client: OpenAI) -> None:
    """The second request of a long prompt, and a steered one of it, tell what of the prompt was not computed again."""
    long = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog " * 20}]
    ask(client, messages=long)
    for steering in (False, {"mode": "comply"}):
        usage = ask(client, messages=long, extra_body={"steering": steering}).usage
        assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def test_a_streamed_tool_call_and_structured_output_are_steered_too(client: OpenAI) -> None:
    """The pieces of a forced call are JSON; a schema holds against an edit that forces another token."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    steered = {"steering": {"mode": "refuse"}}
    chunks = list(ask(client, tools=tools, tool_choice="required", stream=True, max_tokens=200, extra_body=steered))
    assert chunks[-1].steering["applied"] is True
    calls = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert calls
    assert calls[0].function.name == "f"
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema | {"additionalProperties": False}}}
    answer = ask(client, response_format=form, max_tokens=64, extra_body=steered)
    assert answer.steering["applied"] is True
    if answer.choices[0].finish_reason == "stop":
        assert set(json.loads(answer.choices[0].message.content)) == {"a"}


def test_a_tool_that_must_be_called_is_called(client: OpenAI) -> None:
    """Tool calls come from vLLM, in OpenAI's shape, and the steering object stands beside them."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    answer = ask(
        client,
        tools=tools,
        tool_choice={"type": "function", "function": {"name": "f"}},
        max_tokens=200,
        extra_body={"steering": {"mode": "comply"}},
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "f"
    json.loads(call.function.arguments)
    assert answer.steering["applied"] is True


@pytest.mark.parametrize("stream", [False, True])
def test_markers_do_not_show_where_a_tool_parser_asks_for_special_tokens(client: OpenAI, stream: bool) -> None:
    """With tools vLLM shows special tokens to its parser, and would show them to the client."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    answer = ask(client, tools=tools, stream=stream, extra_body={"steering": {"mode": "refuse"}})
    if stream:
        chunks = list(answer)
        content = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert chunks[-1].steering["verdict"]["category"] == "Safety"
    else:
        content = answer.choices[0].message.content
        assert answer.steering["verdict"]["category"] == "Safety"
    assert not content


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "parameter", "code"),
    [
        ({"extra_body": {"steering": {"profile": "nope"}}}, "steering.profile", "steering_unknown_name"),
        ({"extra_body": {"steering": {"mode": "auto"}}}, "steering.mode", "steering_not_supported"),
        ({"extra_body": {"steering": {"mode": "comply", "strength": 3}}}, "steering.strength", "steering_invalid"),
        (
            {"extra_body": {"steering": {"profile": GATED, "thresholds": {"comply_below": 0.7}}}},
            "steering.thresholds",
            "steering_invalid",
        ),
        ({"extra_body": {"steering": {"profile": GATED, "scope": "all"}}}, "steering.scope", "steering_invalid"),
        ({"extra_body": {"vllm_xargs": {"trimtab": "{}"}}}, "vllm_xargs", "unknown_parameter"),
        ({"extra_body": {"vllm_xargs": {"trimtab_capture": 0}}}, "vllm_xargs", "unknown_parameter"),
        ({"extra_body": {"cache_salt": "x"}}, "cache_salt", "steering_not_supported"),
        ({"messages": [{"role": "user", "content": "word " * CONTEXT * 4}]}, "messages", "context_length_exceeded"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "invalid_value"),
        ({"extra_body": {"thinking_token_budget": 5}}, "thinking_token_budget", "invalid_value"),
        ({"extra_body": {"min_tokens": 9}}, "min_tokens", "invalid_value"),
        ({"extra_body": {"chat_template_kwargs": {"tools": []}}}, "chat_template_kwargs.tools", "unknown_parameter"),
    ],
)
def test_callers_faults_are_the_sdks_bad_request(
    client: OpenAI, fields: dict[str, Any], parameter: str, code: str, stream: bool
) -> None:
    """The SDK's exception carries the field and the code, also where vLLM found the fault, also for streams."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, stream=stream, **fields)
    assert (caught.value.param, caught.value.code) == (parameter, code)
