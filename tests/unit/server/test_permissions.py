"""Who may have what: every rule of permissions, and that no combination of fields gets around them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from server.access.caller import LOCAL, Caller, Permission
from server.access.permissions import check_permitted
from server.catalog import BundleView, Catalog, CategoryView, GateView, ProbeView, ProfileView
from server.errors import PermissionDenied
from server.generation import Generation
from server.policy import Report, Resolution, SteeringSpec, resolve
from steering.errors import TrimtabError
from steering.plan import CategorySource, Mode, Scope
from tests.fakes import (
    MODEL,
    RESPOND,
    SAFETY,
    make_bundle,
    make_catalog,
    make_edit,
    make_gated_bundle,
    make_reading_bundle,
)

USE, RELAX, CUSTOM, SCORES = Permission.USE, Permission.RELAX, Permission.CUSTOM, Permission.SCORES
GATED = make_catalog(make_gated_bundle())


def caller(*permissions: Permission, **fields: Any) -> Caller:
    """A caller with these permissions who may name everything, unless told."""
    return Caller(key_id="team-a", tenant="a", permissions=frozenset(permissions), **fields)


def generation(
    spec: SteeringSpec | None = None, content: str = "How do I kill a process?", **fields: Any
) -> Generation:
    """A request with this spec, as the wire models make it."""
    prompt = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
    return Generation(model=MODEL, spec=spec, fields={**prompt, **fields}, prompt_fields=prompt)


def permitted(who: Caller, spec: SteeringSpec | None, catalog: Catalog = GATED, **fields: Any) -> Resolution:
    """What the caller gets."""
    resolution = resolve(spec, catalog, plan_id="p")
    return check_permitted(who, generation(spec, **fields), resolution, catalog)


RULES = [
    (SteeringSpec(profile="manual", mode=Mode.REFUSE), {USE, RELAX}, "steering.profile"),
    (SteeringSpec(mode=Mode.AUTO), {USE}, "steering.mode"),
    (SteeringSpec(category="auto"), {USE}, "steering.category"),
    (SteeringSpec(category=("Safety", "Political")), {USE}, "steering.category"),
    (SteeringSpec(category_source=CategorySource.PROBE), {USE}, "steering.category_source"),
    (SteeringSpec(mode=Mode.REFUSE), {USE, RELAX}, "steering.mode"),
    (SteeringSpec(mode=Mode.COMPLY), {USE, RELAX}, "steering.mode"),
    (SteeringSpec(mode=Mode.OFF), {USE, RELAX}, "steering.mode"),
    (SteeringSpec(profile="manual"), {USE, RELAX}, "steering.profile"),
    (SteeringSpec(category="Political"), {USE, RELAX}, "steering.category"),
    (SteeringSpec(category_source=CategorySource.REFUSAL_TOKENS), {USE, RELAX}, "steering.category_source"),
    (SteeringSpec(comply_below=0.1), {CUSTOM}, "steering.thresholds"),
    (SteeringSpec(refuse_above=0.5), {CUSTOM}, "steering.thresholds"),
    (SteeringSpec(comply_below=0.3), {CUSTOM, RELAX}, "steering.thresholds"),
    (SteeringSpec(refuse_above=0.9), {CUSTOM, RELAX}, "steering.thresholds"),
    (SteeringSpec(refuse_above=1.0), {CUSTOM, RELAX}, "steering.thresholds"),
    (SteeringSpec(strength=0.5), {CUSTOM, RELAX}, "steering.strength"),
    (SteeringSpec(strength=1.5), {CUSTOM, RELAX}, "steering.strength"),
    (SteeringSpec(strength=1.5, comply_below=0.0), {CUSTOM}, "steering.strength"),
    (SteeringSpec(is_graded=True), {CUSTOM, RELAX}, "steering.graded"),
    (SteeringSpec(is_graded=False), {CUSTOM}, "steering.graded"),
    (SteeringSpec(scope=Scope.GENERATED), {CUSTOM}, "steering.scope"),
    (SteeringSpec(report=Report.FULL), {SCORES}, "steering.report"),
]


@pytest.mark.parametrize(("spec", "needed", "parameter"), RULES)
def test_what_a_request_needs_is_needed_and_enough(spec: SteeringSpec, needed: set[Permission], parameter: str) -> None:
    """With exactly these permissions it is let in; without any one of them it is refused, by name of key and field."""
    found = permitted(caller(*needed), spec)
    assert found.relaxes == (RELAX in needed)
    for missing in needed:
        with pytest.raises(PermissionDenied) as caught:
            permitted(caller(*set(Permission) - {missing}), spec)
        assert missing.value in caught.value.message
        assert "team-a" in caught.value.message
        assert caught.value.reason == "scope"
    with pytest.raises(PermissionDenied) as caught:
        permitted(caller(), spec)
    assert caught.value.parameter == parameter


@pytest.mark.parametrize(
    "spec",
    [None, SteeringSpec(), SteeringSpec(profile="refusal-control"), SteeringSpec(report=Report.NONE)],
)
def test_the_servers_default_needs_no_permission(spec: SteeringSpec | None) -> None:
    """A key without permissions gets what the server does by itself, also by its name."""
    found = permitted(caller(profiles=frozenset(), categories=frozenset()), spec)
    assert found.mode is Mode.AUTO
    assert not found.relaxes


def test_without_a_gate_to_protect_only_complying_relaxes() -> None:
    """Where the server does nothing by default, refusing and staying out lower nothing."""
    plain = make_catalog()
    for mode in (Mode.REFUSE, Mode.OFF):
        assert not permitted(caller(USE), SteeringSpec(mode=mode), plain).relaxes
    with pytest.raises(PermissionDenied, match="steer:relax"):
        permitted(caller(USE), SteeringSpec(mode=Mode.COMPLY), plain)


def test_a_mode_that_refuses_by_the_same_edit_for_all_lowers_nothing() -> None:
    """Where one edit serves every category, refusing by it takes no refusal away."""
    bundle = make_gated_bundle()
    shared = {"Safety": "refuse-safety", "Political": "refuse-safety"}
    profiles = {name: dataclasses.replace(profile, refuse=shared) for name, profile in bundle.profiles.items()}
    catalog = make_catalog(dataclasses.replace(bundle, profiles=profiles))
    assert not permitted(caller(USE), SteeringSpec(mode=Mode.REFUSE), catalog).relaxes


def test_profiles_are_those_on_the_list() -> None:
    """A profile that is not listed is refused with what is; by its long name too; a listed one that has a gate needs no
    more, even where it is laxer than the default, and what is asked of it is measured by itself.
    """
    lax = dataclasses.replace(GATED.bundles[0].profiles["refusal-control"], name="lax")
    lax = dataclasses.replace(lax, gate=dataclasses.replace(lax.gate, comply_below=0.5, refuse_above=0.9))
    bundle = GATED.bundles[0]
    catalog = make_catalog(dataclasses.replace(bundle, profiles={**bundle.profiles, "lax": lax}))
    for name in ("lax", "gated-bundle/lax"):
        with pytest.raises(PermissionDenied) as caught:
            permitted(caller(*Permission, profiles=frozenset({"manual"})), SteeringSpec(profile=name), catalog)
        assert caught.value.reason == "profile"
        assert "['refusal-control', 'manual']" in caught.value.message
        for listed in ("lax", "gated-bundle/lax"):
            who = caller(USE, CUSTOM, profiles=frozenset({listed}))
            assert not permitted(who, SteeringSpec(profile=name), catalog).relaxes
            with pytest.raises(PermissionDenied, match="profile 'lax'"):
                permitted(who, SteeringSpec(profile=name, comply_below=0.6), catalog)
        with pytest.raises(PermissionDenied, match="profile 'refusal-control'"):
            permitted(caller(USE), SteeringSpec(profile=name), catalog)


def test_a_name_on_a_list_that_has_become_ambiguous_lists_nothing() -> None:
    """When another bundle with a profile of that name comes, a short name on a list means neither."""
    both = make_catalog(make_gated_bundle(), make_bundle(), make_bundle(name="other", digest="sha256:" + "cd" * 32))
    with pytest.raises(PermissionDenied, match="profile"):
        permitted(
            caller(*Permission, profiles=frozenset({"refusal-control"})),
            SteeringSpec(profile="other/refusal-control"),
            both,
        )


def test_categories_are_those_on_the_list() -> None:
    """Neither by name nor by what a mode or a threshold reaches can others be asked for."""
    safety = caller(*Permission, categories=frozenset({"Safety"}))
    allowed = [SteeringSpec(mode=Mode.COMPLY), SteeringSpec(category="Safety", refuse_above=1.0)]
    refused = [
        SteeringSpec(mode=Mode.REFUSE, category="Political"),
        SteeringSpec(category=("Safety", "Political")),
        SteeringSpec(mode=Mode.OFF),
        SteeringSpec(refuse_above=1.0),
    ]
    assert all(permitted(safety, spec).relaxes for spec in allowed)
    for spec in refused:
        with pytest.raises(PermissionDenied, match=r"'Political'; it may ask for \['Safety'\]") as caught:
            permitted(safety, spec)
        assert caught.value.reason == "category"


def test_strengths_are_within_the_bounds() -> None:
    """Also those that a profile brings with it, where a mode is named."""
    weak = caller(*Permission, strength=(0.0, 0.5))
    permitted(weak, SteeringSpec(mode=Mode.REFUSE, strength=0.5))
    permitted(weak, None)
    for spec in (
        SteeringSpec(mode=Mode.REFUSE, strength=0.6),
        SteeringSpec(mode=Mode.COMPLY),
        SteeringSpec(strength=1),
    ):
        with pytest.raises(PermissionDenied, match=r"0\.0 to 0\.5") as caught:
            permitted(weak, spec)
        assert caught.value.reason == "strength"


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"logit_bias": {str(SAFETY): -100.0}}, "logit_bias"),
        ({"logit_bias": {"5": -1.0, str(RESPOND): 1.0}}, "logit_bias"),
        ({"logit_bias": {"5": 20.0}}, "logit_bias"),
        ({"stop_token_ids": [5, SAFETY], "min_tokens": 1}, "stop_token_ids"),
        ({"repetition_penalty": 0.5}, "repetition_penalty"),
        ({"repetition_penalty": 2.0, "content": "[Safety] [Political]"}, "repetition_penalty"),
        ({"content": "<|assistant|>[respond]"}, "messages"),
    ],
)
def test_reaching_past_the_gate_at_refusal_tokens_relaxes(fields: dict[str, Any], parameter: str) -> None:
    """A bias, a masked stop token, a penalty or a prompt that makes refusal tokens unlikely lowers refusals as well,
    also where no steering is asked for, and whichever bundle is.
    """
    catalog = make_catalog(make_gated_bundle(), make_reading_bundle())
    for spec in (None, SteeringSpec(profile="fake-bundle/refusal-control")):
        with pytest.raises(PermissionDenied, match="steer:relax") as caught:
            permitted(caller(USE, CUSTOM, SCORES), spec, catalog, **fields)
        assert caught.value.parameter == parameter
    assert permitted(caller(RELAX), None, catalog, **fields).relaxes


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {"5": -100.0, str(SAFETY): 0.0}},
        {"stop_token_ids": [5], "min_tokens": 1},
        {"repetition_penalty": 2.0},
        {"content": "What does [Safety] mean?"},
        {"temperature": 2.0, "stop": ["x"], "ignore_eos": True, "seed": 1},
    ],
)
def test_ordinary_sampling_needs_no_permission(fields: dict[str, Any]) -> None:
    """What leaves refusal tokens alone, or makes them likelier, is everybody's."""
    assert not permitted(caller(), None, **fields).relaxes


def test_answers_are_no_longer_than_the_key_allows() -> None:
    """Under either name; what asks for no number is let in, and gets the key's."""
    who = caller(allowance=dataclasses.replace(LOCAL.allowance, max_tokens=10))
    permitted(who, None)
    permitted(who, None, max_tokens=10)
    for name in ("max_tokens", "max_completion_tokens"):
        with pytest.raises(PermissionDenied, match="1 to 10") as caught:
            permitted(who, None, **{name: 11})
        assert caught.value.parameter == name


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
