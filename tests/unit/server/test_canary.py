"""The canary asks fixed prompts of every gated profile, as the server answers them, and gives way to traffic."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from server.observe import canary
from server.observe.canary import SHIPPED, Canary, CanaryOrder, CanaryPrompt, read_prompts, tokens_to_tell
from steering.errors import EngineError, OperatorError
from tests.fakes import (
    FakeEngine,
    make_bundle,
    make_catalog,
    make_gated_bundle,
    make_reading_bundle,
    read,
)
from tests.unit.server.conftest import Make, Spoken, scrape, value

PROMPTS = (
    *(CanaryPrompt(set="harmful", prompt=f"harmful {number}") for number in range(3)),
    *(CanaryPrompt(set="plain", prompt=f"plain {number}") for number in range(2)),
)


def canary_of(spoken: Spoken, **changes: Any) -> Canary:
    """A canary of a gateway, not begun."""
    gateway = spoken.gateway
    order = CanaryOrder(**{"prompts": PROMPTS, "interval": 3600.0, **changes})
    registry, labels = gateway.metrics.registry, gateway.metrics.labels
    return Canary(order, gateway.service, gateway.catalog, gateway.engine.model.name, registry, labels)


async def test_a_run_tells_refusals_by_profile_and_set(make: Make) -> None:
    """The gate of the fake complies, the model without it refuses: two profiles, and ratios with their n."""
    engine = FakeEngine(scores=[read(0.05)])
    spoken = make(engine, make_catalog(make_gated_bundle()))
    await canary_of(spoken).run()
    found = await scrape(spoken)
    for name, count in (("harmful", 3), ("plain", 2)):
        for profile, outcome, ratio in (("none", "refusal", 1.0), ("refusal-control", "comply", 0.0)):
            labels = {"profile": profile, "set": name}
            assert value(found, "steering_canary_outcomes_total", outcome=outcome, **labels) == count
            assert value(found, "steering_canary_prompts", **labels) == count
            assert (labels, ratio) in found["steering_canary_refusal_ratio"]
    assert value(found, "steering_canary_last_run_timestamp_seconds", profile="refusal-control") > 1e9
    assert {call.fields["messages"][0]["content"] for call in engine.calls} == {prompt.prompt for prompt in PROMPTS}
    assert {call.fields["temperature"] for call in engine.calls} == {0.0}
    assert {call.fields["max_tokens"] for call in engine.calls} == {1}


async def test_it_is_no_traffic(make: Make) -> None:
    """Nothing of what counts requests, decisions, outcomes or tokens moves, and no drift is seen in it."""
    spoken = make(FakeEngine(), make_catalog(make_gated_bundle()))
    await canary_of(spoken).run()
    found = await scrape(spoken)
    for name in ("decisions", "outcomes", "tokens", "probe_categories", "requests", "judge_sampled"):
        assert f"steering_{name}_total" not in found
    assert "steering_probe_score_count" not in found
    assert value(found, "steering_inflight_requests") == 0
    assert len(spoken.gateway.observation.ledger) == 0


async def test_a_profile_in_shadow_is_asked_as_if_it_steered(make: Make) -> None:
    """What it would do is what is to be known before it does it."""
    spoken = make(FakeEngine(scores=[read(0.05)]), make_catalog(make_gated_bundle()), enforced_share={"*": 0})
    await canary_of(spoken).run()
    labels = {"profile": "refusal-control", "set": "plain"}
    assert (labels, 0.0) in (await scrape(spoken))["steering_canary_refusal_ratio"]


async def test_an_unknown_verdict_is_an_outcome_of_its_own_and_no_ratio(make: Make) -> None:
    """Where neither token nor probe tells, nothing is claimed; a failed prompt is an error."""
    bundle = make_reading_bundle(response=None)
    engine = FakeEngine(bundles=[bundle])
    spoken = make(engine, make_catalog(bundle))
    runs = canary_of(spoken)
    await runs.run()
    engine.fails = EngineError("x")
    await runs.run()
    found = await scrape(spoken)
    for outcome in ("unknown", "error"):
        assert value(found, "steering_canary_outcomes_total", outcome=outcome, set="harmful") == 3
    assert "steering_canary_refusal_ratio" not in found
    assert value(found, "steering_canary_prompts") == 0


async def test_the_response_probe_gets_the_tokens_it_reads(make: Make) -> None:
    """And one more, as the last generated one is never read; a model that tells by its first token needs that alone."""
    bundle = make_reading_bundle()
    assert (tokens_to_tell(bundle), tokens_to_tell(make_bundle())) == (5, 1)
    engine = FakeEngine(words=["a"] * 9, answers=[5.0], bundles=[bundle])
    spoken = make(engine, make_catalog(bundle))
    await canary_of(spoken).run()
    found = await scrape(spoken)
    assert value(found, "steering_canary_outcomes_total", outcome="refusal", profile="none") == len(PROMPTS)
    assert all(wait == ({0: 4}, 0.05) for wait in engine.waits)


async def test_it_waits_while_the_server_is_busy_and_gives_up_at_last(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run among too many other requests waits; after its patience it is given up and counted."""
    monkeypatch.setattr(canary, "LOOK", 0.001)
    monkeypatch.setattr(canary, "PATIENCE", 0.02)
    gate = asyncio.Event()
    engine = FakeEngine(gate=gate)
    spoken = make(engine, make_catalog(make_gated_bundle()))
    busy = [asyncio.create_task(spoken.chat()) for _ in range(3)]
    while spoken.gateway.service.inflight < 3:
        await asyncio.sleep(0)
    runs = canary_of(spoken, most_inflight=2)
    await runs.run()
    assert value(await scrape(spoken), "steering_canary_skipped_total", reason="busy") == 1
    assert len(engine.calls) == 3
    run = asyncio.create_task(runs.run())
    await asyncio.sleep(0.005)
    gate.set()
    await asyncio.gather(run, *busy)
    found = await scrape(spoken)
    assert value(found, "steering_canary_skipped_total") == 1
    assert value(found, "steering_canary_prompts", profile="none") == len(PROMPTS)


async def test_it_does_not_keep_a_server_from_its_end(make: Make) -> None:
    """Draining, no more is asked, and what was told of whole runs stays."""
    spoken = make(FakeEngine(), make_catalog(make_gated_bundle()))
    runs = canary_of(spoken)
    await runs.run()
    spoken.gateway.service.is_draining = True
    await runs.run()
    found = await scrape(spoken)
    assert value(found, "steering_canary_skipped_total", reason="not_ready") == 1
    assert value(found, "steering_canary_prompts", profile="none") == len(PROMPTS)


async def test_profiles_that_are_gone_are_told_of_no_more(make: Make) -> None:
    """An unloaded bundle's ratios would else stand still for ever."""
    first, gated = make_bundle(), make_gated_bundle()
    spoken = make(FakeEngine(bundles=[first, gated]), make_catalog(first, gated))
    runs = canary_of(spoken)
    await runs.run()
    assert value(await scrape(spoken), "steering_canary_prompts", profile="refusal-control") == len(PROMPTS)
    spoken.gateway.catalog.remove(gated.digest)
    await runs.run()
    found = await scrape(spoken)
    assert value(found, "steering_canary_prompts") == len(PROMPTS)
    assert len(found["steering_canary_last_run_timestamp_seconds"]) == 1


async def test_it_runs_again_and_again_until_it_is_stopped(make: Make) -> None:
    """Begun with the server where an interval is set, and not otherwise."""
    spoken = make(FakeEngine(), make_catalog(make_gated_bundle()), canary_interval=0.001)
    gateway, of_three_runs = spoken.gateway, 3 * len(read_prompts(SHIPPED))
    await gateway.observation.start(gateway.engine, gateway.service, gateway.catalog)
    async with asyncio.timeout(20):
        while value(await scrape(spoken), "steering_canary_outcomes_total", profile="none") < of_three_runs:
            await asyncio.sleep(0)
    await gateway.observation.stop()
    off = make()
    await off.gateway.observation.start(gateway.engine, gateway.service, gateway.catalog)
    assert off.gateway.observation.canary is None
    assert "steering_canary" not in (await off.admin.get("/metrics")).text


def test_the_shipped_prompts_are_three_sets_of_one_size() -> None:
    """Harmless ones that sound harmful, harmful ones, plain ones; how many alerts need is for `test_monitoring.py`."""
    counts = Counter(prompt.set for prompt in read_prompts(SHIPPED))
    assert counts.keys() == {"sounds_harmful", "harmful", "plain"}
    assert len(set(counts.values())) == 1


def test_no_shipped_prompt_comes_twice() -> None:
    """In no set and in no two, however it is written: a second one would count as a prompt that it is not."""
    prompts = Counter(" ".join(prompt.prompt.lower().split()) for prompt in read_prompts(SHIPPED))
    assert [text for text, count in prompts.items() if count > 1] == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        json.dumps({"set": "A b", "prompt": "x"}),
        json.dumps({"set": "a", "prompt": ""}),
        json.dumps({"set": "a", "prompt": "x", "more": 1}),
        "\n".join(json.dumps({"set": f"set_{number}", "prompt": "x"}) for number in range(9)),
        json.dumps({"set": "a", "prompt": "\ud800"}),
    ],
)
def test_prompts_of_another_form_are_refused_at_the_start(make: Make, tmp_path: Path, text: str) -> None:
    """With the file and the line, and without what stands there."""
    path = tmp_path / "canary.jsonl"
    path.write_text(text)
    with pytest.raises(OperatorError, match="canary prompts"):
        make(canary_interval=60, canary_prompts=path)


def test_profiles_that_are_not_there_are_refused_at_the_start(make: Make) -> None:
    """A misspelt name would leave the profile that was meant unwatched."""
    with pytest.raises(OperatorError, match="evil"):
        make(canary_interval=60, canary_profiles=("evil",))
