"""Wire model of `POST /v1/chat/completions`: exactly what may enter, and nothing else.

Strict: no coercion, no unknown keys, no NaN, limits on every count. Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from server.generation import Generation
from server.wire.messages import MAX_MESSAGES, Message, as_engines_read_it
from server.wire.refused import REFUSED
from server.wire.sampling import GATEWAY, MAX_SAMPLES, MAX_TOP_LOGPROBS, Sampling, StreamOptions, TokenCount
from server.wire.schemas import ResponseFormat
from server.wire.strict import Ignored, Metadata, Strict, at
from server.wire.tools import MAX_TOOLS, NamedTool, Tool

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class TemplateArguments(Strict):
    """What the model's own chat template may be told; templates know it under either name."""

    enable_thinking: bool | None = None
    thinking: bool | None = None


class CacheOptions(Strict):
    """What OpenAI lets clients say of its prompt cache."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: Annotated[str, Field(max_length=16)] | None = None


class ChatRequest(Sampling):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]

    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: TemplateArguments | None = None

    metadata: Metadata | None = None
    store: bool | None = None
    service_tier: Annotated[str, Field(max_length=64)] | None = None
    safety_identifier: Ignored | None = None
    prompt_cache_key: Ignored | None = None
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: Annotated[str, Field(max_length=64)] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None

    refused: ClassVar = {
        **REFUSED,
        "echo": "how the prompt is built is the server's",
        "function_call": "it is deprecated; use tool_choice",
        "functions": "it is deprecated; use tools",
    }
    ignored: ClassVar = frozenset(
        {
            "user",
            "metadata",
            "store",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "verbosity",
            "modalities",
        }
    )
    forms: ClassVar = {
        **Sampling.forms,
        "tool_choice": "must be 'none', 'auto', 'required' or an object that names a function",
    }

    @model_validator(mode="after")
    def _combinations(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise at("max_tokens", "send max_tokens or max_completion_tokens, not both")
        if self.is_greedy and self.samples > 1:
            raise at("n", "n > 1 needs a temperature above 0: greedy answers are all the same")
        if self.top_logprobs and not self.logprobs:
            raise at("top_logprobs", "top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise at("stream_options", "stream_options needs stream: true")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise at("tool_choice", "tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tools is not None:
            names = [tool.function.name for tool in self.tools]
            if self.tool_choice.function.name not in names:
                raise at("tool_choice.function.name", f"no such tool; tools: {names}")
        return self

    @property
    def samples(self) -> int:
        """How many answers are asked for."""
        return self.n or 1

    def to_generation(self) -> Generation:
        """The request as the service takes it."""
        fields = self.engine_fields()
        return Generation(
            model=self.model,
            spec=self.spec,
            fields=fields,
            prompt_fields=prompt_fields(fields),
            samples=self.samples,
            wants_usage=bool(self.stream_options and self.stream_options.include_usage),
            cache_salt=self.cache_salt,
        )

    def engine_fields(self) -> dict[str, Any]:
        """The fields that concern the engine, as JSON values; those not sent, or sent as null, are left out."""
        fields = self.model_dump(
            mode="python", by_alias=True, exclude=_NOT_FOR_THE_ENGINE, exclude_unset=True, exclude_none=True
        )
        for message in fields["messages"]:
            if message["role"] == "assistant":
                as_engines_read_it(message)
        return fields


_NOT_FOR_THE_ENGINE = set(GATEWAY | ChatRequest.ignored)

_PROMPT = frozenset({"model", "messages", "tools", "reasoning_effort", "chat_template_kwargs"})


def prompt_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Of a chat's fields those that the prompt is made of, for a pass that only looks at it; tools are not called."""
    kept = {name: value for name, value in fields.items() if name in _PROMPT}
    return kept | ({"tool_choice": "none"} if "tools" in kept else {})
