"""Wire model of `POST /v1/responses`, of which this server keeps nothing: whoever goes on sends everything again.

Strict: no coercion, no unknown keys, no NaN, limits on every count. Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from server.generation import Generation
from server.wire.chat import CacheOptions, Effort, prompt_fields
from server.wire.items import MAX_ITEMS, Item, messages_of
from server.wire.refused import REFUSED
from server.wire.sampling import MAX_TOP_LOGPROBS, Sampling, TokenCount
from server.wire.schemas import Schema
from server.wire.strict import Identifier, Ignored, Metadata, Strict, at
from server.wire.tools import MAX_TOOLS

LOGPROBS = "message.output_text.logprobs"
_HOSTED = "this server calls no tools of its own"
_STATELESS = "this server keeps no responses; send the whole conversation as input"


class FunctionTool(Strict):
    """A function the model may call."""

    type: Literal["function"]
    name: Identifier
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class NamedFunctionTool(Strict):
    """The one function the model must call."""

    type: Literal["function"]
    name: Identifier


class TextFormat(Strict):
    """Structured output: plain text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: Identifier | None = None
    description: str | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_where_needed(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None and self.name is not None):
            raise at("text.format", "name and schema go with type 'json_schema', and only with it")
        return self


class Text(Strict):
    """How text is to be given; `verbosity` is ignored."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Strict):
    """How much to reason; no summaries are made, as the reasoning is given itself."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class ResponseStreamOptions(Strict):
    """`include_obfuscation` is ignored."""

    include_obfuscation: bool | None = None


class ResponsesRequest(Sampling):
    """The body of `POST /v1/responses`."""

    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: TokenCount | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    include: Annotated[list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]], Field()] | None = (
        None
    )
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    metadata: Metadata | None = None
    store: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None

    stream_options: ResponseStreamOptions | None = None
    max_tool_calls: Annotated[int, Field(ge=0, le=2**31)] | None = None
    service_tier: Annotated[str, Field(max_length=64)] | None = None
    safety_identifier: Ignored | None = None
    prompt_cache_key: Ignored | None = None
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: Annotated[str, Field(max_length=64)] | None = None

    refused: ClassVar = {
        **REFUSED,
        "access_programs": "this server has none",
        "background": "this server answers at once, or as a stream",
        "background_options": "this server answers at once, or as a stream",
        "context_management": "the conversation is the client's to manage",
        "conversation": _STATELESS,
        "image": "this server reads and writes text only",
        "include": f"{_HOSTED}; what can be asked for is '{LOGPROBS}' and 'reasoning.encrypted_content'",
        "previous_response_id": _STATELESS,
        "prompt": "this server keeps no prompt templates; send input",
        "store": "this server keeps no responses; send store: false, or leave it out",
        "truncation": "nothing is left out of a conversation in silence; send 'disabled', or leave it out",
    }
    ignored: ClassVar = frozenset(
        {
            "user",
            "stream_options",
            "max_tool_calls",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
        }
    )
    forms: ClassVar = {
        **Sampling.forms,
        "tool_choice": "must be 'none', 'auto', 'required' or an object that names a function",
        "input": f"must be a string or a list of 1 to {MAX_ITEMS} items",
        "input[].type": (
            "must be 'message', 'function_call', 'function_call_output' or 'reasoning': this server calls no tools of "
            "its own, and keeps no items to refer to"
        ),
        "tools[].type": f"must be 'function': {_HOSTED}",
    }

    @model_validator(mode="after")
    def _combinations(self) -> ResponsesRequest:
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise at("tool_choice", "tool_choice needs tools")
        if isinstance(self.tool_choice, NamedFunctionTool) and self.tools is not None:
            names = [tool.name for tool in self.tools]
            if self.tool_choice.name not in names:
                raise at("tool_choice.name", f"no such tool; tools: {names}")
        return self

    @property
    def wants_logprobs(self) -> bool:
        """Whether text is to come with the logprobs of its tokens."""
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())

    def to_generation(self) -> Generation:
        """The request as the service takes it: a chat completion."""
        fields = self.engine_fields()
        return Generation(
            model=self.model,
            spec=self.spec,
            fields=fields,
            prompt_fields=prompt_fields(fields),
            wants_usage=True,
            cache_salt=self.cache_salt,
        )

    def engine_fields(self) -> dict[str, Any]:
        """The fields of a chat completion, as JSON values; what is not asked for is left out."""
        fields = self.sampling_fields() | {"messages": messages_of(self.instructions, self.input)}
        if self.max_output_tokens is not None:
            fields["max_tokens"] = self.max_output_tokens
        if self.tools:
            fields["tools"] = [_chat_tool(tool) for tool in self.tools]
            fields |= self._tool_fields()
        if self.wants_logprobs:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if self.reasoning is not None and self.reasoning.effort is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        if self.text is not None and self.text.format is not None and self.text.format.type != "text":
            fields["response_format"] = _chat_format(self.text.format)
        return fields

    def _tool_fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if isinstance(self.tool_choice, NamedFunctionTool):
            fields["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        elif self.tool_choice is not None:
            fields["tool_choice"] = self.tool_choice
        if self.parallel_tool_calls is not None:
            fields["parallel_tool_calls"] = self.parallel_tool_calls
        return fields


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": _given(tool)}


def _chat_format(form: TextFormat) -> dict[str, Any]:
    if form.type != "json_schema":
        return {"type": form.type}
    return {"type": form.type, "json_schema": _given(form)}


def _given(model: Strict) -> dict[str, Any]:
    """Everything of it that was sent, but for its type."""
    return model.model_dump(mode="python", by_alias=True, exclude={"type"}, exclude_unset=True, exclude_none=True)
