"""Outcome and response: what the engine did for a sample, and what its response probe read of the answer.

What one step made known travels as one JSON message from the worker to whoever started the engine. Knows nothing of
HTTP, models, sockets or vLLM.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steering.plan import Decision, Reasoning, Scope

_ENCODER = json.JSONEncoder(separators=(",", ":"))
"""`json.dumps` makes one at every call that sets its separators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a probe read from one prompt; probabilities.

    Attributes:
        refusal: that the prompt is to be refused.
        categories: by category, over all of the probe's; they sum to 1.
    """

    refusal: float
    categories: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the engine did for one sample of a request, reported by the worker's first rank.

    Attributes:
        plan_id: the plan's `id`.
        request_id: the engine's own id of the sample (n > 1 gives several per plan).
        applied: True once the forward pass that edited the last prompt token has run, or that, where reasoning is
            spared, begins the wait for its end.
        edit: name of the edit; None where a gate chose none.
        strength: as applied, 0 where nothing was.
        scope: as applied.
        reasoning: as applied.
        decision: the gate's; None for a plan that names its edit.
        category: what the gate took the prompt for, among the allowed ones; None for a plan that names its edit.
        scores: what the gate's probe read; None for a plan that names its edit.
        error: why nothing could be decided or applied; empty when all went well, which includes a gate's abstention.
    """

    plan_id: str
    request_id: str
    applied: bool
    edit: str | None
    strength: float
    scope: Scope
    reasoning: Reasoning = Reasoning.EDITED
    decision: Decision | None = None
    category: str | None = None
    scores: Scores | None = None
    error: str = ""

    def to_fields(self) -> dict[str, Any]:
        """What JSON can say of it."""
        # By hand: `dataclasses.asdict` takes longer than the rest of a step's report.
        scores = self.scores
        return {
            "plan_id": self.plan_id,
            "request_id": self.request_id,
            "applied": self.applied,
            "edit": self.edit,
            "strength": self.strength,
            "scope": self.scope,
            "reasoning": self.reasoning,
            "decision": self.decision,
            "category": self.category,
            "scores": scores and {"refusal": scores.refusal, "categories": scores.categories},
            "error": self.error,
        }

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Outcome:
        """Read what `to_fields` gave."""
        decision, scores = fields["decision"], fields["scores"]
        changed = {
            "scope": Scope(fields["scope"]),
            "reasoning": Reasoning(fields["reasoning"]),
            "decision": None if decision is None else Decision(decision),
            "scores": None if scores is None else Scores(**scores),
        }
        return cls(**{**fields, **changed})


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What the response probe has read of one sample so far, reported by the worker's first rank.

    Attributes:
        plan_id: the plan's `id`.
        request_id: the engine's own id of the sample.
        tokens: generated tokens it has read, 1 or more.
        score: log-odds that the answer refuses, the mean over them.
    """

    plan_id: str
    request_id: str
    tokens: int
    score: float

    @property
    def probability(self) -> float:
        """That the answer refuses."""
        return 1.0 / (1.0 + math.exp(-self.score)) if self.score > -700 else 0.0


def message_of(outcomes: Sequence[Outcome], responses: Sequence[Response]) -> bytes:
    """One line of JSON for what a step made known."""
    read = [[each.plan_id, each.request_id, each.tokens, each.score] for each in responses]
    told = {"outcomes": [outcome.to_fields() for outcome in outcomes], "responses": read}
    return _ENCODER.encode(told).encode()


def from_message(message: bytes) -> tuple[list[Outcome], list[Response]]:
    """Read what `message_of` wrote.

    Raises:
        ValueError, TypeError, KeyError: it did not.
    """
    fields = json.loads(message)
    outcomes = [Outcome.from_fields(each) for each in fields["outcomes"]]
    responses = [
        Response(plan_id=plan_id, request_id=request_id, tokens=tokens, score=score)
        for plan_id, request_id, tokens, score in fields["responses"]
    ]
    return outcomes, responses
