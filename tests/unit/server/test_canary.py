"""The canary asks fixed prompts of every gated profile, as the server answers them, and gives way to traffic."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from server.engine import Call, Completion
from server.observe import canary
from server.observe.canary import (
    JUDGED_TOKENS,
    SHIPPED,
    Canary,
    CanaryOrder,
    CanaryPrompt,
    read_prompts,
    tokens_to_tell,
)
from steering.errors import EngineError, EngineOverloaded, OperatorError
from steering.evaluate.judge import Verdict
from tests.fakes import (
    FakeEngine,
    make_bundle,
    make_catalog,
    make_gated_bundle,
    make_reading_bundle,
    read,
)
from tests.unit.server.conftest import Make, Spoken, scrape, value
from tests.unit.server.test_judging import FakeJudge

PROMPTS = (
    *(CanaryPrompt(set="harmful", prompt=f"harmful {number}") for number in range(3)),
    *(CanaryPrompt(set="plain", prompt=f"plain {number}") for number in range(2)),
)


def canary_of(spoken: Spoken, **changes: Any) -> Canary:
    """A canary of a gateway, not begun."""
    gateway = spoken.gateway
    judge = changes.pop("judge", None)
    order = CanaryOrder(**{"prompts": PROMPTS, "interval": 3600.0, **changes})
    registry, labels = gateway.metrics.registry, gateway.metrics.labels
    return Canary(order, gateway.service, gateway.catalog, gateway.engine.model.name, registry, labels, judge)


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
    assert {call.fields["max_tokens"] for call in engine.calls} == {5}


@dataclass
class BusyEngine(FakeEngine):
    """Clients wait for their answers until `rest`; the canary's come.

    Attributes:
        most: prompts of the canary that were answered at once.
    """

    rest: asyncio.Event = field(default_factory=asyncio.Event)
    most: int = 0
    _asked: int = 0

    async def complete(self, call: Call) -> Completion:
        if not call.request_id.startswith("canary"):
            await self.rest.wait()
            return await super().complete(call)
        self._asked += 1
        self.most = max(self.most, self._asked)
        try:
            await asyncio.sleep(0.002)
            return await super().complete(call)
        finally:
            self._asked -= 1


async def keep_busy(spoken: Spoken, count: int) -> list[asyncio.Task[Any]]:
    """So many requests in flight."""
    tasks = [asyncio.create_task(spoken.chat()) for _ in range(count)]
    while spoken.gateway.service.inflight < count:
        await asyncio.sleep(0)
    return tasks


async def test_it_waits_while_the_server_is_busy(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run among too many other requests asks nothing until they are fewer, and is then whole."""
    monkeypatch.setattr(canary, "LOOK", 0.001)
    engine = BusyEngine()
    spoken = make(engine, make_catalog(make_gated_bundle()))
    busy = await keep_busy(spoken, 3)
    run = asyncio.create_task(canary_of(spoken, most_inflight=2).run())
    await asyncio.sleep(0.05)
    assert not engine.calls
    engine.rest.set()
    await asyncio.gather(run, *busy)
    found = await scrape(spoken)
    assert value(found, "steering_canary_skipped_total") == 0
    assert value(found, "steering_canary_prompts", profile="none") == len(PROMPTS)
    assert engine.most == 2


async def test_on_a_server_that_is_always_busy_it_goes_on_slowly(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put off for a whole interval, a run comes to its end all the same, with one prompt at a time."""
    monkeypatch.setattr(canary, "LOOK", 0.001)
    engine = BusyEngine()
    spoken = make(engine, make_catalog(make_gated_bundle()))
    busy = await keep_busy(spoken, 3)
    async with asyncio.timeout(20):
        await canary_of(spoken, most_inflight=2, interval=0.05).run()
    found = await scrape(spoken)
    assert value(found, "steering_canary_skipped_total") == 0
    for profile in ("none", "refusal-control"):
        assert value(found, "steering_canary_prompts", profile=profile) == len(PROMPTS)
    assert engine.most == 1
    assert not any(task.done() for task in busy)
    engine.rest.set()
    await asyncio.gather(*busy)


async def test_a_server_that_is_full_is_asked_again_for_a_while(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room for a prompt it comes again; without any for long the run is given up, and counted."""
    monkeypatch.setattr(canary, "LOOK", 0.001)
    monkeypatch.setattr(canary, "PATIENCE", 0.05)
    engine = BusyEngine()
    spoken = make(engine, make_catalog(make_gated_bundle()), max_inflight=3)
    busy = await keep_busy(spoken, 3)
    runs = canary_of(spoken, most_inflight=5)
    await runs.run()
    assert value(await scrape(spoken), "steering_canary_skipped_total", reason="busy") == 1
    monkeypatch.setattr(canary, "PATIENCE", 60.0)
    run = asyncio.create_task(runs.run())
    await asyncio.sleep(0.02)
    engine.rest.set()
    await asyncio.gather(run, *busy)
    found = await scrape(spoken)
    assert value(found, "steering_canary_skipped_total") == 1
    assert value(found, "steering_canary_prompts", profile="none") == len(PROMPTS)


async def test_who_was_never_asked_through_is_told_since_when(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an alert knows a first run that does not end from a canary that is off; an unloaded profile is not waited
    for.
    """
    monkeypatch.setattr(canary, "PATIENCE", 0.01)
    monkeypatch.setattr(canary, "LOOK", 0.001)
    first, gated = make_bundle(), make_gated_bundle()
    spoken = make(FakeEngine(bundles=[first, gated]), make_catalog(first, gated))
    engine = spoken.gateway.engine
    assert isinstance(engine, FakeEngine)
    engine.fails = EngineOverloaded("full")
    runs = canary_of(spoken)
    await runs.run()
    found = await scrape(spoken)
    assert "steering_canary_last_run_timestamp_seconds" not in found
    since = {labels["profile"]: at for labels, at in found["steering_canary_since_timestamp_seconds"]}
    assert since.keys() == {"none", "refusal-control"}
    assert min(since.values()) > 1e9
    await runs.run()
    assert value(await scrape(spoken), "steering_canary_since_timestamp_seconds", profile="none") == since["none"]
    spoken.gateway.catalog.remove(gated.digest)
    await runs.run()
    assert len((await scrape(spoken))["steering_canary_since_timestamp_seconds"]) == 1


async def test_a_run_that_breaks_is_counted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As given up, like one for which there was no room."""
    spoken = make(FakeEngine(), make_catalog(make_gated_bundle()))
    runs = canary_of(spoken, interval=0.001)
    monkeypatch.setattr(runs, "_asked", lambda: 1 / 0)
    runs.start()
    async with asyncio.timeout(20):
        while not value(await scrape(spoken), "steering_canary_skipped_total", reason="broken"):
            await asyncio.sleep(0)
    await runs.stop()


async def test_a_judge_tells_of_what_no_detector_can(make: Make) -> None:
    """A bundle with neither refusal tokens nor a response probe: the configured judge reads how answers begin, and n
    and ratio rest on what it says; broken text is neither side.
    """
    bundle = make_reading_bundle(response=None)
    engine = FakeEngine(words=["word"] * 200, bundles=[bundle])
    spoken = make(engine, make_catalog(bundle))
    said = iter(["refusal", "refusal", "comply", "comply", "broken"])
    shown: list[tuple[str, str]] = []

    async def judge(prompt: str, answer: str) -> str:
        shown.append((prompt, answer))
        return next(said)

    await canary_of(spoken, judge=judge, concurrency=1).run()
    found = await scrape(spoken)
    assert value(found, "steering_canary_prompts", set="harmful") == 3
    assert value(found, "steering_canary_refusal_ratio", set="harmful") == pytest.approx(2 / 3)
    assert value(found, "steering_canary_prompts", set="plain") == 1
    assert value(found, "steering_canary_outcomes_total", set="plain", outcome="broken") == 1
    assert [prompt for prompt, _ in shown] == [prompt.prompt for prompt in PROMPTS]
    assert all(answer.count("word") == JUDGED_TOKENS - 1 for _, answer in shown)


async def test_the_configured_judge_is_the_canarys_too(make: Make) -> None:
    """Its budget is shared, its counts of live answers are not touched, and one that is out of reach is an error."""
    bundle = make_reading_bundle(response=None)
    judged = {"judge_url": "http://127.0.0.1:9/v1", "judge_model": "judge", "judge_profiles": ("*",)}
    spoken = make(FakeEngine(bundles=[bundle]), make_catalog(bundle), canary_interval=3600, **judged)
    judging = spoken.gateway.observation.judging
    assert judging is not None
    judge = FakeJudge(verdicts=(Verdict.ANSWER,))
    judging._judge = judge
    assert await judging.outcome_of("prompt", "answer") == "comply"
    assert judge.asked == [("prompt", "answer")]
    judge.fails = OperatorError("gone")
    assert await judging.outcome_of("prompt", "answer") == "error"
    assert judging._allowed < 59
    found = await scrape(spoken)
    assert "steering_judged_total" not in found
    assert "steering_judge_failures_total" not in found


async def test_a_blind_canary_says_so_once(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Without a judge: in a warning for each profile of which nothing will be known, and of no other."""
    bundle = make_reading_bundle(response=None)
    spoken = make(FakeEngine(bundles=[bundle, make_gated_bundle()]), make_catalog(bundle, make_gated_bundle()))
    runs = canary_of(spoken)
    with caplog.at_level(logging.WARNING, logger="trimtab"):
        await runs.run()
        await runs.run()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "profile none" in said[0]
    assert "TRIMTAB_JUDGE_URL" in said[0]


async def test_it_does_not_keep_a_server_from_its_end(make: Make) -> None:
    """From the order to end on no more is asked, and what was told of whole runs stays."""
    spoken = make(FakeEngine(), make_catalog(make_gated_bundle()))
    runs = canary_of(spoken)
    await runs.run()
    spoken.gateway.service.is_leaving = True
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
