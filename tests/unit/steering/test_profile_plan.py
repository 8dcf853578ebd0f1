"""Plans of profiles: what a bundle's profile asks of the engine, without a gateway."""

from __future__ import annotations

from typing import Any

import pytest

from steering.bundle import Bundle
from steering.errors import InvalidSpec, NotSupported, TrimtabError, UnknownName
from steering.plan import GateOrder, Mode, Plan, Scope
from steering.profile_plan import plan_of_profile
from tests.samples import DIGEST, bundle_in_memory, random_edit, random_probe

CATEGORIES = ("safety", "politics")


@pytest.fixture
def bundle() -> Bundle:
    """Two edits; the default profile has no gate, `gated` has one and no edit that complies with politics."""
    edits = {name: random_edit(name, ranks={1: 1}) for name in ("up", "down")}
    probe = random_probe("prompt", layer=1, categories=CATEGORIES)
    gate = (probe, {"safety": "up", "politics": "up"}, {"safety": "down"})
    return bundle_in_memory(edits, gates={"gated": gate})


def test_a_side_is_the_profiles_edit_of_its_category(bundle: Bundle) -> None:
    """Names, dose and scope are the profile's; the id is new for each request, as outcomes go by it."""
    plan = plan_of_profile(bundle, "gated", mode=Mode.COMPLY)
    assert (plan.bundle, plan.edit, plan.gate, plan.strength, plan.scope) == (
        DIGEST,
        "down",
        None,
        1.0,
        Scope.GENERATED,
    )
    assert plan_of_profile(bundle, "gated", mode=Mode.REFUSE, category="politics", strength=1.5).edit == "up"
    assert plan.id != plan_of_profile(bundle, "gated", mode=Mode.COMPLY).id
    assert Plan.from_json(plan.to_json()) == plan


def test_a_gate_decides_where_no_side_is_named(bundle: Bundle) -> None:
    """With the profile's thresholds, among all categories or the one that is named."""
    plan = plan_of_profile(bundle, "gated")
    assert plan.edit is None
    assert plan.gate == GateOrder(profile="gated", comply_below=0.4, refuse_above=0.6)
    only = plan_of_profile(bundle, "gated", mode=Mode.AUTO, category="politics").gate
    assert only is not None
    assert only.categories == ("politics",)


@pytest.mark.parametrize(
    ("asked", "error", "told"),
    [
        ({"profile": "absent"}, UnknownName, "no profile 'absent' in bundle 'sample'; it has"),
        ({}, InvalidSpec, "name the side of profile 'default', 'refuse' or 'comply'"),
        ({"mode": Mode.OFF}, InvalidSpec, "mode 'off' is no plan"),
        ({"mode": Mode.AUTO}, NotSupported, "profile 'default' has no gate"),
        (
            {"profile": "gated", "mode": Mode.COMPLY, "category": "politics"},
            NotSupported,
            r"no edit to comply category 'politics'; it has them for \['safety'\]",
        ),
        (
            {"profile": "gated", "category": "weather"},
            UnknownName,
            "the gate of profile 'gated' has no category 'weather'",
        ),
        ({"profile": "gated", "strength": 2.5}, InvalidSpec, "strength must be within 0.0 and 2.0"),
        ({"profile": "gated", "strength": float("nan")}, InvalidSpec, "strength must be within"),
        ({"mode": Mode.REFUSE, "strength": -1.0}, InvalidSpec, "strength must be within"),
    ],
)
def test_what_the_profile_does_not_have_is_no_plan(
    bundle: Bundle, asked: dict[str, Any], error: type[TrimtabError], told: str
) -> None:
    """Each by a typed error that says what there is."""
    with pytest.raises(error, match=told):
        plan_of_profile(bundle, **asked)
