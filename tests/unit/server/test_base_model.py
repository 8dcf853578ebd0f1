"""A model without a chat template: its prompts are completed, and messages are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from server.app import create_gateway
from server.engine import Prompting
from server.readiness import self_check
from server.settings import Settings
from steering.errors import UnsupportedConfiguration
from tests.fakes import MODEL, FakeEngine, make_catalog, make_gated_bundle
from tests.unit.server.conftest import Make

MESSAGES = [{"role": "user", "content": "Hello"}]


async def test_the_self_check_asks_by_a_plain_prompt() -> None:
    """For edits, gates and the unsteered token alike, so that a base model gets ready."""
    engine = FakeEngine(is_chat=False)
    await self_check(engine, make_catalog(make_gated_bundle()))
    assert {call.prompting for call in engine.calls} == {Prompting.PLAIN}
    assert {call.fields["prompt"] for call in engine.calls} == {"Hello"}


@pytest.mark.parametrize(
    ("path", "body", "parameter"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES}, "messages"),
        ("/v1/chat/completions", {"messages": MESSAGES, "stream": True}, "messages"),
        ("/v1/responses", {"input": "Hello"}, "input"),
        ("/v1/steering/probe", {"messages": MESSAGES}, "messages"),
        ("/tokenize", {"messages": MESSAGES}, "messages"),
    ],
)
async def test_messages_are_refused(make: Make, path: str, body: dict[str, Any], parameter: str) -> None:
    """With a 400 that says what to do instead, before the engine is asked."""
    engine = FakeEngine(is_chat=False)
    spoken = make(engine, make_catalog(make_gated_bundle()))
    answer = await spoken.client.post(path, json={"model": MODEL, **body})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("no_chat_template", parameter)
    assert "/v1/completions" in error["message"]
    assert engine.calls == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Hello"}),
        ("/v1/completions", {"prompt": ["Hello", "there"], "stream": True}),
        ("/v1/steering/probe", {"prompt": "Hello"}),
        ("/tokenize", {"prompt": "Hello"}),
    ],
)
async def test_prompts_are_taken(make: Make, path: str, body: dict[str, Any]) -> None:
    """As of any model."""
    spoken = make(FakeEngine(is_chat=False), make_catalog(make_gated_bundle()))
    answer = await spoken.client.post(path, json={"model": MODEL, **body})
    assert answer.status_code == 200


async def test_a_canary_that_could_not_ask_keeps_the_server_from_starting() -> None:
    """Its prompts are messages: a canary that only fails would be worse than none."""
    with pytest.raises(UnsupportedConfiguration, match="no chat template"):
        create_gateway(FakeEngine(is_chat=False), make_catalog(), Settings(canary_interval=600))
