"""Rows: the map of every step against a position-by-position reference, over schedules a vLLM scheduler could make."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.engine.kernels import COUNTS, TOUCHED
from steering.errors import CapacityExceeded, UnknownName
from steering.outcome import Outcome
from steering.plan import Plan, Scope
from tests.samples import plan_for
from tests.unit.engine.steps import BUNDLE, EDITS, rows_of, step


@dataclass(slots=True, kw_only=True)
class Request:
    """A request as the scheduler sees it."""

    name: str
    plan: Plan | None
    prompt: int
    computed: int = 0
    length: int = field(init=False)
    is_running: bool = True
    is_reported: bool = False

    def __post_init__(self) -> None:
        self.length = self.prompt

    def is_edited(self, position: int) -> bool:
        """The meaning of scope, one position at a time."""
        return self.plan is not None and (self.plan.scope is Scope.ALL or position >= self.prompt - 1)


@settings(max_examples=60)
@given(data=st.data())
def test_map_equals_the_position_by_position_reference(data: st.DataObject) -> None:
    """Chunked prefill, decode, draft tokens, preemption, recomputation, cache hits, arrivals and ends, in any order.

    After every step: each token's row holds that token's edit and strength exactly where the scope says so, the tail is
    0, the last entry counts steered tokens, and an outcome comes once per sample, in the step of its last prompt token.
    """
    rows, bank = rows_of()
    live: list[Request] = []
    arrived = 0
    for _ in range(data.draw(st.integers(1, 25), label="steps")):
        if len(live) < 6 and data.draw(st.booleans(), label="arrival"):
            plan = data.draw(
                st.none()
                | st.builds(
                    plan_for,
                    st.sampled_from(EDITS),
                    strength=st.sampled_from([1.0, -2.0, 0.5]),
                    scope=st.sampled_from(Scope),
                    plan_id=st.just(f"plan-{arrived}"),
                ),
                label="plan",
            )
            request = Request(name=f"r{arrived}", plan=plan, prompt=data.draw(st.integers(1, 12), label="prompt"))
            # A prefix-cache hit; the last prompt token is always recomputed.
            request.computed = data.draw(st.integers(0, request.prompt - 1), label="cached")
            arrived += 1
            live.append(request)
            if plan is not None:
                rows.add(request.name, plan, request.prompt)
        for request in list(live):
            match data.draw(st.sampled_from(["go on"] * 8 + ["preempt", "end"]), label=request.name):
                case "preempt" if request.is_running:
                    request.is_running = False
                    # Freed blocks may be found again, up to what was computed.
                    request.computed = data.draw(st.integers(0, max(0, request.computed - 1)), label="found again")
                    rows.preempt(request.name)
                case "preempt":
                    request.is_running = True
                    rows.resume(request.name)
                case "end":
                    live.remove(request)
                    rows.remove(request.name)
                case _:
                    pass
        batch = [request for request in live if request.is_running and data.draw(st.integers(0, 3), label="turn")]
        batch = data.draw(st.permutations(batch), label="order")
        parts, expected, reported = [], [], set()
        for request in batch:
            missing = request.length - request.computed
            count = data.draw(st.integers(1, min(8, missing)), label="chunk")
            positions = range(request.computed, request.computed + count)
            parts.append((request.name, count, request.computed))
            for position in positions:
                edited = request.plan if request.is_edited(position) else None
                expected.append(
                    (0.0, 0.0)
                    if edited is None
                    else (float(bank.number(bundle=edited.bundle, edit=edited.edit)), edited.strength)
                )
            if request.plan is not None and not request.is_reported and request.prompt - 1 in positions:
                reported.add(
                    (request.plan.id, request.name, request.plan.edit, request.plan.strength, request.plan.scope)
                )
                request.is_reported = True
            request.computed += count
            if request.computed == request.length:
                request.length += data.draw(st.integers(1, 3), label="sampled")
        if not parts:
            continue
        outcomes = step(rows, *parts)
        map_ = rows.token_rows[: len(expected)].long()
        assert [tuple(pair) for pair in rows.rows[map_, :2].tolist()] == expected
        assert [bool(row) for row in map_.tolist()] == [pair != (0.0, 0.0) for pair in expected]
        assert rows.token_rows[len(expected) : -COUNTS].count_nonzero() == 0
        assert int(rows.token_rows[TOUCHED]) == sum(pair != (0.0, 0.0) for pair in expected)
        assert all(outcome.applied for outcome in outcomes)
        found = [(o.plan_id, o.request_id, o.edit, o.strength, o.scope) for o in outcomes]
        assert sorted(found) == sorted(reported)
        assert rows.live == sum(request.plan is not None for request in live)


def test_only_the_last_prompt_token_and_what_follows_is_edited() -> None:
    """Scope `generated`: of a prompt of 5 in chunks of 3 and 2 the fifth token, then every generated one."""
    rows, _ = rows_of()
    rows.add("r", plan_for("a"), 5)
    assert step(rows, ("r", 3, 0)) == []
    assert rows.token_rows.count_nonzero() == 0
    assert [outcome.request_id for outcome in step(rows, ("r", 2, 3))] == ["r"]
    assert (rows.token_rows[:2] != 0).tolist() == [False, True]
    assert step(rows, ("r", 1, 5)) == []
    assert rows.token_rows[0] != 0


def test_a_prompt_of_one_token_is_edited_at_once() -> None:
    """Its only token is its last; a prompt of one looks like a decode and is none."""
    rows, _ = rows_of()
    rows.add("r", plan_for("b"), 1)
    assert len(step(rows, ("r", 1, 0))) == 1
    assert rows.token_rows[0] != 0


def test_a_prompt_chunk_of_one_token_is_no_decode() -> None:
    """The second token of a prompt of four, alone in a step, stays as it is."""
    rows, _ = rows_of()
    rows.add("r", plan_for("a"), 4)
    assert step(rows, ("r", 1, 1)) == []
    assert rows.token_rows.count_nonzero() == 0


def test_recomputation_edits_the_positions_it_edited_before() -> None:
    """Preempted after two generated tokens, prompt and answer are recomputed as one prefill: the prompt stays clean."""
    rows, _ = rows_of()
    rows.add("r", plan_for("a"), 4)
    assert len(step(rows, ("r", 4, 0))) == 1
    rows.preempt("r")
    rows.resume("r")
    assert step(rows, ("r", 6, 0)) == []
    assert (rows.token_rows[:6] != 0).tolist() == [False, False, False, True, True, True]


def test_a_request_preempted_before_it_was_edited_still_reports() -> None:
    """The outcome waits for the step that holds the last prompt token, also across a preemption."""
    rows, _ = rows_of()
    rows.add("r", plan_for("a"), 4)
    assert step(rows, ("r", 2, 0)) == []
    rows.preempt("r")
    assert step(rows, ("other", 3, 0)) == []
    rows.resume("r")
    assert step(rows, ("r", 3, 0)) == []
    assert [outcome.plan_id for outcome in step(rows, ("r", 1, 3))] == ["plan"]


def test_the_second_runner_adds_a_preempted_request_again() -> None:
    """The V2 runner brings a preempted request back as a new one: positions are edited as before, nothing is told."""
    rows, _ = rows_of()
    rows.add("r", plan_for("a"), 3)
    step(rows, ("r", 3, 0))
    rows.preempt("r")
    rows.add("r", plan_for("a"), 3)
    assert step(rows, ("r", 5, 0)) == []
    assert (rows.token_rows[:5] != 0).tolist() == [False, False, True, True, True]


def test_the_tail_of_a_longer_step_is_cleared() -> None:
    """After a step of 20 steered tokens one of 2: what is padding now points to row 0."""
    rows, _ = rows_of()
    rows.add("r", plan_for("a", scope=Scope.ALL), 20)
    step(rows, ("r", 20, 0))
    assert rows.token_rows[:20].count_nonzero() == 20
    step(rows, ("r", 2, 20))
    assert rows.token_rows[2:-COUNTS].count_nonzero() == 0
    assert rows.token_rows[TOUCHED] == 2


def test_nothing_is_written_while_nothing_is_steered() -> None:
    """Cleared once when the last steered token is gone; then, and before the first, the buffer is not touched."""
    rows, _ = rows_of()
    rows.token_rows.fill_(77)
    step(rows, ("plain", 9, 0))
    assert (rows.token_rows == 77).all()
    rows.token_rows.zero_()
    rows.add("r", plan_for("a"), 3)
    step(rows, ("r", 3, 0), ("plain", 1, 9))
    step(rows, ("plain", 1, 10))
    assert rows.token_rows.count_nonzero() == 0
    rows.token_rows.fill_(77)
    step(rows, ("plain", 1, 11))
    assert (rows.token_rows == 77).all()


def test_outcomes_say_what_was_done() -> None:
    """Edit, strength, scope and the ids of plan and sample; n samples of a plan are reported each."""
    rows, _ = rows_of()
    plan = plan_for("c", strength=-0.5, scope=Scope.ALL, plan_id="p")
    for sample in ("0_r", "1_r"):
        rows.add(sample, plan, 2)
    outcomes = step(rows, ("0_r", 2, 0), ("1_r", 2, 0))
    assert outcomes == [
        Outcome(plan_id="p", request_id=sample, applied=True, edit="c", strength=-0.5, scope=Scope.ALL)
        for sample in ("0_r", "1_r")
    ]


def test_rows_are_used_again_and_leave_nothing_behind() -> None:
    """Ten times as many requests as there are rows, one after the other, each with its own edit and strength."""
    rows, bank = rows_of(requests=2)
    for turn in range(10 * rows.capacity):
        edit, strength = EDITS[turn % 3], 1.0 + turn
        rows.add(f"r{turn}", plan_for(edit, strength=strength), 1)
        step(rows, (f"r{turn}", 1, 0))
        number = bank.number(bundle=BUNDLE.digest, edit=edit)
        assert rows.rows[rows.token_rows[0], :2].tolist() == [float(number), strength]
        rows.remove(f"r{turn}")
        step(rows, (f"r{turn}", 1, 1))
        assert rows.token_rows.count_nonzero() == 0
    assert rows.live == 0


def test_no_free_row_is_an_error_and_never_an_unsteered_request() -> None:
    """One more request than rows is refused; after one ends it is taken."""
    rows, _ = rows_of(requests=1)
    for number in range(rows.capacity):
        rows.add(f"r{number}", plan_for("a"), 1)
    with pytest.raises(CapacityExceeded, match=f"all {rows.capacity} rows"):
        rows.add("late", plan_for("a"), 1)
    rows.remove("r0")
    rows.add("late", plan_for("a"), 1)
    assert len(step(rows, ("late", 1, 0))) == 1


def test_an_unknown_edit_takes_no_row() -> None:
    """A refused plan leaves every row free."""
    rows, _ = rows_of(requests=1)
    for _ in range(rows.capacity + 1):
        with pytest.raises(UnknownName):
            rows.add("r", plan_for("absent"), 1)
    assert rows.live == 0
    rows.add("r", plan_for("a"), 1)


def test_unsteered_requests_may_come_and_go() -> None:
    """Runners tell of every request; those without a plan are not known here and change nothing."""
    rows, _ = rows_of()
    for follow in (rows.preempt, rows.resume, rows.remove):
        follow("plain")
    assert rows.live == 0


def test_adding_a_running_request_again_changes_nothing() -> None:
    """A runner may tell of the same request twice; it keeps its one row."""
    rows, _ = rows_of(requests=1)
    for _ in range(3):
        rows.add("r", plan_for("a"), 1)
    rows.add("s", plan_for("b"), 1)
    assert rows.live == 2
    assert len(step(rows, ("r", 1, 0), ("s", 1, 0))) == 2
