"""Permissions: whether a caller may have what a request resolves to.

Whatever can make the model refuse less than it would by the server's default needs `steer:relax`, however it is asked
for. Knows nothing of HTTP, files, vLLM or torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NoReturn

from msgspec import structs

from server.access.caller import MOST_TOKENS, Caller, Permission
from server.access.refusal_tokens import touch_of
from server.access.relaxation import lowered
from server.catalog import BundleView, Catalog, ProfileView
from server.errors import PermissionDenied
from server.generation import Generation
from server.policy import AUTO_CATEGORY, Report, Resolution, SteeringSpec, resolve
from steering.errors import NotSupported, UnknownName
from steering.plan import Mode


def check_permitted(caller: Caller, generation: Generation, resolution: Resolution, catalog: Catalog) -> Resolution:
    """The resolution, where this caller may have it; `relaxes` says whether that must be on record.

    Args:
        caller: who asks.
        generation: for what.
        resolution: what `resolve` makes of its spec.
        catalog: what is loaded.

    Raises:
        PermissionDenied: names the field, the key, what it lacks and what it may ask for.
        NotSupported: a salt of its own from a caller without a tenant to keep it apart from others' in.
    """
    _check_salt(caller, generation)
    _check_length(caller, generation)
    touch = touch_of(generation, catalog)
    if touch is not None:
        require(caller, Permission.RELAX, touch.what, parameter=touch.parameter)
    lowers = generation.spec is not None and _may_lower(caller, generation.spec, catalog)
    relaxes = lowers or touch is not None
    is_discreet = Permission.SCORES not in caller.permissions
    if (relaxes, is_discreet) == (resolution.relaxes, resolution.is_discreet):
        return resolution
    return structs.replace(resolution, relaxes=relaxes, is_discreet=is_discreet)


@functools.lru_cache(maxsize=1024)
def _may_lower(caller: Caller, spec: SteeringSpec, catalog: Catalog) -> bool:
    """Whether what a spec asks for can lower refusals, where this caller may have it. No prompt is needed.

    Raises:
        PermissionDenied: see `check_permitted`.
    """
    resolution = resolve(spec, catalog, plan_id="none")
    _check_names(caller, spec, resolution, catalog)
    _check_numbers(caller, spec, resolution)
    if spec.report is Report.FULL:
        require(caller, Permission.SCORES, "report 'full', which tells what probes read,", parameter="steering.report")
    return _check_lowered(caller, spec, resolution, catalog)


def check_permitted_to_probe(caller: Caller, generation: Generation, resolution: Resolution, catalog: Catalog) -> None:
    """Refuse a caller that may not read what the gate of a profile makes of a prompt.

    Raises:
        PermissionDenied, NotSupported: as `check_permitted`.
    """
    _check_salt(caller, generation)
    require(caller, Permission.SCORES, "reading scores")
    if (resolution.bundle, resolution.profile) != catalog.default:
        _check_profile(caller, resolution, catalog)


def profiles_of(caller: Caller, catalog: Catalog) -> list[str]:
    """Names of the profiles that a caller may ask for."""
    return [name for name in catalog.profile_names if _may_name(caller, name, catalog)]


def require(caller: Caller, permission: Permission, what: str, *, parameter: str | None = None) -> None:
    """Refuse a caller that lacks a permission.

    Args:
        caller: who asks.
        permission: that is needed.
        what: is asked for, as the subject of "needs".
        parameter: field that asks for it.

    Raises:
        PermissionDenied: it is lacking.
    """
    if permission in caller.permissions:
        return
    has = sorted(granted.value for granted in caller.permissions) or "no permissions"
    raise PermissionDenied(
        f"{what} needs permission {permission.value!r}, and key {caller.key_id!r} has {has}; leave it out, or ask the "
        "operator for a key with it",
        parameter=parameter,
        reason="scope",
    )


def _check_salt(caller: Caller, generation: Generation) -> None:
    if generation.cache_salt is not None and caller.tenant is None:
        raise NotSupported(
            "cache_salt is not accepted: the prefix cache is kept apart by the server, which merges a salt with the "
            "tenant of an API key; this request has none",
            parameter="cache_salt",
        )


def _check_length(caller: Caller, generation: Generation) -> None:
    most = caller.allowance.max_tokens
    for name in MOST_TOKENS:
        asked = generation.fields.get(name)
        if most is not None and asked is not None and asked > most:
            raise PermissionDenied(
                f"{name} {asked} is more than key {caller.key_id!r} may have in one answer; it may have 1 to {most}",
                parameter=name,
                reason="tokens",
            )


def _check_names(caller: Caller, spec: SteeringSpec, resolution: Resolution, catalog: Catalog) -> None:
    """What is asked for by name: a profile, a mode, categories and who tells them."""
    is_default = (resolution.bundle, resolution.profile) == catalog.default
    asked = {
        "steering.profile": None if is_default else f"profile {spec.profile!r}",
        "steering.mode": None if spec.mode is None else f"mode {spec.mode.value!r}",
        "steering.category": None if spec.category is None else "a category",
        "steering.category_source": None if spec.category_source is None else "category_source",
    }
    for parameter, what in asked.items():
        if what is not None:
            require(caller, Permission.USE, what, parameter=parameter)
    if not is_default:
        _check_profile(caller, resolution, catalog)
    if spec.category is not None and spec.category != AUTO_CATEGORY:
        named = (spec.category,) if isinstance(spec.category, str) else spec.category
        _check_categories(caller, named)


def _may_name(caller: Caller, name: str, catalog: Catalog) -> bool:
    bundle, profile = catalog.profile(name)
    if (bundle, profile) == catalog.default:
        return True
    is_listed = caller.profiles is None or any(_is_it(each, bundle, profile, catalog) for each in caller.profiles)
    return is_listed and Permission.USE in caller.permissions


def _check_profile(caller: Caller, resolution: Resolution, catalog: Catalog) -> None:
    if caller.profiles is not None and not _is_listed(caller.profiles, resolution, catalog):
        allowed = [catalog.default[1].name, *sorted(caller.profiles)]
        _refuse_name(caller, "profile", f"{resolution.profile.name!r}", allowed)


def _check_numbers(caller: Caller, spec: SteeringSpec, resolution: Resolution) -> None:
    """What is set by oneself: strength, thresholds, scope, grading."""
    asked = {
        "steering.strength": spec.strength,
        "steering.thresholds": spec.comply_below if spec.comply_below is not None else spec.refuse_above,
        "steering.scope": spec.scope,
        "steering.graded": spec.is_graded,
    }
    for parameter, value in asked.items():
        if value is not None:
            require(caller, Permission.CUSTOM, parameter.removeprefix("steering."), parameter=parameter)
    names_side = spec.mode in (Mode.REFUSE, Mode.COMPLY)
    if caller.strength is None or resolution.plan is None or (spec.strength is None and not names_side):
        return
    (least, most), strength = caller.strength, resolution.plan.strength
    if not least <= strength <= most:
        given = "" if spec.strength is not None else f", which is that of profile {resolution.profile.name!r},"
        raise PermissionDenied(
            f"strength {strength}{given} is outside of what key {caller.key_id!r} may ask for: {least} to {most}",
            parameter="steering.strength",
            reason="strength",
        )


def _check_lowered(caller: Caller, spec: SteeringSpec, resolution: Resolution, catalog: Catalog) -> bool:
    """Whether this can lower refusals, which the caller may then do."""
    otherwise = _otherwise(caller, resolution, catalog)
    categories = lowered(resolution, otherwise)
    if not categories:
        return False
    parameter, what = _what_lowers(spec)
    told = f"for {sorted(categories)}" if len(categories) <= 8 else f"for {len(categories)} categories"
    require(
        caller,
        Permission.RELAX,
        f"{what}, which can lower refusals below those of profile {otherwise.profile.name!r} {told},",
        parameter=parameter,
    )
    if resolution.mode is Mode.OFF:
        _check_categories(caller, categories)
    elif resolution.mode is Mode.AUTO:
        order, gate = resolution.plan.gate if resolution.plan else None, resolution.profile.gate
        assert order is not None
        assert gate is not None
        _check_categories(caller, order.categories or gate.probe.categories)
    else:
        _check_categories(caller, [resolution.category] if resolution.category else ())
    return True


def _otherwise(caller: Caller, resolution: Resolution, catalog: Catalog) -> Resolution:
    """What refusals must not fall below: the server's default; or, where the operator lists a profile that has a gate
    for this key, that profile as it is.
    """
    is_listed = caller.profiles is not None and _is_listed(caller.profiles, resolution, catalog)
    name = None
    if resolution.profile.gate is not None and is_listed:
        name = f"{resolution.bundle.name}/{resolution.profile.name}"
    return resolve(SteeringSpec(profile=name), catalog, plan_id="none")


def _what_lowers(spec: SteeringSpec) -> tuple[str, str]:
    """The field that is most likely at fault, and what it asks for."""
    asked = {
        "steering.mode": None if spec.mode is None else f"mode {spec.mode.value!r}",
        "steering.thresholds": None if (spec.comply_below, spec.refuse_above) == (None, None) else "thresholds",
        "steering.category": None if spec.category is None else "category",
        "steering.category_source": None if spec.category_source is None else "category_source",
        "steering.strength": None if spec.strength is None else f"strength {spec.strength}",
        "steering.graded": None if spec.is_graded is None else "graded",
        "steering.profile": f"profile {spec.profile!r}",
    }
    return next((parameter, what) for parameter, what in asked.items() if what is not None)


def _check_categories(caller: Caller, categories: Iterable[str]) -> None:
    """Those whose edits are asked for, or given up, must be on the key's list."""
    if caller.categories is None:
        return
    for category in categories:
        if category not in caller.categories:
            _refuse_name(caller, "category", f"{category!r}", sorted(caller.categories))


def _refuse_name(caller: Caller, kind: str, name: str, allowed: list[str]) -> NoReturn:
    raise PermissionDenied(
        f"key {caller.key_id!r} may not ask for {kind} {name}; it may ask for {allowed}",
        parameter=f"steering.{kind}",
        reason=kind,
    )


def _is_listed(names: Iterable[str], resolution: Resolution, catalog: Catalog) -> bool:
    """Whether an allow-list has the profile; names on it mean what they mean in a request."""
    return any(_is_it(name, resolution.bundle, resolution.profile, catalog) for name in names)


def _is_it(name: str, bundle: BundleView, profile: ProfileView, catalog: Catalog) -> bool:
    try:
        found, named = catalog.profile(name)
    except UnknownName:
        return False
    return found.digest == bundle.digest and named.name == profile.name
