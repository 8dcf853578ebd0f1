"""Answers of models without refusal tokens: the response probe tells, and never holds an answer up."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from server.readiness import self_check
from steering.errors import PluginNotArmed
from steering.plan import Reasoning
from tests.fakes import WORD, FakeEngine, make_bundle, make_catalog, make_gated_bundle, make_reading_bundle
from tests.unit.server.conftest import Make, Spoken, read_events

NOTHING = math.nan
REFUSED, ANSWERED = 3.0, 0.5
"""Log-odds above and below the bundle's threshold of 0.7; the second is above a half."""


@pytest.fixture
def reading(make: Make) -> Make:
    """Makes gateways whose model has no refusal tokens and whose bundle has a response probe."""

    def build(engine: FakeEngine | None = None, **settings: Any) -> Spoken:
        engine = engine or FakeEngine(answers=[REFUSED])
        engine.unsteered, engine.bundles = WORD, [make_reading_bundle()]
        return make(engine, make_catalog(make_reading_bundle()), **settings)

    return build


async def told(spoken: Spoken, *, stream: bool, **fields: Any) -> dict[str, Any]:
    """The steering object of an answer."""
    response = await spoken.chat(stream=stream, **fields)
    assert response.status_code == 200, response.text
    body = read_events(response.text)[-1] if stream else response.json()
    steering: dict[str, Any] = body["steering"]
    return steering


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", ["off", "refuse"])
@pytest.mark.parametrize(
    ("score", "refused", "detector"),
    [(REFUSED, True, "response_probe"), (ANSWERED, False, "response_probe"), (NOTHING, None, "none")],
)
async def test_the_probe_tells_of_every_answer(
    reading: Make, score: float, refused: bool | None, detector: str, mode: str, stream: bool
) -> None:
    """Steered or left alone: refused at or above the bundle's threshold; unknown, not answered, where nothing came."""
    engine = FakeEngine(answers=[score])
    steering = await told(reading(engine), stream=stream, steering={"mode": mode})
    assert steering["verdict"] == {"refused": refused, "category": None, "detector": detector}
    (call,) = engine.calls
    assert call.plan is not None
    assert call.plan.response
    assert call.plan.is_steering == (mode != "off")
    assert engine.forgotten == [call.plan.id]


@pytest.mark.parametrize("stream", [False, True])
async def test_full_report_carries_what_was_read(reading: Make, stream: bool) -> None:
    """Without any gate: the probability in four digits, of how many tokens, and the threshold."""
    steering = await told(reading(), stream=stream, steering={"report": "full"})
    assert steering["verdict"]["probability"] == round(1 / (1 + math.exp(-REFUSED)), 4)
    assert (steering["verdict"]["tokens"], steering["verdict"]["threshold"]) == (3, 0.7)


@pytest.mark.parametrize("stream", [False, True])
async def test_every_sample_has_a_verdict_of_its_own(reading: Make, stream: bool) -> None:
    """What was read of two samples is asked for once, at the end of both."""
    engine = FakeEngine(answers=[REFUSED, ANSWERED])
    steering = await told(reading(engine), stream=stream, n=2)
    assert engine.read == [call.plan.id for call in engine.calls if call.plan is not None]
    assert [verdict["refused"] for verdict in steering["verdicts"]] == [True, False]


@pytest.mark.parametrize("stream", [False, True])
async def test_of_an_answer_of_one_token_nothing_is_known(reading: Make, stream: bool) -> None:
    """It was never fed back: whether it refuses is unknown."""
    steering = await told(reading(FakeEngine()), stream=stream, max_tokens=1)
    assert steering["verdict"]["refused"] is None


async def test_metrics_count_by_detector(reading: Make) -> None:
    """Refusals and answers are counted under the probe's name, and what it could not read as unknown."""
    spoken = reading(FakeEngine(answers=[REFUSED, ANSWERED, NOTHING]))
    await spoken.chat(n=3, steering={"mode": "refuse"})
    exposition = (await spoken.admin.get("/metrics")).text
    for outcome, detector in (("refusal", "response_probe"), ("comply", "response_probe"), ("unknown", "none")):
        labels = f'category="Safety",decision="refuse",detector="{detector}",mode="enforce",outcome="{outcome}"'
        assert f"steering_outcomes_total{{{labels}}} 1.0" in exposition


async def test_refusal_tokens_come_first(make: Make) -> None:
    """A model that says it by a token is not read, even where the bundle has a probe."""
    bundle = make_bundle(response=make_reading_bundle().response)
    engine = FakeEngine(answers=[ANSWERED], bundles=[bundle])
    response = await make(engine, make_catalog(bundle)).chat()
    assert response.json()["steering"]["verdict"]["detector"] == "refusal_token"
    assert engine.calls[0].plan is None
    assert engine.read == []


async def test_the_description_names_the_probe(reading: Make) -> None:
    """`GET /v1/steering` says where it reads, how much, and from where on an answer counts as refused."""
    described = (await reading().client.get("/v1/steering")).json()
    assert described["reports"] == ["none", "decision", "full"]
    (bundle,) = described["bundles"]
    assert bundle["response_probe"] == {
        "name": "response",
        "layer": 3,
        "tokens": 4,
        "threshold": 0.7,
        "operating_points": [],
    }


async def test_a_probe_that_reads_nothing_keeps_the_server_from_starting() -> None:
    """Two tokens are generated, of which one is read; a worker without the probe is found before that."""
    catalog, bundle = make_catalog(make_reading_bundle()), make_reading_bundle()
    engine = FakeEngine(answers=[REFUSED], bundles=[bundle], unsteered=WORD)
    await self_check(engine, catalog)
    (call,) = [call for call in engine.calls if call.plan and not call.plan.is_steering]
    assert call.fields["min_tokens"] == call.fields["max_tokens"] == 2
    with pytest.raises(PluginNotArmed, match="read nothing finite at layer 3"):
        await self_check(FakeEngine(bundles=[bundle], unsteered=WORD), catalog)
    unarmed = FakeEngine(answers=[REFUSED], bundles=[bundle], report_changes={"responses": {}})
    with pytest.raises(PluginNotArmed, match="lacks the response probe 'response'"):
        await self_check(unarmed, catalog)


@pytest.mark.parametrize(("is_thinking", "told_of"), [(True, "edited"), (False, None)])
async def test_answers_say_whether_reasoning_was_edited(make: Make, is_thinking: bool, told_of: str | None) -> None:
    """Where the model reasons and something was edited; nothing is said where nothing was."""
    bundle = make_bundle(is_thinking=is_thinking)
    spoken = make(FakeEngine(bundles=[bundle]), make_catalog(bundle))
    assert (await told(spoken, stream=False, steering={"mode": "refuse"})).get("reasoning") == told_of
    assert "reasoning" not in await told(spoken, stream=False)


@pytest.mark.parametrize("is_gated", [False, True])
async def test_a_profile_that_spares_reasoning_has_the_engine_spare_it(make: Make, is_gated: bool) -> None:
    """The plan says so, the answer says what the engine did; another deed, or the whole prompt, is an error."""
    bundle = make_gated_bundle() if is_gated else make_bundle()
    profiles = {name: replace(each, reasoning=Reasoning.SPARED) for name, each in bundle.profiles.items()}
    bundle = replace(bundle, profiles=profiles, is_thinking=True)
    engine = FakeEngine(bundles=[bundle])
    steering = {"mode": "auto" if is_gated else "refuse"}
    assert (await told(make(engine, make_catalog(bundle)), stream=False, steering=steering))["reasoning"] == "spared"
    (call,) = [call for call in engine.calls if call.plan]
    assert call.plan is not None
    assert call.plan.reasoning is Reasoning.SPARED
    disobeying = make(FakeEngine(bundles=[bundle], tampered={"reasoning": Reasoning.EDITED}), make_catalog(bundle))
    assert (await disobeying.chat(steering=steering)).status_code == 500
    refused = await make(engine, make_catalog(bundle)).chat(steering={"mode": "refuse", "scope": "all"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "steering.scope"
