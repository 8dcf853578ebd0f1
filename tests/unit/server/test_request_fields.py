"""What each endpoint does with every field that OpenAI's SDK and vLLM know: none is passed over in silence."""

from __future__ import annotations

import json
import typing
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from server.wire.chat import ChatRequest
from server.wire.completions import CompletionRequest
from server.wire.parsing import parse
from server.wire.responses import ResponsesRequest
from server.wire.sampling import GATEWAY, Sampling
from server.wire.strict import Body
from server.wire.tokenize import TokenizeRequest
from steering.errors import CallerError

OPENAI: list[tuple[type[Sampling], Any]] = [
    (ChatRequest, chat_create_params.CompletionCreateParamsBase),
    (CompletionRequest, completion_create_params.CompletionCreateParamsBase),
    (ResponsesRequest, response_create_params.ResponseCreateParamsBase),
]
BODIES: list[tuple[type[Body], dict[str, Any]]] = [
    (ChatRequest, {"messages": [{"role": "user", "content": "x"}]}),
    (CompletionRequest, {"prompt": "x"}),
    (ResponsesRequest, {"input": "x"}),
    (TokenizeRequest, {"prompt": "x"}),
]
IGNORED = {
    "max_tool_calls": 3,
    "metadata": {"a": "b"},
    "modalities": ["text"],
    "prompt_cache_key": "x",
    "prompt_cache_options": {"mode": "implicit", "ttl": "30m"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "x",
    "service_tier": "auto",
    "store": True,
    "stream_options": {"include_obfuscation": False},
    "user": "u",
    "verbosity": "low",
}


def body_of(kind: type[Body], **fields: Any) -> bytes:
    """A valid body with these fields added."""
    return json.dumps({"model": "m", **dict(BODIES)[kind], **fields}).encode()


@pytest.mark.parametrize(("kind", "params"), OPENAI, ids=lambda value: getattr(value, "__name__", ""))
def test_each_parameter_of_openais_sdk_is_taken_ignored_or_refused_by_name(kind: type[Sampling], params: Any) -> None:
    """A new parameter of the SDK fails here until somebody decides what becomes of it."""
    known = set(typing.get_type_hints(params))
    assert known
    assert known - set(kind.model_fields) - set(kind.refused) == set()


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_each_field_of_vllm_is_taken_or_refused_by_name(kind: type[Sampling]) -> None:
    """A field that a new vLLM brings is not passed on, and is refused with its own reason once it is listed."""
    from vllm.entrypoints.openai.chat_completion import protocol as chat
    from vllm.entrypoints.openai.completion import protocol as plain

    theirs = chat.ChatCompletionRequest if kind is ChatRequest else plain.CompletionRequest
    assert set(theirs.model_fields) - set(kind.model_fields) - set(kind.refused) == set()


@pytest.mark.parametrize("kind", [kind for kind, _ in BODIES])
def test_every_refusal_has_a_reason_that_is_told(kind: type[Body]) -> None:
    """Each refused name is answered with its reason; where the model names it as well, null asks for nothing."""
    for name, why in kind.refused.items():
        for value in (["odd"], 7):
            with pytest.raises(CallerError) as caught:
                parse(kind, body_of(kind, **{name: value}))
            assert caught.value.parameter is not None
            assert caught.value.parameter.startswith(name)
            assert why in caught.value.message
        if name in kind.model_fields:
            parse(kind, body_of(kind, **{name: None}))


@pytest.mark.parametrize("kind", [kind for kind, _ in OPENAI])
def test_ignored_fields_do_not_reach_the_engine(kind: type[Any]) -> None:
    """What SDKs send to several servers changes nothing here."""
    sent = {name: IGNORED[name] for name in kind.ignored}
    if "stream_options" in sent:
        sent["stream"] = True
    asked = parse(kind, body_of(kind, **sent)).engine_fields()
    assert asked == parse(kind, body_of(kind)).engine_fields()


@pytest.mark.parametrize("kind", [kind for kind, _ in OPENAI])
def test_what_the_gateway_acts_on_stays_with_it(kind: type[Any]) -> None:
    """The steering field, salts and streaming are not fields of the engine's request."""
    fields = parse(kind, body_of(kind, steering=False, cache_salt="s", stream=True)).engine_fields()
    assert not GATEWAY & set(fields)


@pytest.mark.parametrize("kind", [kind for kind, _ in OPENAI])
def test_sampling_is_the_same_everywhere(kind: type[Any]) -> None:
    """What every endpoint takes of vLLM's reaches the engine under its own name."""
    sent = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.1,
        "repetition_penalty": 1.1,
        "seed": 3,
        "stop": ["x"],
        "stop_token_ids": [7],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "min_tokens": 1,
        "thinking_token_budget": 8,
        "logit_bias": {"5": 1.0},
    }
    fields = parse(kind, body_of(kind, **sent)).engine_fields()
    assert {name: fields.get(name) for name in sent} == sent


def test_templates_are_told_what_is_on_the_list_alone() -> None:
    """Thinking can be turned on and off; nothing else reaches the chat template."""
    told = {"enable_thinking": False}
    parsed = parse(ChatRequest, body_of(ChatRequest, chat_template_kwargs=told, include_reasoning=False))
    assert parsed.engine_fields()["chat_template_kwargs"] == told
    assert parsed.to_generation().prompt_fields["chat_template_kwargs"] == told
    for odd in ({"chat_template": "x"}, {"enable_thinking": "yes"}, {"add_generation_prompt": False}):
        with pytest.raises(CallerError) as caught:
            parse(ChatRequest, body_of(ChatRequest, chat_template_kwargs=odd))
        assert (caught.value.parameter or "").startswith("chat_template_kwargs.")
