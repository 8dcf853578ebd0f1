"""Wire model of `POST /v1/completions`: prompts as they are, without a chat template.

Strict: no coercion, no unknown keys, no NaN, limits on every count. Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag, model_validator

from server.engine import Prompting
from server.generation import Generation
from server.wire.refused import REFUSED
from server.wire.sampling import INT64, MAX_SAMPLES, MAX_TOP_LOGPROBS, Sampling, StreamOptions, TokenId
from server.wire.schemas import ResponseFormat
from server.wire.strict import at

MAX_PROMPTS = 64
MAX_ANSWERS = 128
"""Prompts times `n`: how many answers one request may ask for."""
DEFAULT_TOKENS = 16
"""OpenAI's default of `max_tokens`."""

Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _form(prompt: object) -> str:
    """Which form a prompt has, by its first item; what has none is told that it is no text."""
    if not isinstance(prompt, list):
        return "a text"
    first = prompt[0] if prompt else ""
    if isinstance(first, list):
        return "a list of lists"
    return "a list of texts" if isinstance(first, str) else "a list of ids"


Prompt = Annotated[
    Annotated[Text, Tag("a text")]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("a list of texts")]
    | Annotated[Tokens, Tag("a list of ids")]
    | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("a list of lists")],
    Discriminator(_form),
]


class CompletionRequest(Sampling):
    """The body of `POST /v1/completions`."""

    prompt: Prompt

    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=INT64)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    response_format: ResponseFormat | None = None
    suffix: None = None
    best_of: None = None

    refused: ClassVar = {**REFUSED, "suffix": "this server completes prompts at their end only"}
    forms: ClassVar = {
        **Sampling.forms,
        "prompt": (
            f"must be a string, a list of token ids, or a list of 1 to {MAX_PROMPTS} of either; none may be empty, and "
            f"ids are integers of at least 0"
        ),
    }

    @model_validator(mode="after")
    def _combinations(self) -> CompletionRequest:
        if self.is_greedy and self.samples > 1:
            raise at("n", "n > 1 needs a temperature above 0: greedy answers are all the same")
        if self.max_tokens == 0 and not self.echo:
            raise at("max_tokens", "max_tokens: 0 needs echo: true; there would be nothing to answer")
        if self.stream_options is not None and not self.stream:
            raise at("stream_options", "stream_options needs stream: true")
        if len(self.prompts) * self.samples > MAX_ANSWERS:
            raise at("n", f"prompts times n must be at most {MAX_ANSWERS}")
        return self

    @property
    def samples(self) -> int:
        """How many answers are asked for to each prompt."""
        return self.n or 1

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[*self.prompt]]
        return [*self.prompt]

    def to_generations(self) -> list[Generation]:
        """The request as the service takes it: a generation for each prompt."""
        fields = self.engine_fields()
        return [
            Generation(
                model=self.model,
                spec=self.spec,
                prompting=Prompting.PLAIN,
                fields={**fields, "prompt": prompt},
                prompt_fields={"model": self.model, "prompt": prompt},
                samples=self.samples,
                wants_usage=bool(self.stream_options and self.stream_options.include_usage),
                cache_salt=self.cache_salt,
                default_tokens=DEFAULT_TOKENS,
            )
            for prompt in self.prompts
        ]

    def engine_fields(self) -> dict[str, Any]:
        """The fields that concern the engine, as JSON values, but for the prompts."""
        fields = self.sampling_fields()
        for name in ("max_tokens", "n", "logprobs", "echo"):
            if (value := getattr(self, name)) is not None:
                fields[name] = value
        if self.response_format is not None:
            fields["response_format"] = self.response_format.model_dump(
                mode="python", by_alias=True, exclude_unset=True, exclude_none=True
            )
        return fields
