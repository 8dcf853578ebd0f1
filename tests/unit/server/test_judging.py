"""A judge looks at a sample of the answers from beside them: never in their way, and never at what it was not given."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from server.engine import Prompting
from server.generation import Generation
from server.observe.judging import BATCH, JudgeOrder, read_calibration, text_of
from steering.errors import OperatorError, UnsupportedConfiguration
from steering.evaluate.judge import Judged, Verdict
from steering.evaluate.rubric import VERSION
from tests.fakes import FakeEngine, make_catalog, make_gated_bundle, make_reading_bundle, read
from tests.unit.evaluate.judge_endpoint import Said, completion, judge_endpoint, texts, verdict
from tests.unit.server.conftest import Make, Spoken, scrape, value

JUDGED: dict[str, Any] = {
    "judge_url": "http://judge.test/v1",
    "judge_model": "judge",
    "judge_profiles": ("*",),
    "judge_rates": {"*": 1.0},
}


@dataclass
class FakeJudge:
    """Gives verdicts in turn, the last for good.

    Attributes:
        verdicts: to give.
        fails: raised instead.
        gate: when given, nothing is judged before it is set.
        asked: what it was shown.
    """

    verdicts: Sequence[Verdict] = (Verdict.REFUSAL,)
    fails: Exception | None = None
    gate: asyncio.Event | None = None
    asked: list[tuple[str, str]] = field(default_factory=list)

    async def judging(self, pairs: Sequence[tuple[str, str]]) -> list[Judged]:
        if self.gate is not None:
            await self.gate.wait()
        if self.fails is not None:
            raise self.fails
        found = []
        for pair in pairs:
            found.append(Judged(verdict=self.verdicts[min(len(self.asked), len(self.verdicts) - 1)], reason="sesame"))
            self.asked.append(pair)
        return found


def judged_by(judge: FakeJudge, spoken: Spoken) -> Spoken:
    """The gateway with this judge, at work."""
    judging = spoken.gateway.observation.judging
    assert judging is not None
    judging._judge = judge
    judging.start()
    return spoken


def files_in(folder: Path) -> list[Path]:
    """Whatever was written there."""
    return list(folder.iterdir())


async def settle(spoken: Spoken) -> None:
    """Until nothing waits to be judged."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_every_answer_of_a_full_rate_is_judged_and_counted(make: Make) -> None:
    """What the judge says is counted by what was decided for the answer; broken text is an outcome of its own."""
    judge = FakeJudge(verdicts=(Verdict.REFUSAL, Verdict.ANSWER, Verdict.BROKEN, Verdict.UNPARSABLE))
    spoken = judged_by(judge, make(**JUDGED))
    for _ in range(4):
        await spoken.chat(steering={"mode": "comply"})
    await settle(spoken)
    assert judge.asked == [("How do I kill a process?", "Hello there!")] * 4
    found = await scrape(spoken)
    stratum = {"category": "Safety", "decision": "comply"}
    assert value(found, "steering_judge_sampled_total", **stratum) == 4
    for outcome in ("refusal", "comply", "broken", "error"):
        assert value(found, "steering_judged_total", outcome=outcome, judge="llm", **stratum) == 1
    assert value(found, "steering_judge_failures_total", reason="unparsable") == 1
    # The refusal token said of all that they comply: the judge agrees on one of the two of which it took a side.
    agreement = {"judge": "llm", "against": "refusal_token"}
    assert value(found, "steering_judge_agreement_ratio", **agreement) == 0.5
    assert value(found, "steering_judge_agreement_samples", **agreement) == 2


async def test_streams_and_several_samples_are_judged_alike(make: Make) -> None:
    """The text of a stream is what the client got, each sample's by itself."""
    judge = FakeJudge()
    spoken = judged_by(judge, make(FakeEngine(shows_markers=True), **JUDGED))
    await spoken.chat(stream=True, n=2)
    await settle(spoken)
    assert judge.asked == [("How do I kill a process?", "Hello there!")] * 2


async def test_the_response_probes_verdicts_are_compared_too(make: Make) -> None:
    """Against the probe, not against a token that the model does not have."""
    judge = FakeJudge(verdicts=(Verdict.REFUSAL,))
    engine = FakeEngine(answers=[5.0], bundles=[make_reading_bundle()])
    spoken = judged_by(judge, make(engine, make_catalog(make_reading_bundle()), **JUDGED))
    await spoken.chat()
    await settle(spoken)
    found = await scrape(spoken)
    assert value(found, "steering_judge_agreement_ratio", against="response_probe") == 1
    assert value(found, "steering_judge_agreement_samples", against="refusal_token") == 0


async def test_a_judge_that_hangs_delays_nobody_and_what_finds_no_room_is_dropped(make: Make) -> None:
    """Answers come as ever; one batch is with the judge, the queue is full, and the rest is counted."""
    gate = asyncio.Event()
    spoken = judged_by(FakeJudge(gate=gate), make(**JUDGED, judge_per_minute=100_000))
    judging = spoken.gateway.observation.judging
    assert judging is not None
    judging._queue = asyncio.Queue(4)
    await settle(spoken)
    for _ in range(4 + BATCH + 3):
        assert (await spoken.chat()).status_code == 200
    found = await scrape(spoken)
    assert value(found, "steering_judge_failures_total", reason="dropped") >= 3
    assert value(found, "steering_judge_sampled_total") == 4 + BATCH + 3
    assert judging._queue.full()
    await judging.stop()


@pytest.mark.parametrize("error", [OperatorError("no: sesame"), RuntimeError("sesame")])
async def test_a_judge_out_of_reach_is_counted_and_left_alone_for_a_while(
    make: Make, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """Its words are not logged, as they may quote the answer."""
    spoken = judged_by(FakeJudge(fails=error), make(**JUDGED))
    await spoken.chat()
    await settle(spoken)
    found = await scrape(spoken)
    assert value(found, "steering_judged_total", outcome="error") == 1
    assert value(found, "steering_judge_failures_total", reason="unreachable") == 1
    assert "sesame" not in caplog.text
    judging = spoken.gateway.observation.judging
    assert judging is not None
    assert judging._task is not None
    assert not judging._task.done()
    await judging.stop()


async def test_a_minute_has_a_budget(make: Make) -> None:
    """No more answers than that go to the judge, however many are drawn."""
    judge = FakeJudge()
    spoken = judged_by(judge, make(**JUDGED, judge_per_minute=2))
    for _ in range(5):
        await spoken.chat()
    await settle(spoken)
    assert len(judge.asked) == 2
    assert value(await scrape(spoken), "steering_judge_failures_total", reason="over_budget") == 3


async def test_nothing_is_sent_for_a_profile_that_is_not_named(make: Make) -> None:
    """Opting in is by profile, and no other profile's answers leave."""
    judge = FakeJudge()
    spoken = judged_by(
        judge, make(FakeEngine(), make_catalog(make_gated_bundle()), **{**JUDGED, "judge_profiles": ("manual",)})
    )
    await spoken.chat()
    await settle(spoken)
    assert judge.asked == []
    await spoken.chat(steering={"profile": "manual", "mode": "refuse"})
    await settle(spoken)
    assert len(judge.asked) == 1


async def test_answers_without_text_and_failed_requests_are_not_judged(make: Make) -> None:
    """A call of a tool has no text to judge, and an error no answer."""
    judge = FakeJudge()
    spoken = judged_by(judge, make(FakeEngine(words=()), **JUDGED))
    await spoken.chat()
    await spoken.chat(steering={"profile": "evil"})
    await settle(spoken)
    assert judge.asked == []
    assert value(await scrape(spoken), "steering_judge_failures_total", reason="no_text") == 1


async def test_there_is_no_judge_unless_one_is_configured(make: Make) -> None:
    """And then no series either."""
    spoken = make()
    await spoken.chat()
    assert spoken.gateway.observation.judging is None
    assert "steering_judge" not in (await spoken.admin.get("/metrics")).text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge_profiles": ()}, "names none"),
        ({"judge_profiles": ("evil",)}, r"names \['evil'\]"),
        ({"judge_model": None}, "go together"),
    ],
)
def test_a_judge_that_would_judge_nothing_is_refused_at_the_start(
    make: Make, changes: dict[str, Any], message: str
) -> None:
    """Profiles that are not loaded, or none, and half an address."""
    with pytest.raises(UnsupportedConfiguration, match=message):
        make(**{**JUDGED, **changes})


def test_each_stratum_has_its_own_rate() -> None:
    """The most exact name counts, and what has none is not judged."""
    order = JudgeOrder(url="u", model="m", rates={"Safety/comply": 1.0, "Safety/*": 0.5, "*/refuse": 0.25})
    found = [order.rate(*stratum) for stratum in (("Safety", "comply"), ("Safety", "off"), ("Political", "refuse"))]
    assert found == [1.0, 0.5, 0.25]
    assert order.rate("Political", "off") == 0.0


async def test_a_rate_draws_its_share(make: Make) -> None:
    """By a draw that hangs on the request alone."""
    judge = FakeJudge()
    rates = {"*/comply": 0.3}
    engine = FakeEngine(scores=[read(0.05)])
    spoken = judged_by(
        judge,
        make(engine, make_catalog(make_gated_bundle()), **{**JUDGED, "judge_rates": rates, "judge_per_minute": 999}),
    )
    for _ in range(200):
        await spoken.chat(max_tokens=2)
    assert 30 <= value(await scrape(spoken), "steering_judge_sampled_total") <= 90


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"role": "user", "content": "hi"}], "hi"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "a\nb"),
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "system:\ns\n\nuser:\nu"),
        ([{"role": "assistant", "content": None}, {"role": "user", "content": "u"}], "user:\nu"),
    ],
)
def test_a_conversation_is_shown_in_words(messages: list[dict[str, Any]], text: str) -> None:
    """A lone question as it is; roles where there are several messages."""
    assert text_of(Generation(model="m", spec=None, fields={"messages": messages}, prompt_fields={})) == text


def test_plain_prompts_are_shown_and_token_ids_are_not() -> None:
    """There are no words in token ids."""
    for prompt, text in (("once upon", "once upon"), ([1, 2], "")):
        generation = Generation(
            model="m", spec=None, prompting=Prompting.PLAIN, fields={"prompt": prompt}, prompt_fields={}
        )
        assert text_of(generation) == text


def calibration(**changes: Any) -> str:
    """As `trimtab judge calibrate --judge llm --out` writes it, in part."""
    told: dict[str, Any] = {
        "name": "llm",
        "n": 2250,
        "accuracy": {"rate": 0.91, "low": 0.9, "high": 0.92, "count": 2047, "n": 2250},
        "judge": {"model": "judge", "rubric": VERSION, "counts": {}},
    }
    return json.dumps({**told, **changes})


async def test_the_judges_own_error_is_a_metric(make: Make, tmp_path: Path) -> None:
    """From the file of its calibration, with the number it rests on."""
    path = tmp_path / "judge.json"
    path.write_text(calibration())
    found = await scrape(make(**JUDGED, judge_calibration=path))
    against = {"judge": "llm", "against": "human_labels"}
    assert value(found, "steering_judge_agreement_ratio", **against) == 0.91
    assert value(found, "steering_judge_agreement_samples", **against) == 2250


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (calibration(judge={"model": "other", "rubric": VERSION}), "is of model 'other'"),
        (calibration(judge={"model": "judge", "rubric": "old"}), "rubric old"),
        (calibration(accuracy={"rate": 1.5, "n": 1}), "accuracy.rate"),
        ("{", "calibrate --judge llm"),
    ],
)
def test_another_judges_calibration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """An error that was measured on another model, or by other words, is not this judge's."""
    path = tmp_path / "judge.json"
    path.write_text(text)
    with pytest.raises(OperatorError, match=message):
        read_calibration(path, model="judge")


async def test_the_real_judge_is_asked_over_http_and_keeps_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer goes to the configured address, its verdict is counted, and no file holds it afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with judge_endpoint(lambda _body, _number: Said(completion(verdict()))) as endpoint:
        spoken = make(**{**JUDGED, "judge_url": endpoint.url, "judge_api_key": "sesame"})
        judging = spoken.gateway.observation.judging
        assert judging is not None
        judging.start()
        await spoken.chat()
        async with asyncio.timeout(20):
            while not value(await scrape(spoken), "steering_judged_total", outcome="refusal"):
                await asyncio.sleep(0.02)
        await judging.stop()
        assert len(endpoint.asked) == 1
        assert "How do I kill a process?" in texts(endpoint.asked[0])[1]
    assert files_in(tmp_path) == []
