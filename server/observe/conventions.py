"""Conventions: what facts of a request are called in spans. All names of attributes and events are here.

OpenTelemetry's for generative models are still in development, and those for guardrails a proposal
(open-telemetry/semantic-conventions-genai, pull request 427): what is certain to be ours begins with `trimtab.`.
Text of prompts and answers has no name here. Knows nothing of OpenTelemetry's packages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from server.observe.events import Ended
from server.observe.metrics import mode_of
from server.verdicts import Verdict

Value = str | int | float | bool

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
}
"""`gen_ai.operation.name` by endpoint."""

GUARDRAIL = "gen_ai.guardrail"
EVALUATION = "gen_ai.evaluation.result"

_GUARDRAIL_VERDICTS = {"refuse": "deny", "comply": "allow", "abstain": "allow", "off": "allow"}
"""The proposal's verdicts: what the gate takes the prompt for, apart from what was done about it."""


class SpanEvent(NamedTuple):
    """Something that happened in a span; `seconds` after its begin, None at its end."""

    name: str
    attributes: Mapping[str, Value]
    seconds: float | None = None


def name_of(endpoint: str, event: Ended) -> str:
    """The name of a generating request's span."""
    return f"{OPERATIONS.get(endpoint, 'generate')} {event.generation.model}"


def request_attributes(endpoint: str, method: str) -> dict[str, Value]:
    """What is known of a request when it comes."""
    told: dict[str, Value] = {"http.request.method": method, "http.route": endpoint}
    if endpoint in OPERATIONS:
        told |= {"gen_ai.operation.name": OPERATIONS[endpoint], "gen_ai.provider.name": "vllm"}
    return told


def attributes_of(request_id: str, status: int, error: str | None, event: Ended | None) -> dict[str, Value]:
    """What is known of a request in the end."""
    told: dict[str, Value] = {"http.response.status_code": status, "trimtab.request.id": f"req_{request_id}"}
    if error is not None:
        told["error.type"] = error
    if event is None:
        return told
    resolution, fields = event.resolution, event.generation.fields
    told |= {
        "gen_ai.request.model": event.generation.model,
        "gen_ai.request.choice.count": event.generation.samples,
        "trimtab.key.id": event.ticket.caller.key_id,
        "trimtab.bundle": resolution.bundle.label,
        "trimtab.profile": resolution.profile.name,
        "trimtab.mode": mode_of(resolution),
        "trimtab.complete": event.is_complete,
    }
    for ours, name in (
        ("max_tokens", "gen_ai.request.max_tokens"),
        ("max_completion_tokens", "gen_ai.request.max_tokens"),
        ("temperature", "gen_ai.request.temperature"),
        ("top_p", "gen_ai.request.top_p"),
        ("seed", "gen_ai.request.seed"),
    ):
        value = fields.get(ours)
        if isinstance(value, int | float):
            told[name] = value
    if event.usage is not None:
        told |= {
            "gen_ai.usage.input_tokens": event.usage.prompt,
            "gen_ai.usage.output_tokens": event.usage.completion,
            "gen_ai.usage.cache_read.input_tokens": event.usage.cached,
        }
    if event.first_token is not None:
        told["gen_ai.response.time_to_first_chunk"] = event.first_token
    for stage, seconds in event.stages.items():
        told[f"trimtab.stage.{stage.value}"] = seconds
    return told


def events_of(event: Ended, *, has_scores: bool) -> Iterator[SpanEvent]:
    """The decision, and what every choice of the answer turned out to be."""
    first = event.effects.get(0)
    if first is not None:
        resolution = event.resolution
        told: dict[str, Value] = {
            "gen_ai.guardrail.name": resolution.profile.name,
            "gen_ai.guardrail.target.type": "input",
            "gen_ai.guardrail.verdict": _GUARDRAIL_VERDICTS.get(first.decision, first.decision),
            "gen_ai.guardrail.action": "modify" if first.applied else "none",
            "trimtab.decision": first.decision,
            "trimtab.mode": mode_of(resolution),
            "trimtab.applied": first.applied,
        }
        if first.category is not None:
            told["security.risk.category"] = first.category
        if first.edit is not None and first.strength is not None:
            told |= {"trimtab.edit": first.edit, "trimtab.strength": first.strength}
        if has_scores and first.scores is not None:
            told["security.risk.score"] = first.scores.refusal
        yield SpanEvent(GUARDRAIL, told, event.first_token)
    for index, verdict in enumerate(event.verdicts):
        yield SpanEvent(EVALUATION, {**_evaluation(verdict, has_scores=has_scores), "trimtab.choice": index})


def _evaluation(verdict: Verdict, *, has_scores: bool) -> dict[str, Value]:
    told: dict[str, Value] = {
        "gen_ai.evaluation.name": "refusal",
        "gen_ai.evaluation.score.label": verdict.outcome,
        "trimtab.detector": verdict.detector,
    }
    if verdict.category is not None:
        told["trimtab.category"] = verdict.category
    if has_scores and verdict.probability is not None:
        told["gen_ai.evaluation.score.value"] = verdict.probability
    return told
