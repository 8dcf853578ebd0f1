"""The policy: from what a client asked (spec) to what the engine is to do (plan).

Pure: the same spec, catalog and plan id give the same resolution. Knows nothing of HTTP, torch or vLLM.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from msgspec import Struct, structs

from server.catalog import BundleView, Catalog, EditView, GateView, ProfileView
from steering.errors import InvalidSpec, NotSupported, UnknownName
from steering.plan import CategorySource, GateOrder, Mode, Plan, Scope


class Report(StrEnum):
    """How much of the decision the answer carries."""

    NONE = "none"
    DECISION = "decision"
    FULL = "full"


AUTO_CATEGORY = "auto"
"""Category a client names to leave the choice to the gate, or to the profile where no gate decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringSpec:
    """What a client asked, checked for types and ranges only; None where it asked nothing.

    Attributes:
        category: one, `auto`, or those a gate may choose among.
    """

    profile: str | None = None
    mode: Mode | None = None
    category: str | tuple[str, ...] | None = None
    category_source: CategorySource | None = None
    strength: float | None = None
    comply_below: float | None = None
    refuse_above: float | None = None
    is_graded: bool | None = None
    scope: Scope | None = None
    report: Report = Report.DECISION


class Resolution(Struct, frozen=True, kw_only=True):
    """What was resolved and allowed.

    Attributes:
        bundle, profile: whose tokens and edits count for this request, also for one that is not steered.
        mode: what is to be done; `auto` where the gate of the plan decides.
        category: whose edit is applied, where that is known before a gate has decided; else None.
        category_source: who names the category of a gate's edit; None where no gate decides.
        plan: for the engine; None when nothing is to be applied.
        observation: for the engine where there is no plan, and the answer is to be read all the same.
        report: how much of this the answer carries.
        is_shadow: it is decided and counted, and nothing is edited; see `server/rollout.py`.
        relaxes: it may lower refusals, which is put on record; see `server/access/permissions.py`.
        is_discreet: the answer tells nothing that a probe's score could be computed from.
    """

    bundle: BundleView
    profile: ProfileView
    mode: Mode
    category: str | None
    category_source: CategorySource | None = None
    plan: Plan | None
    observation: Plan | None = None
    report: Report
    is_shadow: bool = False
    relaxes: bool = False
    is_discreet: bool = False

    @property
    def order(self) -> Plan | None:
        """What the engine is sent."""
        return self.plan or self.observation

    @property
    def candidates(self) -> Mapping[int, str]:
        """Categories by the id of their token, for a model to choose among before the plan; empty for most requests."""
        gate = self.plan.gate if self.plan else None
        if gate is None or self.category_source is not CategorySource.REFUSAL_TOKENS or self.category is not None:
            return {}
        categories = (self.bundle.categories[name] for name in gate.categories or ())
        return {category.token_id: category.name for category in categories if category.token_id is not None}

    def narrowed(self, category: str) -> Resolution:
        """The same with a gate that may choose this category only."""
        assert self.plan is not None
        assert self.plan.gate is not None
        gate = structs.replace(self.plan.gate, categories=(category,))
        return structs.replace(self, category=category, plan=structs.replace(self.plan, gate=gate))


def resolve(spec: SteeringSpec | None, catalog: Catalog, *, plan_id: str) -> Resolution:
    """Resolve what a client asked against what is loaded.

    Args:
        spec: None for a request without a `steering` field.
        catalog: what is loaded.
        plan_id: id of the plan, if one results.

    Raises:
        UnknownName: a profile or category that is not there; the message lists those that are.
        NotSupported: needs a gate, an edit or refusal tokens that the profile does not have.
        InvalidSpec: fields that do not go together, or a strength that an edit is not certified for.
    """
    found = _pattern(spec or _NOTHING, catalog)
    if found.plan is not None:
        return structs.replace(found, plan=found.plan.named(plan_id))
    if found.observation is not None:
        return structs.replace(found, observation=found.observation.named(plan_id))
    return found


_NOTHING = SteeringSpec()
_NOBODYS = "nobody's"
"""Id of a plan that no request has."""


@functools.lru_cache(maxsize=1024)
def _pattern(spec: SteeringSpec, catalog: Catalog) -> Resolution:
    """The resolution of every request that asks this: all but the plan's id. Worked out once."""
    bundle, profile = catalog.profile(spec.profile)
    resolution = _resolved(spec, bundle, profile, catalog)
    if bundle.reader is None:
        return resolution
    if resolution.plan is not None:
        return structs.replace(resolution, plan=structs.replace(resolution.plan, response=True))
    observation = Plan(id=_NOBODYS, bundle=bundle.digest, strength=1.0, response=True)
    return structs.replace(resolution, observation=observation)


def _resolved(spec: SteeringSpec, bundle: BundleView, profile: ProfileView, catalog: Catalog) -> Resolution:
    """What is to be applied, whether or not the answer is read."""
    mode = spec.mode if spec.mode is not None else profile.default_mode
    _refuse_what_needs_a_gate(spec, mode, bundle, profile, catalog)
    if mode is Mode.AUTO:
        return _automatic(spec, bundle, profile)
    category = _category(spec, bundle, profile, mode)
    if mode is Mode.OFF:
        return Resolution(bundle=bundle, profile=profile, mode=mode, category=None, plan=None, report=spec.report)
    edit = bundle.edits[profile.edits(mode)[category]]
    strength = profile.strength if spec.strength is None else spec.strength
    _check_strength(strength, [edit], "steering.mode")
    plan = Plan(
        id=_NOBODYS,
        bundle=bundle.digest,
        edit=edit.name,
        strength=strength,
        scope=profile.scope if spec.scope is None else spec.scope,
        reasoning=profile.reasoning,
    )
    return Resolution(bundle=bundle, profile=profile, mode=mode, category=category, plan=plan, report=spec.report)


def _automatic(spec: SteeringSpec, bundle: BundleView, profile: ProfileView) -> Resolution:
    """A plan whose gate decides."""
    gate = profile.gate
    assert gate is not None
    if spec.scope not in (None, Scope.GENERATED):
        raise InvalidSpec(
            f"scope {spec.scope.value!r} cannot go with mode 'auto': the gate decides at the last prompt token, when "
            "the rest of the prompt has been read unedited; use scope 'generated', or name a mode",
            parameter="steering.scope",
        )
    comply_below, refuse_above = _thresholds(spec, profile.name, gate)
    source = spec.category_source or gate.category_source
    allowed = _allowed(spec, bundle, profile, gate, source)
    if source is CategorySource.REFUSAL_TOKENS:
        _check_tokens(bundle, allowed)
    order = GateOrder(
        profile=profile.name,
        comply_below=comply_below,
        refuse_above=refuse_above,
        # The model's choice among its tokens needs the names; the probe's head takes all of its own for None.
        categories=None if allowed == gate.probe.categories and source is CategorySource.PROBE else allowed,
        is_graded=gate.is_graded if spec.is_graded is None else spec.is_graded,
    )
    possible = _possible_edits(bundle, profile, order, allowed)
    strength = profile.strength if spec.strength is None else spec.strength
    _check_strength(strength, possible, "the gate")
    _check_graded(order, possible)
    return Resolution(
        bundle=bundle,
        profile=profile,
        mode=Mode.AUTO,
        category=allowed[0] if len(allowed) == 1 else None,
        category_source=source,
        plan=Plan(id=_NOBODYS, bundle=bundle.digest, gate=order, strength=strength, reasoning=profile.reasoning),
        report=spec.report,
    )


def _refuse_what_needs_a_gate(
    spec: SteeringSpec, mode: Mode, bundle: BundleView, profile: ProfileView, catalog: Catalog
) -> None:
    # Where the answer is read, there is something to tell in full without a gate.
    needs_gate = spec.report is Report.FULL and bundle.reader is None
    needs = {
        "steering.mode": "mode 'auto'" if mode is Mode.AUTO else None,
        "steering.thresholds": "thresholds" if (spec.comply_below, spec.refuse_above) != (None, None) else None,
        "steering.graded": "graded" if spec.is_graded is not None else None,
        "steering.category_source": "category_source" if spec.category_source is not None else None,
        "steering.report": "report 'full', which carries a gate's scores," if needs_gate else None,
    }
    for parameter, what in needs.items():
        if what is None:
            continue
        if profile.gate is None:
            gated = list(catalog.gated_profile_names)
            possible = f"profiles with a gate: {gated}" if gated else "no loaded bundle has one"
            raise NotSupported(
                f"{what} needs a gate, which profile {profile.name!r} does not have; {possible}", parameter=parameter
            )
        if mode is not Mode.AUTO:
            raise InvalidSpec(
                f"{what} goes with mode 'auto' only: in mode {mode.value!r} no gate decides; leave one of them out",
                parameter=parameter,
            )
    if isinstance(spec.category, tuple) and mode is not Mode.AUTO:
        raise InvalidSpec(
            f"a list of categories is what a gate chooses among, in mode 'auto'; in mode {mode.value!r} name one",
            parameter="steering.category",
        )


def _category(spec: SteeringSpec, bundle: BundleView, profile: ProfileView, mode: Mode) -> str:
    """The one category of a mode that names its side."""
    named = isinstance(spec.category, str) and spec.category != AUTO_CATEGORY
    category = spec.category if isinstance(spec.category, str) and named else profile.default_category
    _check_known(category, bundle)
    edits = profile.edits(mode)
    if mode is not Mode.OFF and category not in edits:
        raise NotSupported(
            f"profile {profile.name!r} has no edit to {mode.value} category {category!r}; "
            f"it has them for {sorted(edits)}",
            parameter="steering.category" if named or edits else "steering.mode",
        )
    return category


def _allowed(
    spec: SteeringSpec, bundle: BundleView, profile: ProfileView, gate: GateView, source: CategorySource
) -> tuple[str, ...]:
    """The categories a gate may choose among, in the order of its probe; where the model names them by tokens, those
    that have one, if any does.
    """
    if spec.category in (None, AUTO_CATEGORY):
        told = tuple(name for name in gate.probe.categories if bundle.categories[name].token_id is not None)
        return told if told and source is CategorySource.REFUSAL_TOKENS else gate.probe.categories
    named = (spec.category,) if isinstance(spec.category, str) else spec.category or ()
    for category in named:
        _check_known(category, bundle)
        if category not in gate.probe.categories:
            raise NotSupported(
                f"the gate of profile {profile.name!r} does not tell category {category!r}; it tells "
                f"{list(gate.probe.categories)}",
                parameter="steering.category",
            )
    if not {*profile.refuse, *profile.comply} & set(named):
        raise NotSupported(
            f"profile {profile.name!r} has no edit for {list(named)}; it has them for "
            f"{sorted({*profile.refuse, *profile.comply})}",
            parameter="steering.category",
        )
    return tuple(category for category in gate.probe.categories if category in named)


def _check_known(category: str, bundle: BundleView) -> None:
    if category not in bundle.categories:
        raise UnknownName(
            f"category {category!r} is not in bundle {bundle.name!r}; categories: {sorted(bundle.categories)}",
            parameter="steering.category",
        )


def _check_tokens(bundle: BundleView, allowed: tuple[str, ...]) -> None:
    lacking = [name for name in allowed if bundle.categories[name].token_id is None]
    if lacking:
        raise NotSupported(
            f"category_source 'refusal_tokens' needs a token for each category, which {lacking} do not have here; use "
            "'probe', or name categories that have one",
            parameter="steering.category_source",
        )


def _thresholds(spec: SteeringSpec, profile: str, gate: GateView) -> tuple[float, float]:
    low = gate.comply_below if spec.comply_below is None else spec.comply_below
    high = gate.refuse_above if spec.refuse_above is None else spec.refuse_above
    if low > high:
        given, kept = "given", f"that of profile {profile!r}"
        raise InvalidSpec(
            f"comply_below {low} ({kept if spec.comply_below is None else given}) is above refuse_above {high} "
            f"({kept if spec.refuse_above is None else given}); with this comply_below, refuse_above can be {low} to "
            f"1, and with this refuse_above, comply_below can be 0 to {high}",
            parameter="steering.thresholds",
        )
    return low, high


def _possible_edits(
    bundle: BundleView, profile: ProfileView, order: GateOrder, allowed: tuple[str, ...]
) -> list[EditView]:
    """Every edit the gate may choose; a threshold of 0 never complies and one of 1 never refuses."""
    sides = [profile.refuse] if order.refuse_above < 1 else []
    if order.comply_below > 0:
        sides.append(profile.comply)
    names = {side[category] for side in sides for category in allowed if category in side}
    return [bundle.edits[name] for name in sorted(names)]


def _check_strength(strength: float, edits: list[EditView], chooser: str) -> None:
    """Each edit that may be chosen must be certified for the strength; the narrowest that is not is named."""
    wrong = [edit for edit in edits if not edit.minimum <= strength <= edit.maximum]
    if wrong or strength <= 0:
        edit = min(wrong or edits, key=lambda edit: edit.maximum - edit.minimum)
        minimum, maximum = max(edit.minimum for edit in edits), min(edit.maximum for edit in edits)
        every = f"; all {len(edits)} edits it may choose allow {minimum} to {maximum}" if len(edits) > 1 else ""
        raise InvalidSpec(
            f"strength {strength} is outside the range that edit {edit.name!r} is certified for: "
            f"{edit.minimum} to {edit.maximum}, above 0 (the side is chosen by {chooser}){every}",
            parameter="steering.strength",
        )


def _check_graded(order: GateOrder, edits: list[EditView]) -> None:
    for edit in edits:
        if order.is_graded and edit.minimum > 0:
            raise InvalidSpec(
                f"graded strengths begin at 0, and edit {edit.name!r} is certified from {edit.minimum} on",
                parameter="steering.graded",
            )
