"""Leniency without `steer:relax`: no combination of fields of whichever bundles gets around the permissions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from hypothesis import event, given, settings
from hypothesis import strategies as st

from server.access.permissions import check_permitted
from server.catalog import BundleView, Catalog, CategoryView, GateView, ProbeView, ProfileView
from server.errors import PermissionDenied
from server.policy import Resolution, SteeringSpec, resolve
from steering.errors import TrimtabError
from steering.plan import CategorySource, Mode, Scope
from tests.fakes import make_edit
from tests.unit.server.permitted import CUSTOM, SCORES, USE, caller, generation


class Prompted(NamedTuple):
    """What would be done to one prompt: a side (1 refuse, 0 neither, -1 comply), by which edit, how strongly."""

    side: int
    edit: object
    strength: float


class Prompt(NamedTuple):
    """A prompt as probes and refusal tokens see it: refusal probability, and categories from the likeliest on."""

    refusal: float
    by_probe: Sequence[str]
    by_tokens: Sequence[str]


def done(resolution: Resolution, prompt: Prompt) -> Prompted:
    """The rule of design §3, written out once more."""
    plan, profile = resolution.plan, resolution.profile
    if plan is None:
        return Prompted(0, None, 0.0)
    if plan.gate is None:
        side = 1 if resolution.mode is Mode.REFUSE else -1
        return Prompted(side, (plan.bundle, profile.name, plan.edit, plan.scope), plan.strength)
    order = plan.gate
    assert profile.gate is not None
    ranking = prompt.by_probe if resolution.category_source is CategorySource.PROBE else prompt.by_tokens
    allowed = order.categories or profile.gate.probe.categories
    category = next(name for name in ranking if name in allowed)
    side, edits, share = 0, {}, 1.0
    if prompt.refusal >= order.refuse_above and order.refuse_above < 1:
        side, edits = 1, profile.refuse
        share = (prompt.refusal - order.refuse_above) / (1 - order.refuse_above)
    elif prompt.refusal <= order.comply_below and order.comply_below > 0:
        side, edits = -1, profile.comply
        share = (order.comply_below - prompt.refusal) / order.comply_below
    if category not in edits:
        return Prompted(0, None, 0.0)
    strength = plan.strength * (share if order.is_graded else 1.0)
    return Prompted(side, (plan.bundle, profile.name, edits[category], plan.scope), strength)


def is_worse(new: Prompted, old: Prompted) -> bool:
    """Whether `new` may refuse less than `old`; two different edits cannot be compared."""
    if new.side != old.side:
        return new.side < old.side
    if new.side == 0:
        return False
    return new.edit != old.edit or new.side * (old.strength - new.strength) > 1e-6


CATEGORIES = ("A", "B", "C")
probabilities = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]) | st.floats(0, 1)


@st.composite
def edits_by_category(draw: st.DrawFn, purpose: str) -> dict[str, str]:
    """Some categories with an edit of their own or a shared one."""
    names = st.sampled_from([f"{purpose}-{name}" for name in (*CATEGORIES, "shared")])
    return draw(st.dictionaries(st.sampled_from(CATEGORIES), names, max_size=3))


@st.composite
def profiles(draw: st.DrawFn, name: str) -> ProfileView:
    """A profile, most often with a gate."""
    low, high = sorted((draw(probabilities), draw(probabilities)))
    probe = draw(st.sampled_from([PROBE, dataclasses.replace(PROBE, name="another", layer=3)]))
    gate = GateView(
        probe=probe,
        comply_below=low,
        refuse_above=high,
        is_graded=draw(st.booleans()),
        category_source=draw(st.sampled_from(CategorySource)),
    )
    return ProfileView(
        name=name,
        description="",
        refuse=draw(edits_by_category("refuse")),
        comply=draw(edits_by_category("comply")),
        default_category=draw(st.sampled_from(CATEGORIES)),
        strength=draw(st.sampled_from([0.5, 1.0, 2.0])),
        scope=draw(st.sampled_from(Scope)),
        gate=gate if draw(st.integers(0, 4)) else None,
    )


PROBE = ProbeView(name="prompt", layer=2, categories=CATEGORIES)


@st.composite
def catalogs(draw: st.DrawFn) -> Catalog:
    """A bundle of three profiles, and one of another bundle."""

    def bundle(name: str, digit: str, *names: str) -> BundleView:
        edits = [
            make_edit(f"{side}-{each}", side, each) for side in ("refuse", "comply") for each in (*CATEGORIES, "shared")
        ]
        return BundleView(
            name=name,
            version="1",
            label=name,
            digest="sha256:" + digit * 64,
            categories={
                each: CategoryView(name=each, token=f"[{each}]", token_id=10 + ord(each)) for each in CATEGORIES
            },
            edits={edit.name: edit for edit in edits},
            profiles={each: draw(profiles(each)) for each in names},
            default_profile=names[0],
        )

    return Catalog(bundles=(bundle("first", "a", "default", "listed", "unlisted"), bundle("second", "b", "foreign")))


names = st.none() | st.sampled_from(["default", "first/default", "listed", "unlisted", "foreign"])
strengths = st.none() | st.sampled_from([0.5, 1.0, 1.5, 2.0])
specs = st.builds(
    SteeringSpec,
    profile=names,
    mode=st.sampled_from([None, Mode.AUTO]),
    category=st.none() | st.none() | st.lists(st.sampled_from(CATEGORIES), min_size=1).map(tuple),
    category_source=st.sampled_from([None, None, *CategorySource]),
    strength=st.none() | strengths,
    comply_below=st.none() | probabilities,
    refuse_above=st.none() | probabilities,
    is_graded=st.sampled_from([None, None, True, False]),
    scope=st.sampled_from([None, Scope.GENERATED]),
) | st.builds(
    SteeringSpec,
    profile=names,
    mode=st.sampled_from([Mode.REFUSE, Mode.REFUSE, Mode.COMPLY, Mode.OFF]),
    category=st.sampled_from(["auto", *CATEGORIES]),
    strength=strengths,
    scope=st.none() | st.sampled_from(Scope),
)


def prompts(*resolutions: Resolution) -> Iterator[Prompt]:
    """Prompts on, beside and between all thresholds, of every category by every way of telling it."""
    orders = [each.plan.gate for each in resolutions if each.plan is not None and each.plan.gate is not None]
    marks = sorted({0.0, 1.0, *(mark for order in orders for mark in (order.comply_below, order.refuse_above))})
    at = {*marks, *((low + high) / 2 for low, high in pairwise(marks))}
    at |= {math.nextafter(mark, side) for mark in marks for side in (0.0, 1.0)}
    rotations = [CATEGORIES[start:] + CATEGORIES[:start] for start in range(3)]
    rotations += [tuple(reversed(each)) for each in rotations]
    for refusal in sorted(at):
        for by_probe in rotations:
            for by_tokens in rotations:
                yield Prompt(refusal, by_probe, by_tokens)


@settings(max_examples=250, deadline=None)
@given(catalog=catalogs(), spec=specs, data=st.data())
def test_nothing_that_is_let_in_without_relax_refuses_less(
    catalog: Catalog, spec: SteeringSpec, data: st.DataObject
) -> None:
    """Whatever is asked of whichever bundles: without `steer:relax` no prompt is treated more leniently than by the
    server's default, or by a gate that the operator listed; and what is refused for want of it could be.
    """
    lists = data.draw(st.sampled_from([None, frozenset({"listed", "second/foreign"})]))
    who = caller(USE, CUSTOM, SCORES, profiles=lists)
    try:
        resolution = resolve(spec, catalog, plan_id="p")
    except TrimtabError:
        return
    is_listed = lists is not None and resolution.profile.name in ("listed", "foreign")
    baseline = f"{resolution.bundle.name}/{resolution.profile.name}"
    has_own = is_listed and resolution.profile.gate is not None
    otherwise = resolve(SteeringSpec(profile=baseline if has_own else None), catalog, plan_id="p")
    same_probe = resolution.profile.gate == otherwise.profile.gate or not (
        resolution.profile.gate
        and otherwise.profile.gate
        and resolution.profile.gate.probe != otherwise.profile.gate.probe
    )
    lenient = [
        prompt
        for prompt in prompts(resolution, otherwise)
        if is_worse(done(resolution, prompt), done(otherwise, prompt))
    ]
    refusal: PermissionDenied | None = None
    try:
        check_permitted(who, generation(spec), resolution, catalog)
    except PermissionDenied as error:
        refusal = error
    event("let in" if refusal is None else f"refused: {refusal.reason}")
    if refusal is None:
        assert lenient == []
    elif refusal.reason == "scope" and same_probe:
        assert lenient != []
