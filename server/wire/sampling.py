"""What the bodies of every endpoint that generates have in common: the model, steering, and how tokens are sampled.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from server.policy import SteeringSpec
from server.wire.refused import REFUSED
from server.wire.steering import SteeringField, spec_of
from server.wire.strict import Body, Ignored, Strict

INT64 = 2**63 - 1
MAX_TOKEN_ID = 2**31 - 1
MAX_SAMPLES = 8
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 256
MAX_STOP_TOKENS = 16
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 300
GREEDY = 1e-5
"""Temperatures below this are greedy in vLLM."""

GATEWAY = frozenset({"steering", "cache_salt", "stream", "stream_options"})
"""Fields that the gateway acts on itself."""


def _token_ids(bias: dict[str, float]) -> dict[str, float]:
    for key in bias:
        if not re.fullmatch(r"[0-9]{1,9}", key, flags=re.ASCII):
            raise PydanticCustomError("token_id", "keys must be token ids in decimal digits")
    return bias


Model = Annotated[str, Field(min_length=1, max_length=512)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenCount = Annotated[int, Field(ge=1, le=INT64)]


class StreamOptions(Strict):
    """`include_usage` adds a last chunk with the usage; `include_obfuscation` is ignored."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampling(Body):
    """Fields of every endpoint that generates; OpenAI's, and of vLLM's those that leave steering alone."""

    model: Model
    steering: SteeringField = None
    stream: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=128)] | None = None

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    seed: Annotated[int, Field(ge=-INT64 - 1, le=INT64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT64)] | None = None
    thinking_token_budget: Annotated[int, Field(ge=0, le=INT64)] | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_BIASES),
            AfterValidator(_token_ids),
        ]
        | None
    ) = None

    user: Ignored | None = None

    refused: ClassVar = REFUSED
    ignored: ClassVar = frozenset({"user"})
    forms: ClassVar = {
        "steering": "must be an object, the name of a profile, or false",
        "steering.category": "must be 'auto', the name of a category, or a list of 1 to 16 names",
        "stop": f"must be a string or a list of at most {MAX_STOPS} strings",
    }

    @property
    def spec(self) -> SteeringSpec | None:
        """What is asked of steering; None without a `steering` field."""
        return spec_of(self.steering)

    @property
    def is_greedy(self) -> bool:
        """Whether every answer to a prompt is the same."""
        return self.temperature is not None and self.temperature < GREEDY

    def sampling_fields(self) -> dict[str, Any]:
        """Model and sampling for the engine, as JSON values; those not sent, or sent as null, are left out."""
        return self.model_dump(
            mode="python", include=_FOR_THE_ENGINE, exclude_unset=True, exclude_none=True, by_alias=True
        )


_FOR_THE_ENGINE = set(Sampling.model_fields) - GATEWAY - Sampling.ignored
