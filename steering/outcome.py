"""Outcome and response: what the engine did for a sample, and what its response probe read of the answer.

What a step made known of a sample travels as reports, beside the step's token of it, from the worker to whoever
started the engine. Knows nothing of HTTP, models or vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from steering.plan import Decision, Reasoning, Scope


class Scores(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """What a probe read from one prompt. It travels as it was read: who wants probabilities makes them.

    Attributes:
        names: the probe's categories, in its order.
        logits: the log-odds that the prompt is to be refused, then a score for each category.
    """

    names: tuple[str, ...]
    logits: tuple[float, ...]

    @property
    def refusal(self) -> float:
        """Probability that the prompt is to be refused."""
        return _sigmoid(self.logits[0])

    def of(self, category: str) -> float:
        """The score of a category, one of `names`."""
        return self.logits[1 + self.names.index(category)]

    @property
    def categories(self) -> dict[str, float]:
        """Probability of each category, by a softmax over all of the probe's."""
        of_categories = self.logits[1:]
        largest = max(of_categories, default=0.0)
        weights = [math.exp(score - largest) for score in of_categories]
        total = sum(weights)
        return {name: weight / total for name, weight in zip(self.names, weights, strict=True)}


class Outcome(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False, tag=0):
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


class Response(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False, tag=1):
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
        return _sigmoid(self.score)


class Rejection(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False, tag=2):
    """Why a request is never run.

    Attributes:
        plan_id: the plan's `id`.
        error: fields of the error (`TrimtabError.to_fields`).
    """

    plan_id: str
    error: Mapping[str, str | None]


Report = Outcome | Response | Rejection
"""What is told of a request, as bytes beside a token of it."""


def report_from_bytes(report: bytes) -> Report:
    """Read what `report_to_bytes` wrote.

    Raises:
        ValueError: it did not.
    """
    try:
        found: Report = _DECODER.decode(report)
    except (msgspec.MsgspecError, TypeError) as error:
        raise ValueError(f"this is no report of a request: {error}") from error
    return found


def _sigmoid(score: float) -> float:
    # Of two equal forms the one that does not overflow.
    return 1.0 / (1.0 + math.exp(-score)) if score >= 0 else math.exp(score) / (1.0 + math.exp(score))


report_to_bytes = msgspec.msgpack.Encoder().encode
"""A report as it travels."""

_DECODER = msgspec.msgpack.Decoder(Report)
