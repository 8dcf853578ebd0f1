"""Bodies for fuzzing: valid requests of every endpoint, and ways to break them.

Knows nothing of the gateway.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from tests.fakes import MODEL

_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "pattern": "^a+$"}, "b": {"type": "array", "items": {"$ref": "#/$defs/c"}}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"c": {"type": "integer", "minimum": 0}},
}
_STEERING: list[Any] = [
    "refusal-control",
    False,
    None,
    {"mode": "off"},
    {"profile": "refusal-control", "mode": "refuse", "category": "Safety", "strength": 1.5, "scope": "all"},
    {"mode": "auto", "category": ["Safety", "Political"], "thresholds": {"comply_below": 0.1, "refuse_above": 0.9}},
    {"mode": "comply", "report": "none"},
    {"mode": "auto", "graded": True, "category_source": "probe", "report": "full"},
    {"mode": "auto", "category_source": "refusal_tokens"},
]
_SAMPLING = {
    "temperature": 0.7,
    "top_p": 0.9,
    "seed": 7,
    "stop": ["a", "b"],
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "logit_bias": {"5": 1.5},
    "user": "u",
}
_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": _SCHEMA, "strict": True}}
_TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "n"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    },
    {"role": "tool", "content": "3", "tool_call_id": "c"},
    {"role": "user", "content": "and?"},
]
_CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
_PLAIN: dict[str, Any] = {"model": MODEL, "prompt": "once upon"}
_RESPONSE: dict[str, Any] = {"model": MODEL, "input": "hi"}

SEEDS: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        _CHAT,
        *({**_CHAT, "steering": asked} for asked in _STEERING),
        {**_CHAT, **_SAMPLING, "n": 2, "max_completion_tokens": 3, "logprobs": True, "top_logprobs": 2},
        {**_CHAT, "messages": _TALK, "tools": [_TOOL], "tool_choice": "auto", "parallel_tool_calls": True},
        {**_CHAT, "tools": [_TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {**_CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": _SCHEMA}}},
        {**_CHAT, "stream": True, "stream_options": {"include_usage": True}, "metadata": {"a": "b"}, "max_tokens": 2},
        {**_CHAT, "stream": True, "n": 3, "steering": {"mode": "refuse"}},
    ],
    "/v1/completions": [
        _PLAIN,
        *({**_PLAIN, "steering": asked} for asked in _STEERING[:5]),
        {**_PLAIN, **_SAMPLING, "n": 2, "max_tokens": 3, "logprobs": 2},
        {**_PLAIN, "prompt": ["a", "b c"], "max_tokens": 1},
        {**_PLAIN, "prompt": [1, 2, 3], "echo": True, "max_tokens": 0},
        {**_PLAIN, "prompt": [[1], [2, 3]], "stream": True, "stream_options": {"include_usage": True}},
    ],
    "/v1/responses": [
        _RESPONSE,
        *({**_RESPONSE, "steering": asked} for asked in _STEERING[:5]),
        {**_RESPONSE, "instructions": "be brief", "max_output_tokens": 3, "temperature": 0.5, "store": False},
        {
            **_RESPONSE,
            "input": [
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "3"},
            ],
            "tools": [{"type": "function", "name": "f", "parameters": _SCHEMA}],
        },
        {**_RESPONSE, "text": {"format": {"type": "json_schema", "name": "s", "schema": _SCHEMA}}, "stream": True},
        {**_RESPONSE, "include": ["message.output_text.logprobs"], "top_logprobs": 2, "reasoning": {"effort": "low"}},
    ],
    "/v1/steering/probe": [
        _CHAT,
        {**_PLAIN, "profile": "refusal-control"},
        {**_CHAT, "messages": _TALK, "tools": [_TOOL], "reasoning_effort": "low"},
    ],
    "/tokenize": [
        {"prompt": "once upon", "add_special_tokens": True},
        {"model": MODEL, "messages": _TALK, "tools": [_TOOL]},
    ],
}
"""Requests that are answered, by path; among them every field that is steered, sampled, formatted or counted."""

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, -0.0, 0.5, 1.0, 1e-9, 1e308, -1e308, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63),
    10**40, "", " ", "a", "0", "1", "true", "null", "NaN", "..", "../../etc/passwd", "Safety", "safety", "auto",
    "refuse", MODEL, "\0", "\ufeff", "\u202e", "é", "😀", "\ud7ff", "\ud800", "#", "#/", "$ref", "%s%n",
    "{{ 7*7 }}", "{% for x in y %}", "<|end|>", "x" * 300, "x" * 5000, "(a+)+$", "[", "*", [], [[]], [None], [1, "a"],
    [""], [-1], [2**40], ["a"] * 70, {}, {"a": 1}, {"type": "text"}, {"$ref": "#"}, {"type": "object"},
    {"role": "user", "content": "x"}, {"type": "function"},
]  # fmt: skip
"""Values that are wrong somewhere: of other types, at the ends of ranges, with a meaning elsewhere."""

MOST_BYTES = 3_000_000
"""About as long as a body gets, which is more than the gateway reads: repeats of repeats would make gigabytes."""

Path = tuple[str | int, ...]


def paths(node: Any, above: Path = ()) -> Iterator[Path]:
    """Every place in a JSON value, the whole first."""
    yield above
    if isinstance(node, dict):
        for key, item in node.items():
            yield from paths(item, (*above, key))
    elif isinstance(node, list):
        for index, item in enumerate(node):
            yield from paths(item, (*above, index))


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn, path: str) -> bytes:
    """A valid body of an endpoint with one to three things wrong with it, or a body that is hardly one."""
    seeds = SEEDS[path]
    body = copy.deepcopy(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        _break(draw, body, seeds)
    payload = json.dumps(body, ensure_ascii=draw(st.booleans())).encode("utf-8", errors="surrogatepass")
    return _cut(draw, payload) if draw(st.integers(0, 9)) == 0 else payload


def _break(draw: st.DrawFn, body: dict[str, Any], seeds: list[dict[str, Any]]) -> None:
    at = draw(st.sampled_from(list(paths(body))))
    value = copy.deepcopy(draw(st.sampled_from(ODD) | ANY))
    if not at:
        key = draw(st.sampled_from(sorted({name for seed in seeds for name in seed})) | st.text(max_size=12))
        body[key] = value
        return
    node: Any = body
    for step in at[:-1]:
        node = node[step]
    last, act = at[-1], draw(st.sampled_from(("replace", "remove", "wrap", "repeat", "rename", "graft")))
    if act == "replace":
        node[last] = value
    elif act == "remove":
        del node[last]
    elif act == "wrap":
        node[last] = draw(st.sampled_from(({"a": node[last]}, [node[last]], [node[last]] * 3)))
    elif act == "graft":
        node[last] = copy.deepcopy(body.get(draw(st.sampled_from(sorted(map(str, body)))), value))
    elif isinstance(node, list):
        node.extend([node[last]] * draw(st.integers(1, 5)))
    elif act == "rename":
        node[draw(st.text(max_size=12))] = node.pop(last)
    else:
        most = MOST_BYTES // len(json.dumps(node[last]))
        node[last] = [node[last]] * draw(st.integers(2, max(2, min(200, most))))


def _cut(draw: st.DrawFn, payload: bytes) -> bytes:
    """Bytes changed, left out or put in."""
    start = draw(st.integers(0, max(0, len(payload) - 1)))
    end = draw(st.integers(start, min(len(payload), start + 30)))
    return payload[:start] + draw(st.binary(max_size=12)) + payload[end:]
