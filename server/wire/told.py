"""Models of what leaves: how answers look, for the OpenAPI document.

Nothing is checked by them while requests are answered; tests hold answers against them. Knows nothing of HTTP, vLLM or
torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class Told(BaseModel):
    """A model of an object with no other keys; those without a default are always there."""

    model_config = ConfigDict(extra="forbid")


class Fault(Told):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(Told):
    """OpenAI's error object; the body of every answer that is no success."""

    error: Fault


class Verdict(Told):
    """Whether the answer refuses; `refused` is null where nothing could tell."""

    refused: bool | None
    category: str | None
    detector: str
    probability: Probability | None = None
    tokens: Count | None = None
    threshold: float | None = None


class Scores(Told):
    """What a probe read of a prompt."""

    refusal: Probability
    categories: dict[str, Probability]


class Thresholds(Told):
    """Where the gate complied and where it refused."""

    comply_below: Probability
    refuse_above: Probability


class SteeringReport(Told):
    """What was decided for a request, and done to its answer."""

    applied: bool
    profile: str
    bundle: str
    decision: Literal["refuse", "comply", "abstain", "off"]
    category: str | None
    edit: str | None
    strength: float | None
    scope: Literal["generated", "all"] | None
    verdict: Verdict
    shadow: Literal[True] | None = None
    category_source: Literal["probe", "refusal_tokens"] | None = None
    reasoning: str | None = None
    scores: Scores | None = None
    thresholds: Thresholds | None = None
    graded: bool | None = None
    verdicts: list[Verdict] | None = None
    decisions: list[str] | None = None
    transferred: Literal[True] | None = None
    prompts: list[SteeringReport] | None = None


class TokenDetails(BaseModel):
    """Of which tokens; keys are OpenAI's."""

    cached_tokens: Count | None = None
    reasoning_tokens: Count | None = None


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: TokenDetails | None = None
    completion_tokens_details: TokenDetails | None = None


class ChatMessage(BaseModel):
    """An answer; `reasoning` and `tool_calls` where there are any."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(BaseModel):
    """One of the answers to the prompt."""

    index: Count
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter", "error"] | None


class ChatCompletion(Told):
    """The answer of `POST /v1/chat/completions`."""

    id: Annotated[str, Field(pattern="^chatcmpl-")]
    object: Literal["chat.completion"]
    created: Count
    model: str
    choices: Annotated[list[ChatChoice], Field(min_length=1)]
    usage: Usage
    system_fingerprint: str | None = None
    steering: SteeringReport | None = None


class TextChoice(BaseModel):
    """One of the answers to one of the prompts."""

    index: Count
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "content_filter", "error"] | None


class TextCompletion(Told):
    """The answer of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: Count
    model: str
    choices: Annotated[list[TextChoice], Field(min_length=1)]
    usage: Usage
    system_fingerprint: str | None = None
    steering: SteeringReport | None = None


class OutputItem(BaseModel):
    """A message, a call or reasoning; keys are OpenAI's."""

    id: str
    type: Literal["message", "function_call", "reasoning"]


class ResponseUsage(BaseModel):
    """Tokens read and written."""

    input_tokens: Count
    output_tokens: Count
    total_tokens: Count


class ResponseObject(BaseModel):
    """The answer of `POST /v1/responses`; further keys repeat the request, as OpenAI's do."""

    id: Annotated[str, Field(pattern="^resp_")]
    object: Literal["response"]
    created_at: Count
    status: Literal["completed", "incomplete", "failed", "in_progress"]
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None
    error: dict[str, Any] | None
    store: Literal[False]
    steering: SteeringReport | None = None


class TokenCount(Told):
    """The answer of `POST /tokenize`."""

    count: Count
    max_model_len: Count
    tokens: list[Count]
    token_strs: None


class ProbeReading(Told):
    """The answer of `POST /v1/steering/probe`."""

    object: Literal["steering.probe"]
    model: str
    profile: str
    bundle: str
    scores: Scores
    decision: Literal["refuse", "comply", "abstain"]
    category: str | None
    edit: str | None
    thresholds: Thresholds
    graded: bool
    usage: Usage
    transferred: Literal[True] | None = None


class ServedModel(Told):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: Count
    owned_by: str
    max_model_len: Count
    steering: dict[str, Any]


class ModelList(Told):
    """The answer of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ServedModel]


class SteeringDescription(BaseModel):
    """The answer of `GET /v1/steering`: what may be asked for."""

    object: Literal["steering"]
    version: str
    default_profile: str
    default_mode: Literal["auto", "refuse", "comply", "off"]
    modes: list[str]
    scopes: list[str]
    reports: list[str]
    category_sources: list[str]
    has_gate: bool
    profiles: list[str]
    bundles: list[dict[str, Any]]


class State(BaseModel):
    """The answer of the health endpoints."""

    status: Literal["live", "ready"]
