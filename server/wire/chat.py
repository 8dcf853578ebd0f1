"""Wire models of `POST /v1/chat/completions`: exactly what may enter, and nothing else.

Strict: no coercion, no unknown keys, no NaN, limits on every count. Fields are OpenAI's; those marked *ignored* are
accepted because SDKs send them. Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError, to_json

from server.generation import Generation
from server.policy import SteeringSpec
from server.wire.steering import SteeringField, spec_of
from server.wire.strict import Strict

MAX_MESSAGES = 2048
MAX_SAMPLES = 8
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 256
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 300
MAX_TOOLS = 128
MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH, MAX_PATTERN_CHARACTERS = 64 * 1024, 16, 512
GREEDY = 1e-5
"""Temperatures below this are greedy in vLLM."""

_INT64 = 2**63 - 1


def _bounded_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Limits on what becomes a grammar: size, depth and the length of regular expressions."""
    if len(to_json(schema)) > MAX_SCHEMA_BYTES:
        raise PydanticCustomError("schema_too_large", f"schema must have at most {MAX_SCHEMA_BYTES} bytes")
    if _refers_to_itself(schema):
        raise PydanticCustomError(
            "schema_is_circular", "a $ref must not lead back to itself without anything in between"
        )
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH * 2):  # a level of a schema is an object and the map of its properties
        deeper: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                pattern = node.get("pattern")
                if isinstance(pattern, str) and len(pattern) > MAX_PATTERN_CHARACTERS:
                    raise PydanticCustomError(
                        "pattern_too_long", f"a pattern must have at most {MAX_PATTERN_CHARACTERS} characters"
                    )
                deeper.extend(node.values())
            elif isinstance(node, list):
                deeper.extend(node)
        if not deeper:
            return schema
        level = deeper
    raise PydanticCustomError("schema_too_deep", f"schema must be at most {MAX_SCHEMA_DEPTH} levels deep")


def _refers_to_itself(schema: dict[str, Any]) -> bool:
    """Whether a chain of references never reaches anything but references, which grammar compilers cannot follow."""
    waiting: list[Any] = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            waiting.extend(node.values())
            seen: set[str] = set()
            while isinstance(node, dict) and isinstance(reference := node.get("$ref"), str):
                if reference in seen:
                    return True
                seen.add(reference)
                node = _target(schema, reference)
        elif isinstance(node, list):
            waiting.extend(node)
    return False


def _target(schema: dict[str, Any], reference: str) -> object:
    """What a local reference such as `#/$defs/a` points to; None for others and for those that point nowhere."""
    if not reference.startswith("#"):
        return None
    node: object = schema
    for step in reference[1:].split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _plain_dict_of_token_ids(bias: dict[str, float]) -> dict[str, float]:
    for key in bias:
        if not re.fullmatch(r"[0-9]{1,9}", key, flags=re.ASCII):
            raise PydanticCustomError("token_id", "keys must be token ids in decimal digits")
    return bias


Name = Annotated[str, Field(min_length=1, max_length=64)]
Identifier = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Schema = Annotated[dict[str, Any], AfterValidator(_bounded_schema)]
Ignored = Annotated[str, Field(max_length=512)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


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

    id: Annotated[str, Field(min_length=1, max_length=128)]
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
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Strict):
    """The result of a call."""

    role: Literal["tool"]
    content: str | Parts
    tool_call_id: Annotated[str, Field(min_length=1, max_length=128)]


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]


class FunctionDefinition(Strict):
    """A function the model may call."""

    name: Identifier
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool the model may use."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    """The one function the model must call."""

    name: Identifier


class NamedTool(Strict):
    """The one tool the model must use."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    """The schema an answer must follow."""

    name: Identifier
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """Structured output: plain text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_needed(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("json_schema", "json_schema goes with type 'json_schema', and only with it")
        return self


class StreamOptions(Strict):
    """`include_usage` adds a last chunk with the usage; `include_obfuscation` is ignored."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(Strict):
    """The body of `POST /v1/chat/completions`."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    steering: SteeringField = None

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=_INT64)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=_INT64)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    seed: Annotated[int, Field(ge=-_INT64 - 1, le=_INT64)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]], Field(max_length=MAX_STOPS)
        ]
        | None
    ) = None
    ignore_eos: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_BIASES),
            AfterValidator(_plain_dict_of_token_ids),
        ]
        | None
    ) = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=128)] | None = None

    # Ignored: harmless, and sent by clients that talk to several servers.
    user: Ignored | None = None
    metadata: Annotated[dict[Name, Ignored], Field(max_length=16)] | None = None
    store: bool | None = None
    service_tier: Annotated[str, Field(max_length=64)] | None = None
    safety_identifier: Ignored | None = None
    prompt_cache_key: Ignored | None = None
    prompt_cache_retention: Annotated[str, Field(max_length=64)] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None

    @model_validator(mode="after")
    def _combinations(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise _at("max_tokens", "send max_tokens or max_completion_tokens, not both")
        if self.temperature is not None and self.temperature < GREEDY and (self.n or 1) > 1:
            raise _at("n", "n > 1 needs a temperature above 0: greedy answers are all the same")
        if self.top_logprobs and not self.logprobs:
            raise _at("top_logprobs", "top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise _at("stream_options", "stream_options needs stream: true")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise _at("tool_choice", "tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tools is not None:
            names = [tool.function.name for tool in self.tools]
            if self.tool_choice.function.name not in names:
                raise _at("tool_choice.function.name", f"no such tool; tools: {names}")
        return self

    @property
    def samples(self) -> int:
        """How many answers are asked for."""
        return self.n or 1

    @property
    def spec(self) -> SteeringSpec | None:
        """What is asked of steering; None without a `steering` field."""
        return spec_of(self.steering)

    def to_generation(self) -> Generation:
        """The request as the service takes it."""
        fields = self.engine_fields()
        return Generation(
            model=self.model,
            spec=self.spec,
            fields=fields,
            prompt_fields=_prompt_fields(fields),
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
                _as_engines_read_it(message)
        return fields


_PROMPT = {"model", "messages", "tools", "reasoning_effort"}

_NOT_FOR_THE_ENGINE = {
    "steering",
    "cache_salt",
    "stream",
    "stream_options",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "verbosity",
    "modalities",
}


def _at(path: str, message: str) -> PydanticCustomError:
    """An error of a combination; `path` names the field that `server/wire/parsing.py` reports."""
    return PydanticCustomError("combination", "{message}", {"message": message, "path": path})


def _prompt_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the prompt is made of, for a pass that only looks at it; tools are shown and never called."""
    kept = {name: value for name, value in fields.items() if name in _PROMPT}
    return kept | ({"tool_choice": "none"} if "tools" in kept else {})


def _as_engines_read_it(message: dict[str, Any]) -> None:
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
