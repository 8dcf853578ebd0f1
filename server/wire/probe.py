"""Wire model of `POST /v1/steering/probe`: a prompt that is to be read and not answered.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from server.engine import Prompting
from server.generation import Generation
from server.probing import spec_of_probe
from server.wire.chat import Effort, TemplateArguments
from server.wire.messages import MAX_MESSAGES, Message, as_engines_read_it
from server.wire.refused import REFUSED
from server.wire.sampling import Model
from server.wire.steering import Profile
from server.wire.strict import Body, at
from server.wire.tools import MAX_TOOLS, Tool

NAMES: Mapping[str, str] = MappingProxyType({"steering.profile": "profile", "steering.mode": "profile"})
"""What this endpoint calls fields that others have."""

_CHAT_ONLY = ("tools", "reasoning_effort", "chat_template_kwargs")


class ProbeRequest(Body):
    """The body of `POST /v1/steering/probe`: what the prompt of a chat completion or of a completion is made of."""

    model: Model
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)] | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: TemplateArguments | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    profile: Profile | None = None

    refused: ClassVar = {
        **{name: why for name, why in REFUSED.items() if name != "chat_template_kwargs"},
        "stream": "scores come in one piece",
        "steering": "a probe steers nothing; use profile",
    }

    @model_validator(mode="after")
    def _combinations(self) -> ProbeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise at("messages", "send messages or prompt, and not both")
        for name in _CHAT_ONLY:
            if self.messages is None and getattr(self, name) is not None:
                raise at(name, f"{name} goes with messages")
        return self

    def to_generation(self) -> Generation:
        """One greedy token of an answer, which the pass that reads the prompt gives in any case."""
        fields = self._prompt_fields()
        return Generation(
            model=self.model,
            spec=spec_of_probe(self.profile),
            prompting=Prompting.PLAIN if self.messages is None else Prompting.CHAT,
            fields={**fields, "max_tokens": 1, "temperature": 0.0},
            prompt_fields=fields,
        )

    def _prompt_fields(self) -> dict[str, Any]:
        fields = self.model_dump(
            mode="python", by_alias=True, exclude={"profile"}, exclude_unset=True, exclude_none=True
        )
        for message in fields.get("messages", ()):
            if message["role"] == "assistant":
                as_engines_read_it(message)
        return fields | ({"tool_choice": "none"} if "tools" in fields else {})
