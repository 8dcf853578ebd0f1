"""Who may have what: every rule of permissions."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from server.access.caller import LOCAL, Permission
from server.errors import PermissionDenied
from server.policy import Report, SteeringSpec
from steering.plan import CategorySource, Mode, Scope
from tests.fakes import RESPOND, SAFETY, make_bundle, make_catalog, make_gated_bundle, make_reading_bundle
from tests.unit.server.permitted import CUSTOM, GATED, RELAX, SCORES, USE, caller, permitted

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


def test_what_may_be_asked_for_is_what_is_loaded_now() -> None:
    """What was worked out for a caller and a spec is not kept when the bundles, or the caller's permissions, change."""
    strict, lax = make_catalog(make_gated_bundle()), make_catalog(make_bundle())
    spec = SteeringSpec(mode=Mode.OFF)
    for _ in range(2):
        with pytest.raises(PermissionDenied, match="steer:relax"):
            permitted(caller(USE), spec, strict)
        assert not permitted(caller(USE), spec, lax).relaxes
        assert permitted(caller(USE, RELAX), spec, strict).relaxes


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
