"""From what a client asked to what the engine is to do."""

from __future__ import annotations

import pytest

from server.policy import Report, SteeringSpec, resolve
from steering.errors import BundleFormatError, InvalidSpec, NotSupported, TrimtabError, UnknownName
from steering.plan import CategorySource, Mode, Scope
from tests.fakes import DIGEST, make_bundle, make_catalog

OTHER = make_bundle(name="other", digest="sha256:" + "cd" * 32)


def test_no_field_means_off() -> None:
    """A request without a steering field is left alone, under the default profile."""
    found = resolve(None, make_catalog(), plan_id="p")
    assert (found.mode, found.plan, found.category) == (Mode.OFF, None, None)
    assert found.profile.name == "refusal-control"


def test_profile_alone_means_the_default_mode() -> None:
    """Naming a profile without a mode does not steer where the profile has no gate."""
    assert resolve(SteeringSpec(profile="refusal-control"), make_catalog(), plan_id="p").plan is None


@pytest.mark.parametrize(("mode", "edit"), [(Mode.REFUSE, "refuse-safety"), (Mode.COMPLY, "comply-safety")])
def test_mode_chooses_the_side(mode: Mode, edit: str) -> None:
    """The mode picks the edit; strength and scope come from the profile."""
    found = resolve(SteeringSpec(mode=mode), make_catalog(), plan_id="p")
    assert found.plan is not None
    assert (found.plan.id, found.plan.bundle, found.plan.edit) == ("p", DIGEST, edit)
    assert (found.plan.strength, found.plan.scope) == (1.0, Scope.GENERATED)
    assert found.category == "Safety"


def test_client_overrides_category_strength_scope_and_report() -> None:
    """What a client names goes before the profile's defaults."""
    spec = SteeringSpec(mode=Mode.REFUSE, category="Political", strength=1.5, scope=Scope.ALL, report=Report.NONE)
    found = resolve(spec, make_catalog(), plan_id="p")
    assert found.plan is not None
    assert (found.plan.edit, found.plan.strength, found.plan.scope) == ("refuse-political", 1.5, Scope.ALL)
    assert (found.category, found.report) == ("Political", Report.NONE)


def test_category_auto_is_the_profiles_default() -> None:
    """Without a gate `auto` leaves the category to the profile."""
    assert resolve(SteeringSpec(mode=Mode.COMPLY, category="auto"), make_catalog(), plan_id="p").category == "Safety"


@pytest.mark.parametrize(
    ("spec", "error", "parameter", "words"),
    [
        (SteeringSpec(profile="nope"), UnknownName, "steering.profile", "refusal-control"),
        (SteeringSpec(profile="../../etc/passwd"), UnknownName, "steering.profile", "refusal-control"),
        (SteeringSpec(mode=Mode.REFUSE, category="safety"), UnknownName, "steering.category", "Safety"),
        (SteeringSpec(mode=Mode.OFF, category="nope"), UnknownName, "steering.category", "Political"),
        (SteeringSpec(mode=Mode.COMPLY, category="Political"), NotSupported, "steering.category", "Safety"),
        (SteeringSpec(mode=Mode.AUTO), NotSupported, "steering.mode", "gate"),
        (SteeringSpec(refuse_above=0.9), NotSupported, "steering.thresholds", "gate"),
        (SteeringSpec(report=Report.FULL), NotSupported, "steering.report", "gate"),
        (SteeringSpec(is_graded=True), NotSupported, "steering.graded", "gate"),
        (
            SteeringSpec(category_source=CategorySource.PROBE),
            NotSupported,
            "steering.category_source",
            "no loaded bundle",
        ),
        (SteeringSpec(mode=Mode.REFUSE, category=("Safety",)), InvalidSpec, "steering.category", "mode 'auto'"),
        (SteeringSpec(mode=Mode.REFUSE, strength=2.5), InvalidSpec, "steering.strength", "0.0 to 2.0"),
        (SteeringSpec(mode=Mode.REFUSE, strength=1e308), InvalidSpec, "steering.strength", "0.0 to 2.0"),
    ],
)
def test_refusals_name_the_field_and_what_there_is(
    spec: SteeringSpec, error: type[TrimtabError], parameter: str, words: str
) -> None:
    """Every refusal names the field at fault and what would have been possible."""
    with pytest.raises(error) as caught:
        resolve(spec, make_catalog(), plan_id="p")
    assert caught.value.parameter == parameter
    assert words in caught.value.message


def test_same_profile_in_two_bundles_must_be_qualified() -> None:
    """A short name that two bundles have is refused; `bundle/profile` is taken."""
    catalog = make_catalog(make_bundle(), OTHER)
    with pytest.raises(UnknownName, match="several bundles"):
        resolve(SteeringSpec(profile="refusal-control"), catalog, plan_id="p")
    found = resolve(SteeringSpec(profile="other/refusal-control", mode=Mode.REFUSE), catalog, plan_id="p")
    assert found.plan is not None
    assert found.plan.bundle == OTHER.digest


def test_catalog_refuses_bundles_of_one_name_and_no_bundle() -> None:
    """Names must tell bundles apart, and a server without one has nothing to offer."""
    with pytest.raises(BundleFormatError):
        make_catalog(make_bundle(), make_bundle())
    with pytest.raises(BundleFormatError):
        type(make_catalog())(bundles=())
