"""Outcomes: worker to gateway over a real pipe, and no answer where the engine did not confirm."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from steering.engine.outcome_sender import ADDRESS_VARIABLE, HEAD, OutcomeSender
from steering.engine.outcomes import SWEEP, OutcomeInbox, OutcomeListener
from steering.errors import EditNotApplied, UnknownName, UnsupportedConfiguration
from steering.outcome import Outcome, Response
from steering.plan import Decision, Scope


def outcome(plan: str, sample: str = "r", *, applied: bool = True, error: str = "") -> Outcome:
    """What a worker reports of one sample."""
    return Outcome(
        plan_id=plan, request_id=sample, applied=applied, edit="e", strength=1.5, scope=Scope.ALL, error=error
    )


def file_exists(path: Path) -> bool:
    """Whether there is anything at `path`."""
    return path.exists()


@pytest.fixture
async def listener(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OutcomeListener]:
    """A listener that receives in this test's event loop."""
    monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)
    made = OutcomeListener()
    made.start()
    yield made
    await made.close()


@pytest.fixture
def sender(listener: OutcomeListener) -> Iterator[OutcomeSender]:
    """A worker's end that finds the listener as engine processes do: by the inherited environment."""
    made = OutcomeSender()
    yield made
    made.close()


async def test_an_outcome_arrives_as_it_was_sent(listener: OutcomeListener, sender: OutcomeSender) -> None:
    """One message, one sample, every field."""
    listener.expect("p")
    sender.send([outcome("p")])
    assert await listener.wait("p", (0,), 5.0) == {0: outcome("p")}


async def test_waiting_may_begin_before_or_after_the_message(listener: OutcomeListener, sender: OutcomeSender) -> None:
    """The gateway asks when it has the first token; the outcome may be there already, or not yet."""
    listener.expect("early")
    sender.send([outcome("early")])
    await asyncio.sleep(0.1)
    assert await listener.wait("early", (0,), 0.01) == {0: outcome("early")}
    waiting = asyncio.create_task(listener.wait("late", (0,), 5.0))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    sender.send([outcome("late")])
    assert await waiting == {0: outcome("late")}


async def test_what_nobody_waits_for_is_taken_all_the_same(listener: OutcomeListener, sender: OutcomeSender) -> None:
    """Before the pipe is full of it: what is expected is kept for whoever asks later."""
    listener.expect("p")
    sender.send([outcome("p")])
    assert not listener._told["p"].outcomes
    await asyncio.sleep(3 * SWEEP)
    assert listener._told["p"].outcomes == {0: outcome("p")}


async def test_all_samples_of_a_request_must_be_confirmed(listener: OutcomeListener, sender: OutcomeSender) -> None:
    """N = 3 waits for three, in any order beside other plans; two are not enough."""
    listener.expect("p")
    listener.expect("q")
    for plan, sample in (("p", "0_r"), ("q", "r"), ("p", "1_r")):
        sender.send([outcome(plan, sample)])
    with pytest.raises(EditNotApplied, match=r"confirmed 2 of 3 edits within 0\.2 s"):
        await listener.wait("p", range(3), 0.2)
    sender.send([outcome("p", "2_r")])
    assert await listener.wait("p", range(3), 5.0) == {sample: outcome("p", f"{sample}_r") for sample in range(3)}
    assert await listener.wait("q", (0,), 5.0) == {0: outcome("q")}


async def test_a_sample_reported_twice_counts_once(listener: OutcomeListener, sender: OutcomeSender) -> None:
    """A sample that was preempted may be reported again; that confirms nothing about its sibling."""
    listener.expect("p")
    for _ in range(2):
        sender.send([outcome("p", "0_r")])
    with pytest.raises(EditNotApplied, match="confirmed 1 of 2"):
        await listener.wait("p", (0, 1), 0.2)


async def test_silence_withholds_the_answer(listener: OutcomeListener) -> None:
    """No message within the time allowed is an error that says so."""
    with pytest.raises(EditNotApplied, match=r"0 of 1 edits within 0\.05 s; the answer is withheld"):
        await listener.wait("p", (0,), 0.05)


async def test_an_edit_that_was_not_applied_withholds_the_answer(
    listener: OutcomeListener, sender: OutcomeSender
) -> None:
    """A worker that says no is believed, with its reason."""
    listener.expect("p")
    sender.send([outcome("p", applied=False, error="no row")])
    with pytest.raises(EditNotApplied, match="did not apply edit 'e': no row"):
        await listener.wait("p", (0,), 5.0)


async def test_an_abstention_is_an_outcome_and_no_failure(listener: OutcomeListener, sender: OutcomeSender) -> None:
    """A gate that edits nothing has done what was planned; only an outcome with an error withholds the answer."""
    listener.expect("p")
    sent = replace(outcome("p", applied=False), edit=None, strength=0.0, decision=Decision.ABSTAIN, category="c")
    sender.send([sent])
    assert await listener.wait("p", (0,), 5.0) == {0: sent}


async def test_a_message_that_cannot_be_read_stops_no_other(listener: OutcomeListener, sender: OutcomeSender) -> None:
    """Broken bytes, messages of another kind and missing fields are dropped; what comes after them arrives."""
    listener.expect("p")
    assert sender._pipe is not None
    for broken in (b"", b"\xff", b"\xc0", b"{}", b"\x91\x91\x81", msgspec.msgpack.encode([[["generated"]]])):
        sender._pipe.write(HEAD.pack(len(broken), 0) + broken)
    sender._pipe.write(HEAD.pack(4, 1) + b"gone")
    sender.send([outcome("p")])
    assert len(await listener.wait("p", (0,), 5.0)) == 1


async def test_forgotten_and_unexpected_plans_keep_nothing(listener: OutcomeListener, sender: OutcomeSender) -> None:
    """Messages of requests that ended, or that nobody announced, are dropped: memory does not grow."""
    listener.expect("p")
    listener.forget("p")
    sender.send([outcome("p")])
    sender.send([outcome("unknown")])
    listener.expect("last")
    sender.send([outcome("last")])
    await listener.wait("last", (0,), 5.0)
    listener.forget("last")
    listener.forget("never")
    assert listener._told == {}
    with pytest.raises(EditNotApplied):
        await listener.wait("p", (0,), 0.05)


async def test_a_thousand_plans_find_their_own_outcomes(listener: OutcomeListener, sender: OutcomeSender) -> None:
    """Concurrent waits, sent in another order than awaited."""
    plans = [f"p{number}" for number in range(1000)]
    waiting = [asyncio.create_task(listener.wait(plan, (0,), 20.0)) for plan in plans]
    await asyncio.sleep(0)
    for plan in reversed(plans):
        sender.send([outcome(plan, f"r-{plan}")])
    for plan, found in zip(plans, await asyncio.gather(*waiting), strict=True):
        assert found == {0: outcome(plan, f"r-{plan}")}


async def test_nobody_listening_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under plain `vllm serve` there is no gateway: the worker sends nothing and goes on."""
    monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)
    OutcomeSender().send([outcome("p")])
    OutcomeSender("").send([outcome("p")])


async def test_closing_frees_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipe and the variable are gone; a listener of another gateway keeps its own."""
    monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)
    first = OutcomeListener()
    first.start()
    second = OutcomeListener()
    pipe = Path(first.address)
    is_there = [file_exists(pipe)]
    await first.close()
    is_there.append(file_exists(pipe.parent))
    assert is_there == [True, False]
    assert os.environ[ADDRESS_VARIABLE] == second.address
    await second.close()
    assert ADDRESS_VARIABLE not in os.environ


async def test_only_this_user_reaches_the_pipe(listener: OutcomeListener) -> None:
    """Outcomes are trusted, so the folder of the pipe is closed to others."""
    folder = Path(listener.address).parent
    assert folder.stat().st_mode & 0o077 == 0


async def test_the_newest_of_what_a_probe_read_counts(listener: OutcomeListener, sender: OutcomeSender) -> None:
    """One message may speak of many samples; waiting ends once enough tokens were read, or with its time limit."""
    listener.expect("p")
    first = [Response(plan_id="p", request_id=f"{sample}_r", tokens=1, score=float(sample)) for sample in (0, 1)]
    other = Response(plan_id="other", request_id="r", tokens=1, score=0.0)
    sender.send([], [*first, other])
    assert await listener.responses("p", {0: 1, 1: 1}, 5.0) == dict(enumerate(first))
    newer = Response(plan_id="p", request_id="1_r", tokens=4, score=-1.0)
    sender.send([], [newer])
    assert await listener.responses("p", {1: 4}, 5.0) == {0: first[0], 1: newer}
    assert await listener.responses("p", {0: 8}, 0.05) == {0: first[0], 1: newer}
    assert await listener.responses("other", {0: 1}, 0.05) == {}
    listener.forget("p")
    assert await listener.responses("p", {0: 1}, 0.05) == {}


async def test_a_slow_receiver_loses_nothing_and_stops_no_engine(
    listener: OutcomeListener, sender: OutcomeSender
) -> None:
    """What the pipe has no room for is kept and sent later, while `send` returns at once; steps of any size."""
    plans = [f"p{number}" for number in range(60_000)]
    for plan in plans:
        listener.expect(plan)
    for start in range(0, len(plans), 200):  # the event loop receives nothing meanwhile
        sender.send([outcome(plan) for plan in plans[start : start + 200]])
    assert sender._is_late
    listener.expect("rejected")
    sender.reject("rejected", UnknownName("not loaded"))
    for plan in plans:
        assert await listener.wait(plan, (0,), 20.0) == {0: outcome(plan)}
    for _ in range(100):
        await asyncio.sleep(0.01)
        if not sender._is_late:
            break
    assert isinstance(listener.rejection("rejected"), UnknownName)
    sender.send([outcome(plans[0], "1_again")])
    assert await listener.wait(plans[0], (1,), 5.0) == {1: outcome(plans[0], "1_again")}
    assert not sender._is_late


async def test_why_a_request_was_never_run_arrives_with_its_class(listener: OutcomeListener) -> None:
    """Whoever waits is told at once, and so is whoever asks before the event loop has received anything; a plan that
    nobody waits for, or not any more, has no such reason.
    """
    error = UnknownName("bundle sha256:b is not loaded", parameter="steering.profile")
    scheduler = OutcomeSender()
    listener.expect("p")
    waiting = asyncio.create_task(listener.wait("p", (0,), 5.0))
    await asyncio.sleep(0)
    assert listener.rejection("p") is None
    for plan in ("p", "other"):
        scheduler.reject(plan, error)
    scheduler.close()
    found = listener.rejection("p")
    assert (type(found), str(found), found and found.parameter) == (UnknownName, str(error), "steering.profile")
    with pytest.raises(UnknownName, match="is not loaded"):
        await waiting
    listener.forget("p")
    assert listener.rejection("p") is listener.rejection("other") is None


async def test_a_worker_that_ends_leaves_the_others(listener: OutcomeListener, sender: OutcomeSender) -> None:
    """What it has sent is heard, it sends nothing more, and others are heard that are there or come later."""
    ended = OutcomeSender()
    for plan in ("first", "second", "third"):
        listener.expect(plan)
    ended.send([outcome("first")])
    ended.close()
    assert await listener.wait("first", (0,), 5.0)
    ended.send([outcome("second", "never")])
    sender.send([outcome("second")])
    assert await listener.wait("second", (0,), 5.0) == {0: outcome("second")}
    late = OutcomeSender()
    late.send([outcome("third")])
    assert await listener.wait("third", (0,), 5.0)
    late.close()


async def test_messages_of_any_length_arrive_whole(listener: OutcomeListener, sender: OutcomeSender) -> None:
    """Longer ones than a pipe takes at once go in parts, and one outcome that alone is longer by a file that is gone
    afterwards; several senders at once do not mix theirs.
    """
    other, long = OutcomeSender(), outcome("p", "r", applied=False, error="x" * 100_000)
    listener.expect("p")
    sender.send([long])
    with pytest.raises(EditNotApplied, match="x" * 1000):
        await listener.wait("p", (0,), 5.0)
    assert [path.name for path in Path(listener.address).parent.iterdir()] == ["outcomes"]
    plans = [f"p{number}" for number in range(2000)]
    for plan in plans:
        listener.expect(plan)
    halves = [(sender, plans[::2]), (other, plans[1::2])]
    await asyncio.gather(
        *(asyncio.to_thread(each.send, [outcome(plan, error="") for plan in half]) for each, half in halves)
    )
    for plan in plans:
        assert await listener.wait(plan, (0,), 5.0) == {0: outcome(plan)}
    read = [Response(plan_id="p", request_id=f"{sample}_r", tokens=1, score=1.0) for sample in range(300)]
    sender.send([outcome("p", f"{sample}_r") for sample in range(300)], read)
    assert len(await listener.wait("p", range(300), 5.0)) == 300
    assert await listener.responses("p", dict.fromkeys(range(300), 1), 5.0) == dict(enumerate(read))
    other.close()


async def test_a_sender_outlives_its_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway ends first; the worker, still finishing a step, does not fail on that."""
    monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)
    gone = OutcomeListener()
    gone.start()
    sender = OutcomeSender()
    await gone.close()
    for _ in range(3):
        sender.send([outcome("p")])
    sender.close()


def test_an_address_where_nobody_waits_stops_the_start(tmp_path: Path) -> None:
    """An engine that could never confirm an edit does not start: no pipe there, or one that nobody reads."""
    unread = tmp_path / "unread"
    os.mkfifo(unread)
    for address in (tmp_path / "nobody", unread):
        with pytest.raises(UnsupportedConfiguration, match="where nobody waits for outcomes"):
            OutcomeSender(str(address))


def test_a_folder_that_takes_no_pipe_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems hold no pipes: told with the variable that names another folder."""

    def refuse(_path: Path, mode: int) -> None:
        raise PermissionError(mode)

    monkeypatch.setattr(os, "mkfifo", refuse)
    with pytest.raises(UnsupportedConfiguration, match="TMPDIR"):
        OutcomeListener()


def test_an_inbox_takes_what_there_is_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """By plan and sample; the response that read most of a sample stays, and the environment is as it was."""
    monkeypatch.setenv(ADDRESS_VARIABLE, "before")
    longer = Response(plan_id="p", request_id="r", tokens=2, score=1.0)
    with OutcomeInbox() as inbox:
        sender = OutcomeSender()
        outcomes: dict[str, dict[int, Outcome]] = {}
        responses: dict[str, dict[int, Response]] = {}
        inbox.drain_into(outcomes, responses)
        assert outcomes == {}
        sender.send([outcome("p")], [longer])
        sender.send([], [replace(longer, tokens=1)])
        inbox.drain_into(outcomes, responses)
        assert outcomes == {"p": {0: outcome("p")}}
        assert responses == {"p": {0: longer}}
        sender.close()
    assert os.environ[ADDRESS_VARIABLE] == "before"
