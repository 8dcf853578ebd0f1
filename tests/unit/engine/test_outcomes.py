"""Outcomes: taken out of what an engine gives with its tokens, and no answer where it did not confirm."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from steering.engine.outcomes import REPORT_KEY, OutcomeListener, listen
from steering.errors import EditNotApplied, TrimtabError, UnknownName
from steering.outcome import Outcome, Rejection, Report, Response, Scores, report_to_bytes
from steering.plan import Decision, Scope


def outcome(plan: str, sample: str = "r", *, applied: bool = True, error: str = "") -> Outcome:
    """What a worker reports of one sample."""
    return Outcome(
        plan_id=plan, request_id=sample, applied=applied, edit="e", strength=1.5, scope=Scope.ALL, error=error
    )


def rejection(plan: str, error: TrimtabError) -> Rejection:
    """What the scheduler reports of a request that it does not run."""
    return Rejection(plan_id=plan, error=error.to_fields())


@dataclass
class FakeProcessor:
    """vLLM's output processor, as far as it takes outputs."""

    seen: list[tuple[Any, Any, Any]] = field(default_factory=list)
    request_states: dict[str, object] = field(default_factory=lambda: {"r": None})

    def process_outputs(self, engine_core_outputs: Any, timestamp: float, stats: object = None) -> str:
        self.seen.append(([each.kv_transfer_params for each in engine_core_outputs], timestamp, stats))
        return "processed"


@dataclass
class FakeOutput:
    """vLLM's `EngineCoreOutput`, as it comes out of its decoder."""

    kv_transfer_params: Any = None
    request_id: str = "r"


def sent(*reports: bytes) -> FakeOutput:
    """An output with reports, after the way from the engine's process."""
    return FakeOutput(msgspec.msgpack.decode(msgspec.msgpack.encode({REPORT_KEY: reports})))


@pytest.fixture
def listener() -> OutcomeListener:
    """A listener that nothing has been told."""
    return OutcomeListener()


FULL = replace(
    outcome("p"),
    decision=Decision.REFUSE,
    category="c",
    scores=Scores(names=("c", "d"), logits=(0.5, -1.25, 3.0)),
)


def test_reports_arrive_as_they_were_made_before_their_tokens_do() -> None:
    """Every field; and vLLM's own processor, which gets everything else as it was, finds no report in an output."""
    processor, found = FakeProcessor(), list[Report]()

    def receive(report: Report) -> None:
        assert not processor.seen
        found.append(report)

    listen(SimpleNamespace(output_processor=processor), receive)
    reports = [
        FULL,
        Response(plan_id="p", request_id="r", tokens=3, score=-0.5),
        rejection("p", UnknownName("not loaded", parameter="steering.profile")),
    ]
    other = {"do_remote_decode": True}
    told: Any = processor.process_outputs(
        [FakeOutput(), sent(*map(report_to_bytes, reports)), FakeOutput(other)], 2.5, stats="stats"
    )
    assert told == "processed"
    assert found == reports
    assert processor.seen == [([None, None, other], 2.5, "stats")]


def test_what_comes_after_a_requests_end_is_dropped() -> None:
    """A stop string ends it here while the engine still generates: what was read of those tokens is of no answer."""
    processor, found = FakeProcessor(request_states={}), list[Report]()
    listen(SimpleNamespace(output_processor=processor), found.append)
    processor.process_outputs([sent(report_to_bytes(outcome("p")))], 0.0)
    assert found == []
    assert processor.seen[0][0] == [None]


def test_a_report_that_cannot_be_kept_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """As one of another version: the error must not reach vLLM, which would end every request with it."""
    processor, listener = FakeProcessor(), OutcomeListener()
    listener.expect("p")
    listen(SimpleNamespace(output_processor=processor), listener.receive)
    strange = report_to_bytes(Rejection(plan_id="p", error={}))
    processor.process_outputs([sent(strange, report_to_bytes(outcome("p")))], 0.0)
    assert listener._told["p"].outcomes == {0: outcome("p")}
    assert "a report of request r cannot be read" in caplog.text


def test_a_report_that_cannot_be_read_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """Bytes that are no message, of another kind, with missing fields or of another type: each is dropped, logged by
    its request and kept out of the answer.
    """
    processor, found = FakeProcessor(), list[Report]()
    listen(SimpleNamespace(output_processor=processor), found.append)
    encoded = map(msgspec.msgpack.encode, ("", 7, {}, [], [9, "p"], [0, "p"], [1] * 9, ["outcome", "p"]))
    broken = [b"", b"\xff", b"\xc0", *encoded]
    good = report_to_bytes(outcome("p"))
    processor.process_outputs([*map(sent, broken), sent(broken[0], good)], 0.0)
    assert found == [outcome("p")]
    assert processor.seen[0][0] == [None] * 12
    assert caplog.text.count("a report of request r cannot be read") == 12


async def test_whoever_has_a_token_has_its_outcome(listener: OutcomeListener) -> None:
    """Without waiting, even where no time is left for that."""
    listener.expect("p")
    listener.receive(outcome("p"))
    assert await listener.wait("p", (0,), 0.0) == {0: outcome("p")}


async def test_a_sample_that_has_no_token_yet_is_waited_for(listener: OutcomeListener) -> None:
    """A sibling's comes first: the request's first sample is told of in the headers, and so has to be there."""
    listener.expect("p")
    waiting = asyncio.create_task(listener.wait("p", (0, 1), 5.0))
    await asyncio.sleep(0)
    listener.receive(outcome("p", "1_r"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    listener.receive(outcome("p", "0_r"))
    assert await waiting == {0: outcome("p", "0_r"), 1: outcome("p", "1_r")}


async def test_all_samples_of_a_request_must_be_confirmed(listener: OutcomeListener) -> None:
    """N = 3 waits for three, in any order beside other plans; two are not enough."""
    listener.expect("p")
    listener.expect("q")
    for plan, sample in (("p", "0_r"), ("q", "r"), ("p", "1_r")):
        listener.receive(outcome(plan, sample))
    with pytest.raises(EditNotApplied, match=r"confirmed 2 of 3 edits within 0\.2 s"):
        await listener.wait("p", range(3), 0.2)
    listener.receive(outcome("p", "2_r"))
    assert await listener.wait("p", range(3), 5.0) == {sample: outcome("p", f"{sample}_r") for sample in range(3)}
    assert await listener.wait("q", (0,), 5.0) == {0: outcome("q")}


async def test_a_sample_reported_twice_counts_once(listener: OutcomeListener) -> None:
    """A sample that was preempted may be reported again; that confirms nothing about its sibling."""
    listener.expect("p")
    for _ in range(2):
        listener.receive(outcome("p", "0_r"))
    with pytest.raises(EditNotApplied, match="confirmed 1 of 2"):
        await listener.wait("p", (0, 1), 0.05)


async def test_silence_withholds_the_answer(listener: OutcomeListener) -> None:
    """No report within the time allowed is an error that says so."""
    with pytest.raises(EditNotApplied, match=r"0 of 1 edits within 0\.05 s; the answer is withheld"):
        await listener.wait("p", (0,), 0.05)


async def test_an_edit_that_was_not_applied_withholds_the_answer(listener: OutcomeListener) -> None:
    """A worker that says no is believed, with its reason."""
    listener.expect("p")
    listener.receive(outcome("p", applied=False, error="no row"))
    with pytest.raises(EditNotApplied, match="did not apply edit 'e': no row"):
        await listener.wait("p", (0,), 5.0)


async def test_an_abstention_is_an_outcome_and_no_failure(listener: OutcomeListener) -> None:
    """A gate that edits nothing has done what was planned; only an outcome with an error withholds the answer."""
    listener.expect("p")
    told = replace(outcome("p", applied=False), edit=None, strength=0.0, decision=Decision.ABSTAIN, category="c")
    listener.receive(told)
    assert await listener.wait("p", (0,), 5.0) == {0: told}


async def test_forgotten_and_unexpected_plans_keep_nothing(listener: OutcomeListener) -> None:
    """What is told of requests that ended, or that nobody announced, is dropped: memory does not grow."""
    listener.expect("p")
    listener.forget("p")
    listener.receive(outcome("p"))
    listener.receive(Response(plan_id="unknown", request_id="r", tokens=1, score=0.0))
    listener.receive(rejection("unknown", UnknownName("not loaded")))
    listener.forget("never")
    assert listener._told == {}
    with pytest.raises(EditNotApplied):
        await listener.wait("p", (0,), 0.05)


async def test_a_thousand_plans_find_their_own_outcomes(listener: OutcomeListener) -> None:
    """Concurrent waits, told of in another order than awaited."""
    plans = [f"p{number}" for number in range(1000)]
    waiting = [asyncio.create_task(listener.wait(plan, (0,), 20.0)) for plan in plans]
    await asyncio.sleep(0)
    for plan in reversed(plans):
        listener.receive(outcome(plan, f"r-{plan}"))
    for plan, found in zip(plans, await asyncio.gather(*waiting), strict=True):
        assert found == {0: outcome(plan, f"r-{plan}")}


def test_the_newest_of_what_a_probe_read_counts(listener: OutcomeListener) -> None:
    """By sample, of an expected plan, until it is forgotten."""
    listener.expect("p")
    first = [Response(plan_id="p", request_id=f"{sample}_r", tokens=1, score=float(sample)) for sample in (0, 1)]
    newer = Response(plan_id="p", request_id="1_r", tokens=4, score=-1.0)
    for response in [*first, Response(plan_id="other", request_id="r", tokens=1, score=0.0), newer]:
        listener.receive(response)
    assert listener.responses("p") == {0: first[0], 1: newer}
    assert listener.responses("other") == {}
    listener.forget("p")
    assert listener.responses("p") == {}


async def test_why_a_request_was_never_run_arrives_with_its_class(listener: OutcomeListener) -> None:
    """Whoever waits is told at once, and whoever asks; a plan that nobody waits for, or not any more, has no reason."""
    error = UnknownName("bundle sha256:b is not loaded", parameter="steering.profile")
    listener.expect("p")
    waiting = asyncio.create_task(listener.wait("p", (0,), 5.0))
    await asyncio.sleep(0)
    assert listener.rejection("p") is None
    for plan in ("p", "other"):
        listener.receive(rejection(plan, error))
    found = listener.rejection("p")
    assert (type(found), str(found), found and found.parameter) == (UnknownName, str(error), "steering.profile")
    with pytest.raises(UnknownName, match="is not loaded"):
        await waiting
    listener.forget("p")
    assert listener.rejection("p") is listener.rejection("other") is None
