"""Generations: what is to be generated, for whom, in the form that every endpoint's request is brought into.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.access.caller import LOCAL, Caller
from server.engine import Prompting
from server.policy import SteeringSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One prompt that is to be answered, once or several times.

    Attributes:
        model: name the client sent.
        spec: what is asked of steering; None without a `steering` field.
        prompting: how the engine makes a prompt of the fields.
        fields: for the engine, as JSON values; without what concerns the gateway alone. Never changed.
        prompt_fields: those of them that the prompt is made of, for a pass that only looks at it.
        samples: the `n` of the request.
        wants_usage: the stream is to end with a chunk that carries the usage.
        cache_salt: the client's own, to keep the prefix cache of its requests apart.
        default_tokens: most tokens of an answer where the client names no number, if the endpoint has one for that.
    """

    model: str
    spec: SteeringSpec | None
    prompting: Prompting = Prompting.CHAT
    fields: Mapping[str, Any]
    prompt_fields: Mapping[str, Any]
    samples: int = 1
    wants_usage: bool = False
    cache_salt: str | None = None
    default_tokens: int | None = None

    @property
    def prompt(self) -> Sequence[Any] | str:
        """What the prompt is made of: messages, a text, or token ids."""
        found: Sequence[Any] | str = self.fields["messages" if self.prompting is Prompting.CHAT else "prompt"]
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """A request that was let in.

    Attributes:
        request_id: ours, unique.
        caller: who sent it.
        endpoint: path it came by; a label of metrics.
        is_internal: the server's own, such as a canary's: not traffic, and not counted as such.
        trace: headers of W3C's trace context.
        number: which of the prompts of a request that has several.
    """

    request_id: str
    caller: Caller = LOCAL
    endpoint: str = "none"
    is_internal: bool = False
    trace: Mapping[str, str] = field(default_factory=dict)
    number: int | None = None

    @property
    def call_id(self) -> str:
        """What the engine knows it by; unique among the prompts of one request, too."""
        return self.request_id if self.number is None else f"{self.request_id}-{self.number}"
