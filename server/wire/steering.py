"""The `steering` field of a request: what a client may ask, and the spec it becomes.

Types, ranges and counts are checked here; what the loaded bundles can do is `server/policy.py`'s. Knows nothing of
HTTP, vLLM or torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from server.policy import Report, SteeringSpec
from server.wire.strict import Strict
from steering.manifest import MAX_CATEGORIES
from steering.plan import CategorySource, Mode, Scope

Probability = Annotated[float, Field(ge=0, le=1)]
Category = Annotated[str, Field(min_length=1, max_length=100)]
Profile = Annotated[str, Field(min_length=1, max_length=201)]


class Thresholds(Strict):
    """Where a gate complies and where it refuses; probabilities. What is left out is the profile's."""

    comply_below: Probability | None = None
    refuse_above: Probability | None = None


class Steering(Strict):
    """The `steering` object of a request; what is left out is the profile's."""

    profile: Profile | None = None
    mode: Literal["auto", "refuse", "comply", "off"] | None = None
    category: Category | Annotated[list[Category], Field(min_length=1, max_length=MAX_CATEGORIES)] | None = None
    category_source: Literal["probe", "refusal_tokens"] | None = None
    strength: Annotated[float, Field(gt=0)] | None = None
    thresholds: Thresholds | None = None
    graded: bool | None = None
    scope: Literal["generated", "all"] | None = None
    report: Literal["none", "decision", "full"] = "decision"


SteeringField = Steering | Profile | Literal[False] | None
"""An object, the name of a profile, false for nothing at all, or null for what the server does by default."""


def spec_of(asked: SteeringField) -> SteeringSpec | None:
    """What is asked of steering; None without a `steering` field."""
    if asked is None:
        return None
    if asked is False:
        return SteeringSpec(mode=Mode.OFF)
    if isinstance(asked, str):
        return SteeringSpec(profile=asked)
    thresholds = asked.thresholds or Thresholds()
    return SteeringSpec(
        profile=asked.profile,
        mode=None if asked.mode is None else Mode(asked.mode),
        category=tuple(asked.category) if isinstance(asked.category, list) else asked.category,
        category_source=None if asked.category_source is None else CategorySource(asked.category_source),
        strength=asked.strength,
        comply_below=thresholds.comply_below,
        refuse_above=thresholds.refuse_above,
        is_graded=asked.graded,
        scope=None if asked.scope is None else Scope(asked.scope),
        report=Report(asked.report),
    )
