"""Refusal tokens in a prompt: found however their text is spread over what a template puts together again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.access.refusal_tokens import touch_of
from server.wire.chat import ChatRequest
from server.wire.completions import CompletionRequest
from server.wire.parsing import parse
from server.wire.responses import ResponsesRequest
from tests.fakes import MARKERS, RESPOND, SAFETY, make_bundle, make_catalog

CATALOG = make_catalog(make_bundle())
PENALTY = {"repetition_penalty": 1.5}
CALL = {"role": "assistant", "content": None}
HEADER = "x-anthropic-billing-header: cc_version=1"


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A body with these messages."""
    return {"model": "m", "messages": list(messages), **fields}


def said(*parts: str, role: str = "user", **fields: Any) -> dict[str, Any]:
    """A message of these text parts."""
    return {"role": role, "content": [{"type": "text", "text": part} for part in parts], **fields}


def called(arguments: str, name: str = "f", number: str = "c1") -> dict[str, Any]:
    """An earlier answer that called a function."""
    function = {"name": name, "arguments": arguments}
    return {**CALL, "tool_calls": [{"id": number, "type": "function", "function": function}]}


def parameter_of(body: dict[str, Any]) -> str | None:
    """The field by which a chat reaches past the gate."""
    found = touch_of(parse(ChatRequest, json.dumps(body).encode()).to_generation(), CATALOG)
    return None if found is None else found.parameter


def spread(first: str, second: str) -> dict[str, dict[str, Any]]:
    """Bodies that put two texts beside each other in a prompt, or may."""
    refusal = {
        "role": "assistant",
        "content": [{"type": "refusal", "refusal": first}, {"type": "text", "text": second}],
    }
    return {
        "parts": chat(said(first, second)),
        "parts of a system message": chat(said(first, second, role="system"), said("x")),
        "parts of an answer": chat(said(first, second, role="assistant")),
        "a refusal and a text": chat(refusal),
        "parts of a result": chat(called("{}"), said(first, second, role="tool", tool_call_id="c1")),
        "an empty part between": chat(said(first, "", second)),
        "parts with space that templates trim": chat(said(f"{first} ", "\n", f"\t{second}")),
        "a part that vLLM takes out between": chat(said(first, HEADER, second, role="system"), said("x")),
        "a line that vLLM takes out": chat(said(first, f"{HEADER}\n{second}", role="system"), said("x")),
        "two messages": chat(said(first), said(second)),
        "an answer after a question": chat(said(first), {"role": "assistant", "content": second}),
        "a name and a content": chat(said(second, name=first)),
        "reasoning and a content": chat({"role": "assistant", "reasoning": first, "content": second}),
    }


def whole(text: str) -> dict[str, dict[str, Any]]:
    """Bodies that have a text in one piece, wherever a template may show it."""
    escaped = "".join(f"\\u{ord(character):04x}" for character in text)
    tool = {"type": "function", "function": {"name": "f"}}
    described = {**tool, "function": {"name": "f", "description": text}}
    inside = {**tool, "function": {"name": "f", "parameters": {"properties": {"a": {"enum": [1, text]}}}}}
    key = {**tool, "function": {"name": "f", "parameters": {"properties": {text: {}}}}}
    return {
        "a name": chat(said("x", name=text)),
        "reasoning": chat({"role": "assistant", "content": "x", "reasoning_content": text}),
        "a refusal": chat({"role": "assistant", "content": None, "refusal": text}),
        "arguments": chat(called(json.dumps({"a": [1, {"b": text}]}))),
        "escaped arguments": chat(called(f'{{"a": "{escaped}"}}')),
        "escapes beside other escapes": chat(called(f'{{"a\\\\": "\\\\", "b": "\\"{escaped}\\n"}}')),
        "a key of arguments": chat(called(f'{{"{escaped}": 1}}')),
        "arguments that are no JSON": chat(called(text)),
        "the name of a call": chat(called("{}", name=text)),
        "the id of a call": chat(called("{}", number=text)),
        "an escaped result": chat(called("{}"), said(f'{{"a": "{escaped}"}}', role="tool", tool_call_id="c1")),
        "the id of a result": chat(called("{}"), said("x", role="tool", tool_call_id=text)),
        "a tool's description": chat(said("x"), tools=[described]),
        "a tool's parameters": chat(said("x"), tools=[inside]),
        "a name among a tool's parameters": chat(said("x"), tools=[key]),
    }


ANSWERING = spread("[resp", "ond]") | whole(MARKERS[RESPOND])
REFUSING = spread("[Saf", "ety]") | whole(MARKERS[SAFETY])


@pytest.mark.parametrize("body", ANSWERING.values(), ids=ANSWERING)
def test_the_answering_token_is_found_wherever_a_template_may_make_it(body: dict[str, Any]) -> None:
    """In one piece or in two that come together, in contents, names, reasoning, calls, results and tools."""
    assert parameter_of(body) == "messages"


@pytest.mark.parametrize("body", REFUSING.values(), ids=REFUSING)
def test_a_penalty_finds_refusing_tokens_wherever_a_template_may_make_them(body: dict[str, Any]) -> None:
    """They are what a penalty on the prompt's tokens makes unlikely; without one they are words like others."""
    assert parameter_of({**body, **PENALTY}) == "repetition_penalty"
    assert parameter_of(body) is None


@pytest.mark.parametrize(
    "body",
    [
        chat(said("[resp", "x", "ond]")),
        chat(said("[resp ond]")),
        chat(said("ond]", "[resp")),
        chat(said("[resp", f"x\n{HEADER}", "ond]", role="system"), said("x")),
        chat(called('{"a": "[resp", "b": ["x", "ond]"]}')),
        chat(said("x"), tools=[{"type": "function", "function": {"name": "respond", "description": "[ ]"}}]),
    ],
    ids=["something between", "a space inside", "the other way round", "a line that stays", "arguments", "a tool"],
)
def test_what_makes_no_token_is_everybodys(body: dict[str, Any]) -> None:
    """Pieces that no template puts together need no permission, with a penalty or without."""
    assert parameter_of(body) is None
    assert parameter_of({**body, **PENALTY}) is None


def test_a_token_with_a_line_break_is_found_in_parts() -> None:
    """VLLM joins the parts of a message by one for templates that take a text."""
    catalog = make_catalog(make_bundle(respond="<answer>\n<text>"))
    generation = parse(ChatRequest, json.dumps(chat(said("<answer>", "<text>"))).encode()).to_generation()
    assert touch_of(generation, catalog) is not None


def test_other_endpoints_are_looked_at_as_well() -> None:
    """Prompts as they are, as text and as ids, and parts of an input."""
    for prompt in (f"x{MARKERS[RESPOND]}", [5, RESPOND]):
        body = json.dumps({"model": "m", "prompt": prompt}).encode()
        (generation,) = parse(CompletionRequest, body).to_generations()
        found = touch_of(generation, CATALOG)
        assert found is not None
        assert found.parameter == "prompt"
    parts = [{"type": "input_text", "text": text} for text in ("[resp", "ond]")]
    asked = {"model": "m", "input": [{"role": "user", "content": parts}]}
    found = touch_of(parse(ResponsesRequest, json.dumps(asked).encode()).to_generation(), CATALOG)
    assert found is not None
    assert found.parameter == "messages"
