"""A client's side of steering: the request field as typed arguments, and what answers tell as a value.

Works with the objects of OpenAI's SDK and with plain JSON; imports neither the SDK nor anything heavier than itself.

    client.chat.completions.create(..., extra_body=steering(profile="refusal-control", mode="comply"))
    steering_of(answer).decision
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Mode = Literal["auto", "refuse", "comply", "off"]
Scope = Literal["generated", "all"]
Report = Literal["none", "decision", "full"]
CategorySource = Literal["probe", "refusal_tokens"]

DECISION_HEADER = "x-trimtab-decision"

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "mode": ("auto", "refuse", "comply", "off"),
    "scope": ("generated", "all"),
    "report": ("none", "decision", "full"),
    "category_source": ("probe", "refusal_tokens"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What an answer turned out to be.

    Attributes:
        refused: None where nothing could tell.
        category: of the refusal, where the model names one.
        detector: what told.
    """

    refused: bool | None
    category: str | None
    detector: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringReport:
    """What was done for an answer.

    Attributes:
        applied: something was edited.
        profile, bundle: whose edits and thresholds counted.
        decision: `refuse`, `comply`, `abstain` or `off`.
        category: of the edit, or what the gate took the prompt for.
        edit, strength, scope: as applied; None where nothing was edited.
        shadow: it was decided and counted, and nothing was done.
        refusal: the probability of refusal that the gate read; None without a full report.
        categories: the gate's scores by category, likewise.
        verdict: of the first choice.
        verdicts: of each choice, where there are several.
        raw: all of it, as it came.
    """

    applied: bool
    profile: str
    bundle: str
    decision: str
    category: str | None = None
    edit: str | None = None
    strength: float | None = None
    scope: str | None = None
    shadow: bool = False
    refusal: float | None = None
    categories: Mapping[str, float] = field(default_factory=dict)
    verdict: Verdict | None = None
    verdicts: tuple[Verdict, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)


def steering(
    *,
    profile: str | None = None,
    mode: Mode | None = None,
    category: str | Sequence[str] | None = None,
    strength: float | None = None,
    comply_below: float | None = None,
    refuse_above: float | None = None,
    graded: bool | None = None,
    category_source: CategorySource | None = None,
    scope: Scope | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """The `extra_body` of a request; what is left out is the profile's.

    Ranges that hold for every server are checked here; names and certified strengths are the server's, at
    `GET /v1/steering`.

    Raises:
        ValueError: an argument that every server would refuse.
    """
    given: dict[str, Any] = {
        "profile": profile,
        "mode": mode,
        "category": category if category is None or isinstance(category, str) else list(category),
        "strength": strength,
        "graded": graded,
        "category_source": category_source,
        "scope": scope,
        "report": report,
    }
    for name, choices in _CHOICES.items():
        if given[name] is not None and given[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {given[name]!r}")
    if category is not None and not category:
        raise ValueError("category must be a name or a list of one or more, got none")
    if strength is not None and not (math.isfinite(strength) and strength > 0):
        raise ValueError(f"strength must be above 0 and finite, got {strength!r}")
    thresholds = {"comply_below": comply_below, "refuse_above": refuse_above}
    for name, threshold in thresholds.items():
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"{name} is a probability from 0 to 1, got {threshold!r}")
    if comply_below is not None and refuse_above is not None and comply_below > refuse_above:
        raise ValueError(f"comply_below {comply_below!r} must not be above refuse_above {refuse_above!r}")
    asked = {name: value for name, value in given.items() if value is not None}
    set_thresholds = {name: value for name, value in thresholds.items() if value is not None}
    if set_thresholds:
        asked["thresholds"] = set_thresholds
    return {"steering": asked}


def steering_of(answer: object) -> SteeringReport | None:
    """What an answer tells of its steering; None where it tells nothing.

    Args:
        answer: a chat completion, completion or response of the SDK, the last chunk of a stream that ends a choice, the
            `response.completed` event of a streamed response, or any of these as plain JSON.
    """
    found = _member(answer, "steering")
    if found is None:
        found = _member(_member(answer, "response"), "steering")
    if not isinstance(found, Mapping):
        return None
    scores = found.get("scores") or {}
    verdicts = found.get("verdicts") or ()
    return SteeringReport(
        applied=bool(found["applied"]),
        profile=found["profile"],
        bundle=found["bundle"],
        decision=found["decision"],
        category=found.get("category"),
        edit=found.get("edit"),
        strength=found.get("strength"),
        scope=found.get("scope"),
        shadow=bool(found.get("shadow")),
        refusal=scores.get("refusal"),
        categories=dict(scores.get("categories") or {}),
        verdict=_verdict(found.get("verdict")),
        verdicts=tuple(verdict for verdict in map(_verdict, verdicts) if verdict is not None),
        raw=found,
    )


def decision_of(headers: Mapping[str, str]) -> str | None:
    """The decision that the headers of an answer tell; None where they do not, as in a stream that waited for long."""
    named = {name.lower(): value for name, value in headers.items()}
    return named.get(DECISION_HEADER)


def _member(node: object, name: str) -> Any:
    """A key of JSON, or an attribute of an object of the SDK, which keeps there what OpenAI's API does not have."""
    return node.get(name) if isinstance(node, Mapping) else getattr(node, name, None)


def _verdict(found: Mapping[str, Any] | None) -> Verdict | None:
    if found is None:
        return None
    return Verdict(refused=found.get("refused"), category=found.get("category"), detector=found.get("detector"))
