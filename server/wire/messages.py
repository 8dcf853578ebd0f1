"""Messages of a conversation, as OpenAI's chat completions have them.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from server.wire.strict import CallId, Name, Strict

MAX_MESSAGES = 2048
MAX_CALLS = 128


class TextPart(Strict):
    """A part of a message's content; this server reads text only."""

    type: Literal["text"]
    text: str


class RefusalPart(Strict):
    """A refusal of an earlier answer, sent back."""

    type: Literal["refusal"]
    refusal: str


Parts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class SystemMessage(Strict):
    """Instructions; newer clients call the role `developer`."""

    role: Literal["system", "developer"]
    content: str | Parts
    name: Name | None = None


class UserMessage(Strict):
    """What the user says."""

    role: Literal["user"]
    content: str | Parts
    name: Name | None = None


class CalledFunction(Strict):
    """Name and arguments, as JSON text, of a call the model made."""

    name: Name
    arguments: str


class ToolCall(Strict):
    """A call the model made in an earlier answer."""

    id: CallId
    type: Literal["function"]
    function: CalledFunction
    index: Annotated[int, Field(ge=0)] | None = None


class AssistantMessage(Strict):
    """An earlier answer, as SDKs send it back: with every field an answer has."""

    role: Literal["assistant"]
    content: (
        str
        | Annotated[list[TextPart | RefusalPart], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
        | None
    ) = None
    name: Name | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Strict):
    """The result of a call."""

    role: Literal["tool"]
    content: str | Parts
    tool_call_id: CallId


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]


def as_engines_read_it(message: dict[str, Any]) -> None:
    """An earlier answer without the fields that only say what it was not; a refusal becomes its content."""
    message.pop("annotations", None)
    refusal = message.pop("refusal", None)
    if isinstance(message.get("content"), list):
        message["content"] = [
            {"type": "text", "text": part["text"] if part["type"] == "text" else part["refusal"]}
            for part in message["content"]
        ]
    elif "content" not in message:
        message["content"] = refusal
    for call in message.get("tool_calls", ()):
        call.pop("index", None)
