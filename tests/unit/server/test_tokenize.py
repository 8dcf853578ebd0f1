"""Token counts over the fake engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.engine import Prompting
from server.wire.parsing import parse
from server.wire.tokenize import MAX_CHARACTERS, TokenizeRequest
from steering.errors import CallerError
from tests.fakes import MODEL
from tests.unit.server.conftest import Make

CONVERSATION = [{"role": "user", "content": "a b"}]


def tool(**parameters: Any) -> list[dict[str, Any]]:
    """A list of one tool with these parameters."""
    return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


@pytest.mark.parametrize(
    ("fields", "parameter", "code"),
    [
        ({}, "prompt", "invalid_value"),
        ({"prompt": "x", "messages": CONVERSATION}, "prompt", "invalid_value"),
        ({"prompt": [1, 2]}, "prompt", "invalid_type"),
        ({"prompt": "x" * (MAX_CHARACTERS + 1)}, "prompt", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x" * MAX_CHARACTERS}]}, "messages", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": "x" * 70_000}], "tools": tool(x="y" * 62_000)},
            "messages",
            "invalid_value",
        ),
        ({"messages": CONVERSATION, "tools": tool(enum=[0] * 30_000) * 3}, "tools", "invalid_value"),
        ({"messages": CONVERSATION, "tools": tool(**{"x" * 60_000: 0}) * 3}, "tools", "invalid_value"),
        ({"prompt": "x", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "invalid_value"),
        ({"messages": CONVERSATION, "add_special_tokens": True}, "add_special_tokens", "invalid_value"),
        ({"messages": CONVERSATION, "chat_template": "x"}, "chat_template", "unknown_parameter"),
        ({"prompt": "x", "return_token_strs": True}, "return_token_strs", "unknown_parameter"),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_bad_body_is_refused_with_its_field(fields: dict[str, Any], parameter: str, code: str) -> None:
    """Neither, both, too much, or what would change how prompts are made."""
    with pytest.raises(CallerError) as caught:
        parse(TokenizeRequest, json.dumps(fields).encode())
    assert (caught.value.parameter, caught.value.code) == (parameter, code)


def test_as_much_as_is_counted_at_once_is_taken() -> None:
    """A text up to the bound, and a conversation whose JSON is: numbers count as the characters they are shown by, and
    others than ASCII as one each.
    """
    for fields in (
        {"prompt": "x" * MAX_CHARACTERS},
        {"messages": [{"role": "user", "content": "字" * (MAX_CHARACTERS - 100)}]},
        {"messages": CONVERSATION, "tools": tool(enum=[0] * 30_000) * 2},
    ):
        parse(TokenizeRequest, json.dumps(fields).encode())


def test_the_fields_of_a_prompt_reach_the_engine() -> None:
    """A prompt with or without special tokens; a conversation with its tools and template arguments."""
    plain = parse(TokenizeRequest, json.dumps({"prompt": "x", "add_special_tokens": False}).encode())
    assert (plain.prompting, plain.engine_fields()) == (Prompting.PLAIN, {"prompt": "x", "add_special_tokens": False})
    fields = {"messages": CONVERSATION, "chat_template_kwargs": {"enable_thinking": True}}
    chat = parse(TokenizeRequest, json.dumps(fields).encode())
    assert (chat.prompting, chat.engine_fields()) == (Prompting.CHAT, fields)


async def test_tokens_are_told_as_vllm_tells_them(make: Make) -> None:
    """Count, ids and the model's context."""
    spoken = make()
    answer = await spoken.client.post("/tokenize", json={"model": MODEL, "prompt": "one two three"})
    assert answer.json() == {"count": 3, "max_model_len": 512, "tokens": [1, 1, 1], "token_strs": None}
    answer = await spoken.client.post("/tokenize", json={"messages": CONVERSATION})
    assert answer.json()["count"] == 3


async def test_the_usual_checks_come_first(make: Make) -> None:
    """Another model, a body that is no JSON, one that is too large, and a server that is not ready."""
    spoken = make(max_body_bytes=1024)
    answer = await spoken.client.post("/tokenize", json={"model": "gpt-x", "prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    answer = await spoken.client.post("/tokenize", content=b"x")
    assert answer.status_code == 415
    answer = await spoken.client.post("/tokenize", json={"prompt": "x" * 1024})
    assert answer.status_code == 413
    answer = await make(is_armed=False).client.post("/tokenize", json={"prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")


@pytest.mark.parametrize("path", ["/detokenize", "/tokenizer_info", "/v1/tokenize", "/invocations", "/docs"])
async def test_nothing_else_of_vllms_is_there(make: Make, path: str) -> None:
    """Paths that vLLM's own server has are not found, in the envelope."""
    answer = await make().client.post(path, json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
