"""A profile's share decides which of its requests are steered; those in its shadow are decided on, counted, and said to
be so.
"""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from server.effects import effect_of
from server.policy import Resolution, SteeringSpec, resolve
from server.rollout import Rollout, drawn
from steering.errors import EditNotApplied, UnsupportedConfiguration
from steering.outcome import Outcome
from steering.plan import Mode, Reasoning
from tests.fakes import (
    FakeEngine,
    make_bundle,
    make_catalog,
    make_gated_bundle,
    make_reading_bundle,
    read,
)
from tests.unit.server.conftest import Make, content_of, read_events, scrape, value

CATALOG = make_catalog(make_gated_bundle())
SHADOW = Rollout(shares={"*": 0.0})


def resolved(**fields: Any) -> Resolution:
    """A resolution against the gated bundle."""
    return resolve(SteeringSpec(**fields), CATALOG, plan_id="p")


def test_the_draw_is_fixed_by_the_request_and_even_over_many() -> None:
    """A request falls on the same side on every replica, and a share of a tenth steers a tenth."""
    draws = [drawn("refusal-control", f"{number:032x}") for number in range(20_000)]
    assert draws[7] == drawn("refusal-control", f"{7:032x}")
    assert all(0 <= draw < 1 for draw in draws)
    assert sum(draw < 0.1 for draw in draws) == pytest.approx(2000, abs=200)


def test_the_most_exact_name_gives_the_share() -> None:
    """Bundle and profile, then profile, then all; without any, every request is steered."""
    bundle = CATALOG.bundles[0]
    profile = bundle.profiles["refusal-control"]
    shares = {"*": 0.1, "refusal-control": 0.2, "gated-bundle/refusal-control": 0.3}
    for expected in (0.3, 0.2, 0.1, 1.0):
        assert Rollout(shares=shares).share(bundle, profile) == expected
        if shares:
            shares = dict(list(shares.items())[:-1])


def test_a_share_of_no_known_profile_is_refused_at_the_start(make: Make) -> None:
    """A misspelt name would leave the profile that was meant fully steered."""
    with pytest.raises(UnsupportedConfiguration, match=r"'refusal-contrl'.*profiles: .*refusal-control"):
        make(enforced_share={"refusal-contrl": 0.0})


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_a_share_steers_all_or_none_at_its_ends(share: float) -> None:
    """1 leaves every plan as it is, and 0 none."""
    plans = [Rollout(shares={"*": share}).apply(resolved(), f"{number}").plan for number in range(50)]
    assert {plan.gate.is_observed for plan in plans if plan and plan.gate} == {share == 0}


def test_the_shadow_of_a_gate_decides_and_edits_nothing() -> None:
    """Thresholds, categories and strength stay; reasoning does not matter where nothing is edited."""
    resolution = resolved(comply_below=0.1)
    assert resolution.plan is not None
    spared = structs.replace(resolution, plan=structs.replace(resolution.plan, reasoning=Reasoning.SPARED))
    shadow = SHADOW.apply(spared, "r")
    assert shadow.is_shadow
    assert shadow.plan is not None
    assert shadow.plan.gate is not None
    assert shadow.plan.gate == structs.replace(resolution.plan.gate, is_observed=True)  # type: ignore[arg-type]
    assert (shadow.plan.reasoning, shadow.plan.strength) == (Reasoning.EDITED, resolution.plan.strength)


def test_the_shadow_of_a_named_edit_sends_none() -> None:
    """What stays for the engine is to read the answer, where the bundle has a response probe."""
    assert SHADOW.apply(resolved(mode=Mode.REFUSE), "r").order is None
    reading = resolve(SteeringSpec(mode=Mode.REFUSE), make_catalog(make_reading_bundle()), plan_id="p")
    order = SHADOW.apply(reading, "r").order
    assert order is not None
    assert (order.id, order.edit, order.gate, order.response) == ("p", None, None, True)


def test_what_is_not_steered_anyway_has_no_shadow() -> None:
    """Mode off is no decision that was not carried out."""
    assert not SHADOW.apply(resolved(mode=Mode.OFF), "r").is_shadow


@pytest.mark.parametrize(
    "tampered",
    [
        {"applied": True, "edit": "refuse-safety", "strength": 1.0},
        {"edit": "refuse-safety"},
        {"applied": True},
        {"strength": 1.0},
        {"strength": float("nan")},
        {"decision": None},
        {"scores": None},
        {"error": "no row is free"},
    ],
)
def test_an_observed_gate_that_did_anything_is_not_believed(tampered: dict[str, Any]) -> None:
    """What was only to observe and edited all the same withholds the answer, as does one that did not decide."""
    shadow = SHADOW.apply(resolved(), "r")
    assert shadow.plan is not None
    honest = FakeEngine(scores=[read(0.95)])._apply(shadow.plan, 0)
    effect = effect_of(shadow, honest)
    assert (effect.decision, effect.applied, effect.is_shadow, effect.header) == (
        "refuse",
        False,
        True,
        "shadow:refuse",
    )
    with pytest.raises(EditNotApplied):
        effect_of(shadow, Outcome(**{**structs.asdict(honest), "scores": honest.scores, **tampered}))


def test_an_enforced_gate_may_not_only_observe() -> None:
    """The other way round it is no better: a decision that was not carried out withholds the answer."""
    shadow = SHADOW.apply(resolved(), "r")
    assert shadow.plan is not None
    with pytest.raises(EditNotApplied):
        effect_of(resolved(), FakeEngine(scores=[read(0.95)])._apply(shadow.plan, 0))


async def test_a_shadowed_answer_is_that_of_the_model_and_says_so(make: Make) -> None:
    """The gate would have complied: nothing is edited, and body, header and metrics tell the decision as a shadow's."""
    engine = FakeEngine(scores=[read(0.05)])
    spoken = make(engine, make_catalog(make_gated_bundle()), enforced_share={"refusal-control": 0})
    response = await spoken.chat()
    steering = response.json()["steering"]
    assert response.headers["x-trimtab-decision"] == "shadow:comply"
    assert (steering["applied"], steering["shadow"], steering["decision"]) == (False, True, "comply")
    assert (steering["edit"], steering["strength"], steering["scope"]) == (None, None, None)
    assert steering["verdict"]["refused"] is True  # the fake refuses unless it is steered
    assert engine.calls[-1].plan is not None
    found = await scrape(spoken)
    told = {"category": "Safety", "decision": "comply", "mode": "shadow"}
    assert value(found, "steering_decisions_total", **told) == 1
    assert value(found, "steering_decisions_total", mode="enforce") == 0
    assert value(found, "steering_outcomes_total", outcome="refusal", **told) == 1
    assert value(found, "steering_tokens_total", steered="true") == 0
    assert value(found, "steering_enforced_share", profile="refusal-control") == 0
    assert value(found, "steering_enforced_share", profile="manual") == 1
    assert value(found, "steering_unapplied_total") == 0


async def test_a_shadowed_stream_says_so_too(make: Make) -> None:
    """Header and last chunk."""
    spoken = make(FakeEngine(scores=[read(0.95)]), make_catalog(make_gated_bundle()), enforced_share={"*": 0})
    response = await spoken.chat(stream=True)
    assert response.headers["x-trimtab-decision"] == "shadow:refuse"
    events = read_events(response.text)
    assert events[-1]["steering"]["shadow"] is True
    assert content_of(events) == "Hello there!"


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_mode_that_a_client_names_is_shadowed_and_said_to_be(make: Make, is_stream: bool) -> None:
    """No plan reaches the engine, the answer is the model's own, and the decision is counted."""
    engine = FakeEngine()
    spoken = make(engine, make_catalog(make_bundle()), enforced_share={"*": 0})
    response = await spoken.chat(steering={"mode": "comply"}, stream=is_stream)
    assert response.headers["x-trimtab-decision"] == "shadow:comply"
    steering = (read_events(response.text)[-1] if is_stream else response.json())["steering"]
    assert (steering["applied"], steering["shadow"], steering["decision"]) == (False, True, "comply")
    assert engine.calls[-1].plan is None
    found = await scrape(spoken)
    assert value(found, "steering_decisions_total", decision="comply", category="Safety", mode="shadow") == 1


async def test_a_share_between_steers_some_and_leaves_others(make: Make) -> None:
    """Each request is wholly on one side, all of its samples alike."""
    spoken = make(FakeEngine(scores=[read(0.95)]), make_catalog(make_gated_bundle()), enforced_share={"*": 0.5})
    told = {(await spoken.chat(n=2)).headers["x-trimtab-decision"] for _ in range(40)}
    assert told == {"refuse", "shadow:refuse"}


async def test_a_shadow_that_fails_is_a_shadow_among_the_errors(make: Make) -> None:
    """Where the engine does not confirm that the gate looked, there is no answer."""
    engine = FakeEngine(confirms=False)
    spoken = make(engine, make_catalog(make_gated_bundle()), enforced_share={"*": 0})
    assert (await spoken.chat()).status_code == 500
    found = await scrape(spoken)
    assert value(found, "steering_outcomes_total", outcome="error", mode="shadow") == 1
    assert value(found, "steering_unapplied_total") == 1
