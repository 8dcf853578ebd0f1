"""Plans of profiles: what a bundle's profile asks of the engine, for those who run vLLM's own server.

The gateway resolves much more (`server.policy`); here a profile is taken as it is, or one of its sides is named. Knows
nothing of HTTP, models or vLLM.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from steering.bundle import Bundle
from steering.errors import InvalidSpec, NotSupported, UnknownName
from steering.manifest import Profile
from steering.plan import CategorySource, GateOrder, Mode, Plan, Reasoning, Scope


def plan_of_profile(
    bundle: Bundle,
    profile: str | None = None,
    *,
    mode: Mode | None = None,
    category: str | None = None,
    strength: float | None = None,
) -> Plan:
    """A fresh plan, with an id of its own; one for each request.

    Args:
        bundle: that the engine has loaded.
        profile: its name; the bundle's default if None.
        mode: `auto` has the gate decide, `refuse` and `comply` name a side; None is `auto` where there is a gate.
        category: of the edit where a side is named; the profile's default if None.
        strength: within the certified range of every edit that may be chosen; the profile's if None.

    Raises:
        UnknownName: there is no such profile, or its gate tells no such category.
        NotSupported: the profile has no gate, or no edit for that side and category; or its gate asks for the model's
            refusal tokens, which takes a pass of its own that the gateway makes.
        InvalidSpec: mode `off`, which is no plan at all, or a strength outside of the certified range.
    """
    manifest = bundle.manifest
    known = [each.name for each in manifest.profiles]
    name = manifest.default_profile if profile is None else profile
    if name not in known:
        raise UnknownName(f"no profile {name!r} in bundle {manifest.name!r}; it has {known}")
    chosen = manifest.profile(name)
    if mode is Mode.OFF:
        raise InvalidSpec("mode 'off' is no plan: send the request without one")
    if mode is None:
        if chosen.gate is None:
            raise InvalidSpec(f"name the side of profile {name!r}, 'refuse' or 'comply': it has no gate")
        mode = Mode.AUTO
    dose = chosen.strength if strength is None else strength
    if mode is Mode.AUTO:
        order = _order(chosen, category, bundle)
        _check_strength(bundle, dose, [*chosen.refuse.values(), *chosen.comply.values()])
        return Plan(
            id=secrets.token_hex(16),
            bundle=bundle.digest,
            gate=order,
            strength=dose,
            reasoning=Reasoning(chosen.reasoning),
        )
    edits = chosen.refuse if mode is Mode.REFUSE else chosen.comply
    category = chosen.default_category if category is None else category
    if category not in edits:
        raise NotSupported(
            f"profile {name!r} has no edit to {mode.value} category {category!r}; it has them for {sorted(edits)}"
        )
    _check_strength(bundle, dose, [edits[category]])
    return Plan(
        id=secrets.token_hex(16),
        bundle=bundle.digest,
        edit=edits[category],
        strength=dose,
        scope=Scope(chosen.scope),
        reasoning=Reasoning(chosen.reasoning),
    )


def _order(profile: Profile, category: str | None, bundle: Bundle) -> GateOrder:
    gate = profile.gate
    if gate is None:
        raise NotSupported(f"profile {profile.name!r} has no gate; name a side, 'refuse' or 'comply'")
    if gate.category_source is CategorySource.REFUSAL_TOKENS:
        raise NotSupported(
            f"the gate of profile {profile.name!r} goes by the model's refusal tokens, in a pass of its own: use "
            "`trimtab serve`"
        )
    known = bundle.probes[gate.probe].categories
    if category is not None and category not in known:
        raise UnknownName(f"the gate of profile {profile.name!r} has no category {category!r}; it has {list(known)}")
    return GateOrder(
        profile=profile.name,
        comply_below=gate.comply_below,
        refuse_above=gate.refuse_above,
        categories=None if category is None else (category,),
        is_graded=gate.is_graded,
    )


def _check_strength(bundle: Bundle, strength: float, names: Iterable[str]) -> None:
    records = {record.name: record for record in bundle.manifest.edits}
    for name in names:
        certified = records[name].strength
        if not certified.minimum <= strength <= certified.maximum:
            raise InvalidSpec(
                f"strength must be within {certified.minimum} and {certified.maximum}, for which edit {name!r} is "
                f"certified, got {strength}"
            )
