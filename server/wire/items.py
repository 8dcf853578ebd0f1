"""Input items of `POST /v1/responses`, and the messages of a conversation that they become.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from server.wire.strict import CallId, Name, Strict

MAX_ITEMS = 2048

Id = Annotated[str, Field(max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]


class TextContent(Strict):
    """Text of a message: `input_text` of whoever asks, `output_text` of an earlier answer as SDKs send it back."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class RefusalContent(Strict):
    """A refusal of an earlier answer, sent back."""

    type: Literal["refusal"]
    refusal: str


class ReasoningContent(Strict):
    """Reasoning of an earlier answer, sent back."""

    type: Literal["reasoning_text"]
    text: str


Contents = Annotated[list[TextContent | RefusalContent], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]


class MessageItem(Strict):
    """What somebody said; earlier answers have an id and a status."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Contents
    id: Id | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(Strict):
    """A call the model made in an earlier answer."""

    type: Literal["function_call"]
    call_id: CallId
    name: Name
    arguments: str
    id: Id | None = None
    status: Status | None = None


class FunctionCallOutputItem(Strict):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: str | Annotated[list[TextContent], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    id: Id | None = None
    status: Status | None = None


class ReasoningItem(Strict):
    """How the model came to an earlier answer; summaries and encrypted reasoning of other servers are not read."""

    type: Literal["reasoning"]
    id: Id | None = None
    summary: list[Any] | None = None
    content: Annotated[list[ReasoningContent], Field(max_length=MAX_ITEMS, fail_fast=True)] | None = None
    encrypted_content: str | None = None
    status: Status | None = None


def _kind(item: object) -> str:
    """What an item is; one without a type is a message."""
    found = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "message" if found is None else str(found)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


def messages_of(instructions: str | None, given: str | Sequence[Item]) -> list[dict[str, Any]]:
    """The conversation as a chat completion has it.

    What the model gave in a row, reasoning, text and calls, is one message of its.
    """
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    said: dict[str, Any] | None = None
    for item in given:
        if isinstance(item, FunctionCallOutputItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
            said = None
        elif isinstance(item, MessageItem) and item.role != "assistant":
            messages.append({"role": item.role, "content": _text(item.content)})
            said = None
        else:
            if said is None or (isinstance(item, MessageItem) and said["content"] is not None):
                said = {"role": "assistant", "content": None}
                messages.append(said)
            _say(said, item)
    return messages


def _say(said: dict[str, Any], item: MessageItem | FunctionCallItem | ReasoningItem) -> None:
    """Add to what the model has said."""
    if isinstance(item, MessageItem):
        said["content"] = _text(item.content)
    elif isinstance(item, ReasoningItem):
        text = "".join(part.text for part in item.content or ())
        if text:
            said["reasoning"] = said.get("reasoning", "") + text
    else:
        call = {
            "id": item.call_id,
            "type": "function",
            "function": {"name": item.name, "arguments": item.arguments},
        }
        said.setdefault("tool_calls", []).append(call)


def _text(content: str | Sequence[TextContent | RefusalContent]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.refusal if isinstance(part, RefusalContent) else part.text for part in content)
