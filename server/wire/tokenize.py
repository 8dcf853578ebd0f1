"""Wire model of `POST /tokenize`: what may be counted.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import to_json

from server.engine import Prompting
from server.wire.chat import TemplateArguments
from server.wire.messages import MAX_MESSAGES, Message, as_engines_read_it
from server.wire.refused import REFUSED
from server.wire.sampling import Model
from server.wire.strict import Body, at
from server.wire.tools import MAX_TOOLS, Tool

MAX_CHARACTERS = 128 * 1024
"""Of a prompt, or of messages and tools as JSON, which is how templates show whatever is no text: counting is done at
once, and without a place in any queue."""


class TokenizeRequest(Body):
    """The body of `POST /tokenize`: a prompt as it is, or a conversation as the chat template renders it."""

    model: Model | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)] | None = None
    chat_template_kwargs: TemplateArguments | None = None
    add_special_tokens: bool | None = None
    return_token_strs: Literal[False] | None = None

    refused: ClassVar = {
        **{name: why for name, why in REFUSED.items() if name != "add_special_tokens"},
        "return_token_strs": "ids are told, not their texts",
    }

    @model_validator(mode="after")
    def _combinations(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise at("prompt", "send prompt or messages, and not both")
        if self.messages is None and (self.tools is not None or self.chat_template_kwargs is not None):
            raise at("tools" if self.tools is not None else "chat_template_kwargs", "it goes with messages")
        if self.messages is not None and self.add_special_tokens:
            raise at("add_special_tokens", "it goes with prompt; the chat template puts its own")
        if self.prompt is not None:
            sizes = {"prompt": len(self.prompt)}
        else:
            fields = self.engine_fields()
            sizes = {name: _characters(fields[name]) for name in ("messages", "tools") if name in fields}
        if sum(sizes.values()) > MAX_CHARACTERS:
            largest = max(sizes, key=lambda name: sizes[name])
            raise at(largest, f"at most {MAX_CHARACTERS} characters are counted at once")
        return self

    @property
    def prompting(self) -> Prompting:
        """How the prompt is made."""
        return Prompting.PLAIN if self.messages is None else Prompting.CHAT

    def engine_fields(self) -> dict[str, Any]:
        """The fields that the prompt is made of, as JSON values."""
        fields = self.model_dump(
            mode="python", by_alias=True, exclude={"return_token_strs"}, exclude_unset=True, exclude_none=True
        )
        for message in fields.get("messages", ()):
            if message["role"] == "assistant":
                as_engines_read_it(message)
        return fields


def _characters(value: object) -> int:
    """How long a value is as JSON, in characters."""
    return len(to_json(value).decode())
