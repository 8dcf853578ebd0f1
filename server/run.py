"""Run: one request being answered.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

from server.access.caller import bounded, prefix_cache_salt
from server.effects import Effect
from server.engine import Call
from server.generation import Generation, Ticket
from server.observe.events import Ended, Usage
from server.observe.stages import Stages
from server.policy import Resolution
from server.verdicts import Verdict
from steering.errors import TrimtabError


@dataclass(slots=True, kw_only=True)
class Run:
    """One request being answered, and what is known of it so far; see `Ended` for the fields.

    Attributes:
        answer_tokens: most tokens of an answer, where the request names no number.
        prompt: its tokens, once the engine has told them.
    """

    generation: Generation
    resolution: Resolution
    ticket: Ticket
    began: float
    answer_tokens: int
    effects: dict[int, Effect] = field(default_factory=dict)
    verdicts: Sequence[Verdict] = ()
    contents: tuple[str, ...] = ()
    prompt: Sequence[int] = ()
    usage: Usage | None = None
    generated: int = 0
    error: TrimtabError | None = None
    is_complete: bool = False
    first_token: float | None = None
    stages: Stages = field(default_factory=Stages)

    @property
    def samples(self) -> int:
        """Answers to the one prompt."""
        return self.generation.samples

    def call(self) -> Call:
        """What the engine is asked for; makes a new one each time, which the engine may change."""
        return Call(
            request_id=self.ticket.call_id,
            prompting=self.generation.prompting,
            fields=bounded(self.generation.fields, self.answer_tokens) | self._salt(),
            samples=self.samples,
            plan=self.resolution.order,
            trace=self.ticket.trace,
        )

    def category_call(self, tokens: Sequence[int]) -> Call:
        """P1.4's first pass: one token, among these."""
        fields = copy.deepcopy(dict(self.generation.prompt_fields)) | self._salt()
        fields |= {"max_tokens": 1, "temperature": 0.0, "allowed_token_ids": [*tokens]}
        return Call(
            request_id=f"{self.ticket.call_id}-category",
            prompting=self.generation.prompting,
            fields=fields,
            trace=self.ticket.trace,
        )

    def _salt(self) -> dict[str, str]:
        salt = prefix_cache_salt(self.ticket.caller, self.generation.cache_salt)
        return {} if salt is None else {"cache_salt": salt}

    def end(self, now: float) -> Ended:
        """What is told of it, at this time of the loop's clock."""
        return Ended(
            ticket=self.ticket,
            generation=self.generation,
            resolution=self.resolution,
            effects=self.effects,
            verdicts=tuple(self.verdicts),
            contents=self.contents,
            usage=self.usage,
            generated=self.generated,
            error=self.error,
            is_complete=self.is_complete,
            seconds=now - self.began,
            first_token=self.first_token,
            stages=self.stages,
        )
