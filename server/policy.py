"""The policy: from what a client asked (spec) to what the engine is to do (plan).

Pure: the same spec, catalog and plan id give the same resolution. Knows nothing of HTTP, torch or vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from server.catalog import BundleView, Catalog, ProfileView
from steering.errors import InvalidSpec, NotSupported, UnknownName
from steering.plan import Mode, Plan, Scope


class Report(StrEnum):
    """How much of the decision the answer carries."""

    NONE = "none"
    DECISION = "decision"
    FULL = "full"


AUTO_CATEGORY = "auto"
"""Category a client names to leave the choice to the profile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringSpec:
    """What a client asked, checked for types and ranges only; None where it asked nothing."""

    profile: str | None = None
    mode: Mode | None = None
    category: str | None = None
    strength: float | None = None
    has_thresholds: bool = False
    scope: Scope | None = None
    report: Report = Report.DECISION


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What was resolved and allowed.

    Attributes:
        bundle, profile: whose tokens and edits count for this request, also for one that is not steered.
        decision: `refuse`, `comply` or `off`.
        category: whose edit is applied; None when nothing is.
        plan: for the engine; None when nothing is to be applied.
        report: how much of this the answer carries.
    """

    bundle: BundleView
    profile: ProfileView
    decision: Mode
    category: str | None
    plan: Plan | None
    report: Report


def resolve(spec: SteeringSpec | None, catalog: Catalog, *, plan_id: str) -> Resolution:
    """Resolve what a client asked against what is loaded.

    Args:
        spec: None for a request without a `steering` field.
        catalog: what is loaded.
        plan_id: id of the plan, if one results.

    Raises:
        UnknownName: a profile or category that is not there; the message lists those that are.
        NotSupported: needs a gate, which no bundle of this version has.
        InvalidSpec: strength outside the range the edit is certified for.
    """
    spec = spec or SteeringSpec()
    bundle, profile = catalog.profile(spec.profile)
    mode = spec.mode if spec.mode is not None else catalog.default_mode
    _refuse_what_needs_a_gate(spec, mode)
    category = _category(spec, bundle, profile, mode)
    if mode is Mode.OFF:
        return Resolution(bundle=bundle, profile=profile, decision=mode, category=None, plan=None, report=spec.report)
    edit = bundle.edits[profile.edits(mode)[category]]
    strength = profile.strength if spec.strength is None else spec.strength
    if not edit.minimum <= strength <= edit.maximum or strength <= 0:
        raise InvalidSpec(
            f"strength {strength} is outside the range that edit {edit.name!r} is certified for: "
            f"{edit.minimum} to {edit.maximum}, above 0 (the side is chosen by steering.mode)",
            parameter="steering.strength",
        )
    plan = Plan(
        id=plan_id,
        bundle=bundle.digest,
        edit=edit.name,
        strength=strength,
        scope=profile.scope if spec.scope is None else spec.scope,
    )
    return Resolution(bundle=bundle, profile=profile, decision=mode, category=category, plan=plan, report=spec.report)


def _refuse_what_needs_a_gate(spec: SteeringSpec, mode: Mode) -> None:
    modes = [Mode.REFUSE.value, Mode.COMPLY.value, Mode.OFF.value]
    if mode is Mode.AUTO:
        raise NotSupported(
            f"mode 'auto' needs a gate, and no loaded bundle has one; modes: {modes}", parameter="steering.mode"
        )
    if spec.has_thresholds:
        raise NotSupported(
            "thresholds move a gate, and no loaded bundle has one; leave the field out", parameter="steering.thresholds"
        )
    if spec.report is Report.FULL:
        raise NotSupported(
            "report 'full' carries a gate's scores, and no loaded bundle has a gate; reports: ['none', 'decision']",
            parameter="steering.report",
        )


def _category(spec: SteeringSpec, bundle: BundleView, profile: ProfileView, mode: Mode) -> str:
    named = spec.category not in (None, AUTO_CATEGORY)
    category = spec.category if named and spec.category is not None else profile.default_category
    if category not in bundle.categories:
        raise UnknownName(
            f"category {category!r} is not in bundle {bundle.name!r}; categories: {sorted(bundle.categories)}",
            parameter="steering.category",
        )
    edits = profile.edits(mode)
    if mode is not Mode.OFF and category not in edits:
        raise NotSupported(
            f"profile {profile.name!r} has no edit to {mode.value} category {category!r}; "
            f"it has them for {sorted(edits)}",
            parameter="steering.category" if named or edits else "steering.mode",
        )
    return category
