"""Roster: a closed bundle is named by nobody new, kept for those accepted before, and released once, after the last."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from steering.engine.roster import BundleNames, Roster
from steering.errors import InvalidSpec, UnknownName
from steering.plan import Plan, Reasoning
from tests.samples import bundle_in_memory, gate_plan, plan_for, random_edit, random_probe

NAMES = BundleNames(edits=frozenset({"e"}), gates={"g": frozenset({"x", "y"})}, has_response=True)


def roster() -> Roster:
    """One bundle, `one`, that is open."""
    return Roster({"one": NAMES})


def test_names_of_a_bundle_cross_processes_as_they_are() -> None:
    """Edits, gates with categories, the response probe and sparing, there and back."""
    probe = random_probe("p", layer=1, categories=("x", "y"))
    reader = random_probe("r", layer=1, categories=())
    bundle = bundle_in_memory(
        {"e": random_edit("e", ranks={1: 1})}, gates={"g": (probe, {"x": "e"}, {})}, response=(reader, 2)
    )
    assert BundleNames.of(bundle) == NAMES
    assert BundleNames.from_fields(NAMES.to_fields()) == NAMES
    sparing = BundleNames.of(bundle_in_memory(dict(bundle.edits), reasoning_end=7))
    assert sparing.is_sparing
    assert BundleNames.from_fields(sparing.to_fields()) == sparing


@pytest.mark.parametrize(
    "plan",
    [
        plan_for("e", bundle="other"),
        plan_for("f", bundle="one"),
        gate_plan("h", bundle="one"),
        gate_plan("g", bundle="one", categories=("x", "z")),
        replace(plan_for("e", bundle="one"), reasoning=Reasoning.SPARED),
    ],
    ids=["bundle", "edit", "gate", "category", "reasoning"],
)
def test_a_name_that_no_open_bundle_has_is_refused(plan: Plan) -> None:
    """Each kind of name; the good ones pass."""
    with pytest.raises(UnknownName):
        roster().check(plan)
    for good in (plan_for("e", bundle="one", response=True), gate_plan("g", bundle="one", categories=("x",))):
        roster().check(good)


def test_a_bundle_is_released_after_its_last_request_and_once() -> None:
    """However many are accepted, counted twice or not; requests of others do not hold it."""
    held = roster()
    held.obey("open", "two", NAMES.to_fields())
    for request, digest in (("a", "one"), ("b", "one"), ("b", "one"), ("c", "two")):
        held.accept(request, digest)
    assert held.obey("close", "one")
    with pytest.raises(UnknownName, match="one is being unloaded"):
        held.check(plan_for("e", bundle="one"))
    held.end(["a", "unsteered"])
    assert not held.has_released
    held.end(["b"])
    held.end(["b"])
    assert held.has_released
    assert held.take_released() == ("one",)
    assert not held.has_released
    assert held.take_released() == ()
    with pytest.raises(UnknownName, match="one is not loaded"):
        held.check(plan_for("e", bundle="one"))
    held.check(plan_for("e", bundle="two"))


def test_a_bundle_nobody_names_is_released_at_once() -> None:
    """Closed twice, it is still told once."""
    held = roster()
    assert [held.obey("close", "one"), held.obey("close", "one")] == [True, True]
    assert held.take_released() == ("one",)
    assert held.obey("close", "one") is False


def test_a_plan_that_was_well_is_looked_at_again_after_an_order() -> None:
    """The one object that many requests share is refused once its bundle is closed, and well again when it is back."""
    held, plan = roster(), plan_for("e", bundle="one")
    for _ in range(2):
        held.check(plan)
        held.obey("close", "one")
        with pytest.raises(UnknownName, match="is being unloaded"):
            held.check(plan)
        held.obey("revive", "one")
    held.check(plan)


def test_a_closed_bundle_is_revived_until_it_is_released() -> None:
    """Then its requests go on counting; afterwards it has to be loaded anew."""
    held = roster()
    held.accept("a", "one")
    held.obey("close", "one")
    assert held.obey("revive", "one")
    held.end(["a"])
    assert not held.has_released
    held.check(plan_for("e", bundle="one"))
    held.obey("close", "one")
    held.take_released()
    assert held.obey("revive", "one") is False
    assert held.obey("revive", "never there") is False


def test_other_orders_are_refused() -> None:
    """By what was asked; an order to open names what there is."""
    for order in ("drop", "open"):
        with pytest.raises(InvalidSpec, match=order):
            roster().obey(order, "two")
