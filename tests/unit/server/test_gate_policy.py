"""What a gate may be asked to decide, and what is refused before the engine sees it."""

from __future__ import annotations

import dataclasses

import pytest

from server.catalog import BundleView
from server.policy import Report, Resolution, SteeringSpec, resolve
from steering.errors import BundleFormatError, InvalidSpec, NotSupported, TrimtabError, UnknownName
from steering.plan import CategorySource, GateOrder, Mode, Scope
from tests.fakes import (
    DIGEST,
    GATED_DIGEST,
    POLITICAL,
    SAFETY,
    make_bundle,
    make_catalog,
    make_gated_bundle,
)


def resolved(spec: SteeringSpec | None = None, bundle: BundleView | None = None) -> Resolution:
    """A resolution against the gated bundle."""
    return resolve(spec, make_catalog(bundle or make_gated_bundle()), plan_id="p")


def order_of(resolution: Resolution) -> GateOrder:
    """The gate's part of the plan."""
    assert resolution.plan is not None
    assert resolution.plan.gate is not None
    return resolution.plan.gate


def with_edit(name: str, bundle: BundleView | None = None, **changes: float) -> BundleView:
    """The gated bundle with one edit changed."""
    bundle = bundle or make_gated_bundle()
    edit = dataclasses.replace(bundle.edits[name], **changes)
    return dataclasses.replace(bundle, edits={**bundle.edits, name: edit})


@pytest.mark.parametrize("spec", [None, SteeringSpec(), SteeringSpec(profile="refusal-control", mode=Mode.AUTO)])
def test_a_gate_is_the_default_of_its_profile(spec: SteeringSpec | None) -> None:
    """Who asks for nothing in particular gets the profile's own thresholds, over all of the probe's categories."""
    found = resolved(spec)
    assert found.mode is Mode.AUTO
    assert found.plan is not None
    assert (found.plan.bundle, found.plan.edit, found.plan.strength) == (GATED_DIGEST, None, 1.0)
    assert order_of(found) == GateOrder(profile="refusal-control", comply_below=0.2, refuse_above=0.6)
    assert (found.category, found.category_source, found.candidates) == (None, CategorySource.PROBE, {})


def test_a_profile_without_a_gate_stays_off_beside_one_that_has_one() -> None:
    """The default mode is the profile's own."""
    assert resolved(SteeringSpec(profile="manual")).mode is Mode.OFF
    found = resolve(None, make_catalog(make_bundle(), make_gated_bundle()), plan_id="p")
    assert (found.bundle.digest, found.mode) == (DIGEST, Mode.OFF)


def test_what_is_left_out_of_the_thresholds_is_the_profiles() -> None:
    """One threshold may be moved alone."""
    assert order_of(resolved(SteeringSpec(refuse_above=0.9))).comply_below == 0.2
    moved = order_of(resolved(SteeringSpec(comply_below=0.0, is_graded=True)))
    assert (moved.comply_below, moved.refuse_above, moved.is_graded) == (0.0, 0.6, True)


def test_allowed_categories_are_those_named_in_the_order_of_the_probe() -> None:
    """A name, a list, a list with repetitions; `auto` is all of them."""
    assert order_of(resolved(SteeringSpec(category="Political"))).categories == ("Political",)
    both = SteeringSpec(category=("Political", "Safety", "Political"))
    assert order_of(resolved(both)).categories is None
    assert order_of(resolved(SteeringSpec(category="auto"))).categories is None
    assert resolved(SteeringSpec(category="Political")).category == "Political"


def test_refusal_tokens_are_candidates_for_a_first_pass() -> None:
    """The model chooses among the tokens of the allowed categories; the plan is then narrowed to its choice."""
    found = resolved(SteeringSpec(category_source=CategorySource.REFUSAL_TOKENS))
    assert found.candidates == {SAFETY: "Safety", POLITICAL: "Political"}
    narrowed = found.narrowed("Political")
    assert order_of(narrowed).categories == ("Political",)
    assert (narrowed.category, narrowed.candidates) == ("Political", {})
    assert narrowed.plan is not None
    assert found.plan is not None
    assert narrowed.plan.id == found.plan.id


def test_one_allowed_category_needs_no_first_pass() -> None:
    """Where nothing is to be chosen the model is not asked."""
    spec = SteeringSpec(category_source=CategorySource.REFUSAL_TOKENS, category="Safety")
    assert resolved(spec).candidates == {}


def test_the_profile_may_ask_for_refusal_tokens_and_the_client_for_the_probe() -> None:
    """The client's word goes before the profile's."""
    bundle = make_gated_bundle(category_source=CategorySource.REFUSAL_TOKENS)
    assert resolved(None, bundle).candidates
    assert not resolved(SteeringSpec(category_source=CategorySource.PROBE), bundle).candidates


@pytest.mark.parametrize(
    ("spec", "error", "parameter", "words"),
    [
        (SteeringSpec(profile="manual", mode=Mode.AUTO), NotSupported, "steering.mode", "['refusal-control']"),
        (SteeringSpec(profile="manual", comply_below=0.1), NotSupported, "steering.thresholds", "['refusal-control']"),
        (SteeringSpec(profile="manual", is_graded=False), NotSupported, "steering.graded", "['refusal-control']"),
        (
            SteeringSpec(profile="manual", category_source=CategorySource.PROBE),
            NotSupported,
            "steering.category_source",
            "['refusal-control']",
        ),
        (SteeringSpec(profile="manual", report=Report.FULL), NotSupported, "steering.report", "['refusal-control']"),
        (SteeringSpec(scope=Scope.ALL), InvalidSpec, "steering.scope", "last prompt token"),
        (SteeringSpec(mode=Mode.REFUSE, refuse_above=0.9), InvalidSpec, "steering.thresholds", "mode 'refuse'"),
        (SteeringSpec(mode=Mode.OFF, comply_below=0.1), InvalidSpec, "steering.thresholds", "mode 'off'"),
        (SteeringSpec(mode=Mode.COMPLY, is_graded=True), InvalidSpec, "steering.graded", "mode 'comply'"),
        (
            SteeringSpec(mode=Mode.COMPLY, category_source=CategorySource.REFUSAL_TOKENS),
            InvalidSpec,
            "steering.category_source",
            "mode 'comply'",
        ),
        (SteeringSpec(mode=Mode.REFUSE, report=Report.FULL), InvalidSpec, "steering.report", "mode 'refuse'"),
        (SteeringSpec(mode=Mode.OFF, category=("Safety",)), InvalidSpec, "steering.category", "mode 'auto'"),
        (SteeringSpec(category="safety"), UnknownName, "steering.category", "Political"),
        (SteeringSpec(category=("Safety", "auto")), UnknownName, "steering.category", "'auto'"),
        (SteeringSpec(comply_below=0.7), InvalidSpec, "steering.thresholds", "0.6 (that of profile 'refusal-control')"),
        (SteeringSpec(refuse_above=0.1), InvalidSpec, "steering.thresholds", "refuse_above can be 0.2 to 1"),
        (SteeringSpec(comply_below=0.9, refuse_above=0.8), InvalidSpec, "steering.thresholds", "0.8 (given)"),
        (SteeringSpec(strength=2.5), InvalidSpec, "steering.strength", "0.0 to 2.0"),
    ],
)
def test_refusals_name_the_field_and_what_there_is(
    spec: SteeringSpec, error: type[TrimtabError], parameter: str, words: str
) -> None:
    """Each names the field at fault, what was given and what would have been possible."""
    with pytest.raises(error) as caught:
        resolved(spec)
    assert caught.value.parameter == parameter
    assert words in caught.value.message


def test_strength_must_suit_every_edit_the_gate_may_choose() -> None:
    """The narrowest one is named; edits of other categories, and of a side that is switched off, do not count."""
    bundle = with_edit("refuse-political", maximum=1.2)
    with pytest.raises(InvalidSpec, match=r"'refuse-political'.*0\.0 to 1\.2") as caught:
        resolved(SteeringSpec(strength=1.5), bundle)
    assert caught.value.parameter == "steering.strength"
    assert resolved(SteeringSpec(strength=1.5, category="Safety"), bundle).plan is not None
    assert resolved(SteeringSpec(strength=1.5, refuse_above=1.0), bundle).plan is not None
    with pytest.raises(InvalidSpec, match="refuse-political"):
        resolved(SteeringSpec(strength=1.5, comply_below=0.0), bundle)


def test_graded_needs_edits_that_are_certified_from_zero() -> None:
    """A graded strength can be as small as can be; asked for it is a 400, as a profile's setting no server starts."""
    bundle = with_edit("comply-safety", minimum=0.5)
    with pytest.raises(InvalidSpec, match=r"'comply-safety' is certified from 0\.5") as caught:
        resolved(SteeringSpec(is_graded=True), bundle)
    assert caught.value.parameter == "steering.graded"
    with pytest.raises(BundleFormatError, match=r"'comply-safety' is certified from 0\.5"):
        make_catalog(with_edit("comply-safety", make_gated_bundle(is_graded=True), minimum=0.5))


def test_a_category_the_probe_or_the_profile_does_not_know_is_refused() -> None:
    """A category of the bundle alone is not enough: the probe must tell it, and an edit must serve it."""
    gated = make_gated_bundle()
    gate = gated.profiles["refusal-control"].gate
    assert gate is not None
    probe = dataclasses.replace(gate.probe, categories=("Safety",))
    with pytest.raises(NotSupported, match=r"does not tell category 'Political'.*\['Safety'\]"):
        resolved(SteeringSpec(category="Political"), make_gated_bundle(probe=probe))
    profile = dataclasses.replace(gated.profiles["refusal-control"], refuse={"Safety": "refuse-safety"})
    with pytest.raises(NotSupported, match=r"no edit for \['Political'\].*\['Safety'\]"):
        resolved(SteeringSpec(category="Political"), dataclasses.replace(gated, profiles={profile.name: profile}))


def test_refusal_tokens_choose_among_categories_that_have_one() -> None:
    """A category without a token is left out; named by the client, or where none has one, it is refused."""
    gated = make_gated_bundle()
    untold = {
        name: dataclasses.replace(category, token=None, token_id=None) for name, category in gated.categories.items()
    }
    bundle = dataclasses.replace(gated, categories={**gated.categories, "Political": untold["Political"]})
    spec = SteeringSpec(category_source=CategorySource.REFUSAL_TOKENS)
    assert order_of(resolved(spec, bundle)).categories == ("Safety",)
    assert resolved(dataclasses.replace(spec, category="Safety"), bundle).plan is not None
    for asked, lacking in (
        (dataclasses.replace(spec, category=("Safety", "Political")), bundle),
        (spec, dataclasses.replace(gated, categories=untold)),
    ):
        with pytest.raises(NotSupported, match=r"'Political'\] do not have") as caught:
            resolved(asked, lacking)
        assert caught.value.parameter == "steering.category_source"
