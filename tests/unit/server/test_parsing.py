"""What may enter, and how what may not is told."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.policy import Report, SteeringSpec
from server.wire.chat import ChatRequest
from server.wire.parsing import parse
from steering.errors import CallerError
from steering.plan import CategorySource, Mode, Scope

HEAD = b'{"model":"m","messages":[{"role":"user","content":"hi"}]'


def body(**fields: Any) -> bytes:
    """A valid body with these fields added or replaced."""
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}).encode()


def message(**fields: Any) -> bytes:
    """A body of one user message with these fields added or replaced."""
    return body(messages=[{"role": "user", "content": "hi", **fields}])


def tool(**function: Any) -> list[dict[str, Any]]:
    """A list of one tool."""
    return [{"type": "function", "function": {"name": "f", **function}}]


def nested(levels: int) -> dict[str, Any]:
    """An object schema of so many levels."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


BAD = [
    (b"", None, "invalid_json"),
    (b"{", None, "invalid_json"),
    (b"[]", None, "invalid_json"),
    (b"3", None, "invalid_json"),
    (b"\xff\xfe", None, "invalid_json"),
    (b"[" * 10_000, None, "invalid_json"),
    (HEAD + b',"x":' + b'{"a":' * 300 + b"1" + b"}" * 301, None, "invalid_json"),
    (HEAD + b',"seed":' + b"9" * 5000 + b"}", None, "invalid_json"),
    (b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}', None, "invalid_json"),
    (b'{"model":"m","messages":[{"role":"user","content":"a\x00"}]}', None, "invalid_json"),
    (b'{"model":"m","messages":[{"role":"user","content":"a\\u0000"}]}', "messages[0].content", "invalid_value"),
    (HEAD + b',"temperature":NaN}', "temperature", "invalid_value"),
    (HEAD + b',"temperature":Infinity}', "temperature", "invalid_value"),
    (HEAD + b',"temperature":1e400}', "temperature", "invalid_value"),
    (HEAD + b',"steering":{"strength":NaN}}', "steering.strength", "steering_invalid"),
    (HEAD + b',"steering":{"strength":-0.0}}', "steering.strength", "steering_invalid"),
    (body(n=True), "n", "invalid_type"),
    (body(n="3"), "n", "invalid_type"),
    (body(n=1.0), "n", "invalid_type"),
    (body(n=0), "n", "invalid_value"),
    (body(n=9), "n", "invalid_value"),
    (body(max_tokens=0), "max_tokens", "invalid_value"),
    (body(max_tokens=-1), "max_tokens", "invalid_value"),
    (body(max_tokens=2**63), "max_tokens", "invalid_value"),
    (body(max_tokens=1, max_completion_tokens=1), "max_tokens", "invalid_value"),
    (body(n=2, temperature=0), "n", "invalid_value"),
    (body(stream="yes"), "stream", "invalid_type"),
    (body(stream_options={"include_usage": True}), "stream_options", "invalid_value"),
    (body(stop=["a"] * 5), "stop", "invalid_type"),
    (body(stop=""), "stop", "invalid_value"),
    (body(stop=["a", ""]), "stop[1]", "invalid_value"),
    (body(top_logprobs=21, logprobs=True), "top_logprobs", "invalid_value"),
    (body(top_logprobs=2), "top_logprobs", "invalid_value"),
    (body(logit_bias={"x": 1}), "logit_bias", "invalid_value"),
    (body(logit_bias={"٣": 1}), "logit_bias", "invalid_value"),
    (body(logit_bias={"1": 101}), "logit_bias.1", "invalid_value"),
    (body(logit_bias={str(i): 1 for i in range(301)}), "logit_bias", "invalid_value"),
    (body(messages=[]), "messages", "invalid_value"),
    (body(messages="hi"), "messages", "invalid_type"),
    (body(messages=[{"role": "user", "content": "x"}] * 2049), "messages", "invalid_value"),
    (body(messages=[{"content": "x"}]), "messages[0].role", "invalid_value"),
    (message(role="robot"), "messages[0].role", "invalid_value"),
    (message(role="function"), "messages[0].role", "invalid_value"),
    (message(role="tool"), "messages[0].tool_call_id", "missing_required_parameter"),
    (message(content=3), "messages[0].content", "invalid_type"),
    (message(content=None), "messages[0].content", "invalid_type"),
    (message(content=[]), "messages[0].content", "invalid_type"),
    (
        message(content=[{"type": "image_url", "image_url": {"url": "x"}}]),
        "messages[0].content[0].type",
        "invalid_value",
    ),
    (message(extra=1), "messages[0].extra", "unknown_parameter"),
    (json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode(), "model", "missing_required_parameter"),
    (body(model=""), "model", "invalid_value"),
    (body(tools=[]), "tools", "invalid_value"),
    (body(tools=tool(name="a b")), "tools[0].function.name", "invalid_value"),
    (body(tools=tool(parameters=nested(40))), "tools[0].function.parameters", "invalid_value"),
    (body(tools=tool(parameters={"x": "y" * 70_000})), "tools[0].function.parameters", "invalid_value"),
    (body(tools=tool(parameters={"pattern": "(a+)+" * 200})), "tools[0].function.parameters", "invalid_value"),
    (body(tools=tool(parameters={"$ref": "#"})), "tools[0].function.parameters", "invalid_value"),
    (
        body(tools=tool(parameters={"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})),
        "tools[0].function.parameters",
        "invalid_value",
    ),
    (body(tools=tool() * 129), "tools", "invalid_value"),
    (body(tool_choice="auto"), "tool_choice", "invalid_value"),
    (
        body(tools=tool(), tool_choice={"type": "function", "function": {"name": "g"}}),
        "tool_choice.function.name",
        "invalid_value",
    ),
    (body(response_format={"type": "json_schema"}), "response_format", "invalid_value"),
    (body(response_format={"type": "grammar"}), "response_format.type", "invalid_value"),
    (body(modalities=["text", "audio"]), "modalities", "invalid_value"),
    (body(verbosity="loud"), "verbosity", "invalid_value"),
    (body(temprature=1), "temprature", "unknown_parameter"),
    (body(steering=True), "steering", "steering_invalid"),
    (body(steering=1), "steering", "steering_invalid"),
    (body(steering=""), "steering", "steering_invalid"),
    (body(steering=[]), "steering", "steering_invalid"),
    (body(steering={"mode": "Refuse"}), "steering.mode", "steering_invalid"),
    (body(steering={"vector": [1.0]}), "steering.vector", "steering_invalid"),
    (body(steering={"strength": "1"}), "steering.strength", "steering_invalid"),
    (body(steering={"strength": True}), "steering.strength", "steering_invalid"),
    (body(steering={"strength": 0}), "steering.strength", "steering_invalid"),
    (body(steering={"strength": -1.0}), "steering.strength", "steering_invalid"),
    (body(steering={"scope": "some"}), "steering.scope", "steering_invalid"),
    (body(steering={"report": "all"}), "steering.report", "steering_invalid"),
    (body(steering={"category": ""}), "steering.category", "steering_invalid"),
    (body(steering={"category": []}), "steering.category", "steering_invalid"),
    (body(steering={"category": ["a"] * 17}), "steering.category", "steering_invalid"),
    (body(steering={"category": ["a", ""]}), "steering.category[1]", "steering_invalid"),
    (body(steering={"category": 3}), "steering.category", "steering_invalid"),
    (body(steering={"category_source": "judge"}), "steering.category_source", "steering_invalid"),
    (body(steering={"graded": 1}), "steering.graded", "steering_invalid"),
    (body(steering={"thresholds": 0.5}), "steering.thresholds", "steering_invalid"),
    (body(steering={"thresholds": {"middle": 0.5}}), "steering.thresholds.middle", "steering_invalid"),
    (body(steering={"thresholds": {"refuse_above": True}}), "steering.thresholds.refuse_above", "steering_invalid"),
    (body(steering={"thresholds": {"comply_below": -0.1}}), "steering.thresholds.comply_below", "steering_invalid"),
    (body(steering={"thresholds": {"comply_below": 1.5}}), "steering.thresholds.comply_below", "steering_invalid"),
    (
        HEAD + b',"steering":{"thresholds":{"refuse_above":NaN}}}',
        "steering.thresholds.refuse_above",
        "steering_invalid",
    ),
    (b'{"model":"m\\u0000","messages":[{"role":"user","content":"x"}]}', "model", "invalid_value"),
    (HEAD + b',"steering":{"profile":"a\\u0000b"}}', "steering.profile", "invalid_value"),
]


@pytest.mark.parametrize(("payload", "parameter", "code"), BAD, ids=lambda value: repr(value)[:60])
def test_bad_body_is_refused_with_its_field(payload: bytes, parameter: str | None, code: str) -> None:
    """Wrong types, ranges, names, combinations and encodings name the field and a stable code."""
    with pytest.raises(CallerError) as caught:
        parse(ChatRequest, payload)
    assert (caught.value.parameter, caught.value.code) == (parameter, code)
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize("name", sorted(ChatRequest.refused))
def test_internal_fields_are_refused_by_name_and_with_a_reason(name: str) -> None:
    """Fields that other servers pass to the engine are never forwarded, and the reason is told."""
    with pytest.raises(CallerError) as caught:
        parse(ChatRequest, body(**{name: None}))
    assert caught.value.parameter == name
    assert ChatRequest.refused[name] in caught.value.message


@pytest.mark.parametrize("field", ["vllm_xargs", "extra_args", "trimtab_capture", "capture"])
def test_residuals_cannot_be_asked_for_over_http(field: str) -> None:
    """Whatever could carry the engine's capture key is refused by name, also where it hides in the steering field."""
    for value in (7, [7, 3], {"trimtab_capture": 7}):
        with pytest.raises(CallerError) as caught:
            parse(ChatRequest, body(**{field: value}))
        assert caught.value.parameter == field
        with pytest.raises(CallerError) as caught:
            parse(ChatRequest, body(steering={field: value}))
        assert caught.value.parameter == f"steering.{field}"


def test_refused_fields_are_not_fields() -> None:
    """The list of refused names and the wire model cannot contradict each other."""
    assert not set(ChatRequest.refused) & set(ChatRequest.model_fields)


def test_near_miss_is_suggested() -> None:
    """A typing error in a field's name is answered with the name that was meant."""
    with pytest.raises(CallerError, match="'temperature'"):
        parse(ChatRequest, body(temprature=1))


def test_of_a_long_key_the_beginning_is_compared_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither looking for what was meant nor the error grows with a key of two megabytes."""
    compared: list[str] = []
    monkeypatch.setattr("difflib.get_close_matches", lambda word, *_, **__: compared.append(word) or [])
    with pytest.raises(CallerError) as caught:
        parse(ChatRequest, body(**{"temperature" * 180_000: 1}))
    assert [len(word) for word in compared] == [100]
    assert (len(caught.value.parameter or ""), caught.value.code) == (100, "unknown_parameter")
    assert len(caught.value.message) < 200


def test_harmless_fields_are_ignored() -> None:
    """Fields that SDKs send for other servers are accepted and do not reach the engine."""
    ignored = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "x",
        "prompt_cache_retention": "24h",
        "verbosity": "low",
        "modalities": ["text"],
    }
    assert parse(ChatRequest, body(**ignored)).engine_fields() == parse(ChatRequest, body()).engine_fields()


def test_nulls_mean_absent_but_stay_inside_schemas() -> None:
    """OpenAI's optional fields may be null; nulls in a client's own schema are part of it."""
    schema = {"type": "object", "properties": {"a": {"enum": [None, 1], "default": None}}}
    fields = parse(ChatRequest, body(temperature=None, stop=None, tools=tool(parameters=schema))).engine_fields()
    assert "temperature" not in fields
    assert "stop" not in fields
    assert fields["tools"][0]["function"]["parameters"] == schema


def test_a_pass_over_the_prompt_takes_what_the_prompt_is_made_of() -> None:
    """Messages, shown tools and effort; nothing that samples, stops, forces or formats an answer."""
    request = parse(
        ChatRequest,
        body(
            tools=tool(),
            tool_choice="required",
            reasoning_effort="low",
            n=2,
            temperature=1,
            max_tokens=9,
            stop="x",
            logprobs=True,
            logit_bias={"1": 5},
            response_format={"type": "json_object"},
            seed=1,
        ),
    )
    fields = request.to_generation().prompt_fields
    assert set(fields) == {"model", "messages", "tools", "reasoning_effort", "tool_choice"}
    assert fields["tool_choice"] == "none"
    assert set(parse(ChatRequest, body(stop="x")).to_generation().prompt_fields) == {"model", "messages"}


def test_recursive_schemas_are_allowed() -> None:
    """A tree refers to itself through its properties, which ends; only references to nothing but references do not."""
    tree = {"type": "object", "properties": {"left": {"$ref": "#"}, "x": {"$ref": "#/$defs/x"}}, "$defs": {"x": {}}}
    assert parse(ChatRequest, body(tools=tool(parameters=tree))).tools


def test_an_answer_can_be_sent_back() -> None:
    """An assistant message with every field an SDK dumps comes out as engines read it."""
    answer = {
        "role": "assistant",
        "content": None,
        "refusal": "I cannot.",
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    asked = [{"role": "user", "content": "x"}, answer, {"role": "user", "content": [{"type": "text", "text": "why"}]}]
    fields = parse(ChatRequest, body(messages=asked)).engine_fields()
    assert fields["messages"][1] == {"role": "assistant", "content": "I cannot."}
    assert fields["messages"][2]["content"] == [{"type": "text", "text": "why"}]


@pytest.mark.parametrize(
    ("value", "spec"),
    [
        (None, None),
        (False, SteeringSpec(mode=Mode.OFF)),
        ("calm", SteeringSpec(profile="calm")),
        ({}, SteeringSpec()),
        (
            {"profile": "p", "mode": "comply", "category": "c", "strength": 2, "scope": "all", "report": "none"},
            SteeringSpec(
                profile="p", mode=Mode.COMPLY, category="c", strength=2.0, scope=Scope.ALL, report=Report.NONE
            ),
        ),
        ({"thresholds": {}}, SteeringSpec()),
        (
            {"category": ["a", "b"], "category_source": "refusal_tokens", "graded": True, "report": "full"},
            SteeringSpec(
                category=("a", "b"),
                category_source=CategorySource.REFUSAL_TOKENS,
                is_graded=True,
                report=Report.FULL,
            ),
        ),
        (
            {"mode": "auto", "thresholds": {"comply_below": 0, "refuse_above": 0.9}},
            SteeringSpec(mode=Mode.AUTO, comply_below=0.0, refuse_above=0.9),
        ),
    ],
)
def test_steering_field_and_its_shorthands(value: object, spec: SteeringSpec | None) -> None:
    """An object, a profile's name and false are three ways to ask; absent is none."""
    assert parse(ChatRequest, body(steering=value)).spec == spec


def test_escaped_backslash_before_u0000_is_text() -> None:
    r"""The six characters \u0000, written with an escaped backslash, hold no NUL."""
    request = parse(ChatRequest, b'{"model":"m","messages":[{"role":"user","content":"\\\\u0000"}]}')
    assert request.engine_fields()["messages"][0]["content"] == "\\u0000"


@pytest.mark.parametrize(
    "payload",
    [
        HEAD + b"," + b",".join(b'"a%d":0' % i for i in range(150_000)) + b"}",
        HEAD + b',"logit_bias":{' + b",".join(b'"%d":"x"' % i for i in range(150_000)) + b"}}",
        body(messages=[{"role": "user", "content": [1] * 400}] * 2000),
        body(**{"temperature " * 160_000: 1}),
    ],
    ids=["unknown keys", "wrong values", "wrong parts", "a long key"],
)
def test_a_body_made_of_errors_is_refused_quickly(payload: bytes) -> None:
    """Telling of hundreds of thousands of errors would hold up every other request for many seconds."""
    began = time.perf_counter()
    with pytest.raises(CallerError):
        parse(ChatRequest, payload)
    assert time.perf_counter() - began < 2.0


def test_a_nul_is_looked_for_quickly() -> None:
    """In a million values far inside; where it is, is put together once it is found."""
    deep = b"[" * 190 + b",".join([b"0"] * 900_000) + b"]" * 190
    answer = b'{"role":"assistant","content":"x","annotations":%s},{"role":"user","content":"\\u0000"}' % deep
    began = time.process_time()
    with pytest.raises(CallerError) as caught:
        parse(ChatRequest, b'{"model":"m","messages":[%s]}' % answer)
    assert time.process_time() - began < 0.6
    assert caught.value.parameter == "messages[1].content"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*ChatRequest.model_fields, "other"]), JSON, max_size=5))
def test_any_json_is_a_request_or_a_caller_error(fields: dict[str, Any]) -> None:
    """No value of any field raises anything but the error the client is answered with."""
    with suppress(CallerError):
        parse(ChatRequest, json.dumps(fields).encode()).engine_fields()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_a_caller_error(payload: bytes) -> None:
    """The same for bytes that need not be JSON."""
    with pytest.raises(CallerError):
        parse(ChatRequest, payload)
