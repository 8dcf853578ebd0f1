"""Rows: the map of every step against a position-by-position reference, over schedules a vLLM scheduler could make."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.engine import kernels
from steering.engine.bank import Bank
from steering.engine.rows import Rows
from steering.errors import CapacityExceeded, UnknownName
from steering.gate import Probe
from steering.outcome import Outcome
from steering.plan import Decision, Plan, Scope
from tests.samples import bundle_in_memory, gate_plan, plan_for, random_edit

CPU = torch.device("cpu")
EDITS = ("a", "b", "c")
BUNDLE = bundle_in_memory({name: random_edit(name, ranks={0: 1}, seed=seed) for seed, name in enumerate(EDITS)})
TOKENS = 64


def rows_of(requests: int = 8) -> tuple[Rows, Bank]:
    """Empty rows over a bank with three edits."""
    bank = Bank(layers=(0,), width=16, terms=8, device=CPU)
    bank.load(BUNDLE)
    return Rows(bank=bank, requests=requests, tokens=TOKENS, device=CPU), bank


def step(rows: Rows, *parts: tuple[str, int, int]) -> list[Outcome]:
    """Write a step of (request id, tokens in it, tokens computed before it); its outcomes once its pass has run."""
    ids, tokens, computed = zip(*parts, strict=True)
    due = rows.write_step(ids, np.array(tokens, dtype=np.int32), np.array(computed, dtype=np.int32))
    return [rows.outcome(steered, rows.rows.numpy()[steered.row]) for steered in due.outcomes]


def decide(rows: Rows, bank: Bank, residual: torch.Tensor) -> None:
    """Run the op of the last step on this residual, alike for every token: what a forward pass does to the rows."""
    tokens = len(rows.token_rows) - 2
    hidden = residual.expand(tokens, -1).contiguous()
    torch.ops.trimtab.edit(hidden, torch.zeros_like(hidden), rows.token_rows, rows.rows, bank.tables[0])


def gated(requests: int = 8) -> tuple[Rows, Bank, torch.Tensor, torch.Tensor]:
    """Rows over a bank with a gate that reads the first coordinate; a residual it refuses, and one it complies with."""
    probe = Probe(
        name="probe",
        layer=0,
        categories=("safety", "political"),
        weight=torch.zeros(3, 16).index_put((torch.tensor([0, 1]), torch.tensor([0, 1])), torch.tensor(1.0)),
        bias=torch.zeros(3),
    )
    edits = {name: random_edit(name, ranks={0: 1}, seed=seed) for seed, name in enumerate(EDITS)}
    sides = ({"safety": "a", "political": "b"}, {"safety": "c"})
    bank = Bank(layers=(0,), width=16, terms=8, device=CPU)
    bank.load(bundle_in_memory(edits, gates={"gate": (probe, *sides)}))
    harmful = torch.zeros(16).index_put((torch.tensor([0, 1]),), torch.tensor([3.0, 1.0]))
    harmless = torch.zeros(16).index_put((torch.tensor([0, 1]),), torch.tensor([-3.0, 1.0]))
    return Rows(bank=bank, requests=requests, tokens=TOKENS, device=CPU), bank, harmful, harmless


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
        assert rows.token_rows[len(expected) : -2].count_nonzero() == 0
        assert int(rows.token_rows[-2]) == sum(pair != (0.0, 0.0) for pair in expected)
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


def run_gated(rows: Rows, bank: Bank, residual: torch.Tensor, *parts: tuple[str, int, int]) -> list[Outcome]:
    """A step of gated requests, its forward pass, and the outcomes that are true after it."""
    ids, tokens, computed = zip(*parts, strict=True)
    due = rows.write_step(ids, np.array(tokens, dtype=np.int32), np.array(computed, dtype=np.int32))
    decide(rows, bank, residual)
    return [rows.outcome(steered, rows.rows.numpy()[steered.row]) for steered in due.outcomes]


def test_a_gate_decides_at_the_last_prompt_token_and_never_again() -> None:
    """Chunks of 3 and 2: the fifth token alone is marked; later steps read the latch whatever the residual is."""
    rows, bank, harmful, harmless = gated()
    rows.add("r", gate_plan("gate", strength=0.5), 5)
    assert run_gated(rows, bank, harmless, ("r", 3, 0)) == []
    assert rows.token_rows.count_nonzero() == 0
    (outcome,) = run_gated(rows, bank, harmful, ("r", 2, 3))
    assert rows.token_rows[:2].tolist() == [0, -int(rows.token_rows[1:2].abs())]
    assert (outcome.applied, outcome.decision, outcome.category) == (True, Decision.REFUSE, "safety")
    assert (outcome.edit, outcome.strength) == ("a", 0.5)
    assert outcome.scores is not None
    assert outcome.scores.refusal == pytest.approx(torch.sigmoid(torch.tensor(3.0)).item())
    assert run_gated(rows, bank, harmless, ("r", 1, 5)) == []
    row = int(rows.token_rows[0])
    assert row > 0
    assert rows.rows[row, :2].tolist() == [float(bank.number(bundle=BUNDLE.digest, edit="a")), 0.5]


def test_a_latch_survives_preemption_though_its_row_does_not() -> None:
    """Preempted, its row taken by another, resumed with the probe token in the cache: the edit is the one decided."""
    rows, bank, harmful, harmless = gated(requests=1)
    rows.add("r", gate_plan("gate"), 4)
    assert run_gated(rows, bank, harmful, ("r", 4, 0))[0].decision is Decision.REFUSE
    rows.preempt("r")
    for other in range(rows.capacity):
        rows.add(f"other{other}", gate_plan("gate"), 1)
        assert run_gated(rows, bank, harmless, (f"other{other}", 1, 0))[0].decision is Decision.COMPLY
    rows.remove("other0")
    rows.resume("r")
    assert run_gated(rows, bank, harmless, ("r", 1, 4)) == []
    assert rows.token_rows[0] > 0
    assert rows.rows[int(rows.token_rows[0]), 0] == bank.number(bundle=BUNDLE.digest, edit="a")


def test_a_request_preempted_before_its_gate_decided_decides_when_it_comes_back() -> None:
    """Half of the prompt was read: nothing is known yet, and the last prompt token is still to come."""
    rows, bank, harmful, harmless = gated()
    rows.add("r", gate_plan("gate"), 4)
    assert run_gated(rows, bank, harmful, ("r", 2, 0)) == []
    rows.preempt("r")
    rows.resume("r")
    (outcome,) = run_gated(rows, bank, harmless, ("r", 4, 0))
    assert (outcome.decision, outcome.edit) == (Decision.COMPLY, "c")


def test_a_new_request_does_not_overwrite_the_latches_of_others() -> None:
    """Rows are uploaded one by one: what the device wrote into the others stays."""
    rows, bank, harmful, harmless = gated()
    rows.add("first", gate_plan("gate"), 1)
    run_gated(rows, bank, harmful, ("first", 1, 0))
    rows.add("second", gate_plan("gate"), 1)
    run_gated(rows, bank, harmless, ("first", 1, 1), ("second", 1, 0))
    assert rows.rows[rows.token_rows[:2].abs().long(), 0].tolist() == [
        float(bank.number(bundle=BUNDLE.digest, edit=edit)) for edit in ("a", "c")
    ]


def test_a_gate_that_cannot_decide_is_an_error_of_its_request_alone() -> None:
    """A residual of NaN: nothing is applied and the outcome says why; so it does where the gate's layer did not run."""
    rows, bank, harmful, _ = gated()
    rows.add("r", gate_plan("gate"), 1)
    (outcome,) = run_gated(rows, bank, harmful * float("nan"), ("r", 1, 0))
    assert (outcome.applied, outcome.edit, outcome.decision) == (False, None, None)
    assert "not finite" in outcome.error
    rows.add("s", gate_plan("gate"), 1)
    (missed,) = step(rows, ("s", 1, 0))
    assert (missed.applied, missed.error) == (False, "the gate did not run at its layer")


def test_orders_reach_the_gate() -> None:
    """Thresholds, allowed categories, graded strength and observing, each as the reference reads them."""
    rows, bank, harmful, harmless = gated()
    wanted = {
        "never refuses": (gate_plan("gate", refuse_above=1.0), harmful, (Decision.ABSTAIN, False)),
        "never complies": (gate_plan("gate", comply_below=0.0), harmless, (Decision.ABSTAIN, False)),
        "has no such edit": (gate_plan("gate", categories=("political",)), harmless, (Decision.ABSTAIN, False)),
        "is allowed one": (gate_plan("gate", categories=("political",)), harmful, (Decision.REFUSE, True)),
        "observes": (gate_plan("gate", is_observed=True), harmful, (Decision.REFUSE, False)),
        "is graded": (gate_plan("gate", is_graded=True), harmful, (Decision.REFUSE, True)),
    }
    for name, (plan, residual, expected) in wanted.items():
        rows.add(name, plan, 1)
        (outcome,) = run_gated(rows, bank, residual, (name, 1, 0))
        assert (outcome.decision, outcome.applied) == expected, name
        if name == "is allowed one":
            assert (outcome.category, outcome.edit) == ("political", "b")
        if name == "is graded":
            probability = torch.sigmoid(torch.tensor(3.0)).item()
            assert outcome.strength == pytest.approx((probability - 0.6) / 0.4)
        assert (rows.rows[int(rows.token_rows[0].abs()), kernels.EDIT] != 0) == outcome.applied


def test_unknown_gates_and_categories_take_no_row() -> None:
    """A plan for a gate that is not loaded, or for a category it does not have, is refused by name."""
    rows, _, _, _ = gated(requests=1)
    for _ in range(rows.capacity + 1):
        with pytest.raises(UnknownName, match="no gate 'absent'"):
            rows.add("r", gate_plan("absent"), 1)
        with pytest.raises(UnknownName, match="no categories"):
            rows.add("r", gate_plan("gate", categories=("safety", "weather")), 1)
    assert rows.live == 0


def test_the_tail_of_a_longer_step_is_cleared() -> None:
    """After a step of 20 steered tokens one of 2: what is padding now points to row 0."""
    rows, _ = rows_of()
    rows.add("r", plan_for("a", scope=Scope.ALL), 20)
    step(rows, ("r", 20, 0))
    assert rows.token_rows[:20].count_nonzero() == 20
    step(rows, ("r", 2, 20))
    assert rows.token_rows[2:-2].count_nonzero() == 0
    assert rows.token_rows[-2] == 2


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


def observed(requests: int = 8, tokens: int = 3) -> tuple[Rows, Bank]:
    """Rows over a bank whose bundle has a response probe, which reads the first coordinate of up to three tokens."""
    probe = Probe(
        name="response",
        layer=0,
        categories=(),
        weight=torch.zeros(1, 16).index_put((torch.tensor([0]), torch.tensor([0])), torch.tensor(1.0)),
        bias=torch.zeros(1),
    )
    edits = {name: random_edit(name, ranks={0: 1}, seed=seed) for seed, name in enumerate(EDITS)}
    bank = Bank(layers=(0,), width=16, terms=8, device=CPU)
    bank.load(bundle_in_memory(edits, response=(probe, tokens)))
    return Rows(bank=bank, requests=requests, tokens=TOKENS, device=CPU), bank


def run_observed(rows: Rows, bank: Bank, value: float, *parts: tuple[str, int, int]) -> dict[str, tuple[int, float]]:
    """A step in which every token's first coordinate is `value`; tokens read and score by request, as told after it."""
    ids, tokens, computed = zip(*parts, strict=True)
    due = rows.write_step(ids, np.array(tokens, dtype=np.int32), np.array(computed, dtype=np.int32))
    decide(rows, bank, torch.zeros(16).index_put((torch.tensor([0]),), torch.tensor(value)))
    told = [rows.response(steered, rows.rows.numpy()[steered.row]) for steered in due.responses]
    return {response.request_id: (response.tokens, response.score) for response in told if response is not None}


def test_the_response_probe_reads_each_of_the_first_generated_tokens() -> None:
    """Not the prompt's, not the fourth; the score is the mean. Afterwards the row is free."""
    rows, bank = observed()
    rows.add("r", plan_for(None, response=True), 4)
    assert run_observed(rows, bank, 9.0, ("r", 3, 0)) == {}
    assert run_observed(rows, bank, 9.0, ("r", 1, 3)) == {}
    assert rows.token_rows.count_nonzero() == 0
    assert run_observed(rows, bank, 1.0, ("r", 1, 4)) == {"r": (1, 1.0)}
    assert run_observed(rows, bank, 2.0, ("r", 1, 5)) == {"r": (2, 1.5)}
    assert run_observed(rows, bank, 6.0, ("r", 1, 6)) == {"r": (3, 3.0)}
    assert run_observed(rows, bank, 9.0, ("r", 1, 7)) == {}
    assert rows.token_rows.count_nonzero() == 0
    assert rows._row_of == {}
    rows.add("r", plan_for(None, response=True), 4)  # the V2 runner, after a preemption
    assert run_observed(rows, bank, 9.0, ("r", 7, 0)) == {}
    rows.remove("r")
    assert rows.live == 0


def test_what_was_read_before_a_preemption_is_kept() -> None:
    """Recomputed tokens are read again into the same cells; those that come from the prefix cache are remembered."""
    rows, bank = observed(requests=1)
    rows.add("r", plan_for(None, response=True), 2)
    run_observed(rows, bank, 0.0, ("r", 2, 0))
    run_observed(rows, bank, 1.0, ("r", 1, 2))
    assert run_observed(rows, bank, 3.0, ("r", 1, 3)) == {"r": (2, 2.0)}
    rows.preempt("r")
    rows.add("other", plan_for(None, response=True), 1)
    run_observed(rows, bank, 50.0, ("other", 2, 0))
    rows.resume("r")
    assert run_observed(rows, bank, 3.0, ("r", 2, 3)) == {"r": (3, (1.0 + 3.0 + 3.0) / 3)}


def test_an_edited_request_is_observed_as_well() -> None:
    """Chunks, an edit and a given answer at once: the plan's prompt ends after 2 of 6 tokens; its edit goes on."""
    rows, bank = observed()
    rows.add("r", plan_for("a", response=True), 2)
    edit = bank.number(bundle=BUNDLE.digest, edit="a")
    assert run_observed(rows, bank, 2.0, ("r", 4, 0)) == {"r": (2, 2.0)}
    assert (rows.token_rows[:4] >> kernels.PLACE).tolist() == [0, 0, 1, 2]
    row = int(rows.token_rows[1])
    assert (rows.token_rows[:4] & 0xFFFFFF).tolist() == [0, row, row, row]
    assert rows.rows[row, kernels.EDIT] == edit
    assert run_observed(rows, bank, 5.0, ("r", 2, 4)) == {"r": (3, 3.0)}
    assert rows.token_rows[:2].tolist() == [row | (3 << kernels.PLACE), row]
    assert run_observed(rows, bank, 5.0, ("r", 1, 6)) == {}
    assert rows.token_rows[:1].tolist() == [row]


def test_what_is_no_number_is_not_told() -> None:
    """A score that is not finite is as good as none; those of other tokens count."""
    rows, bank = observed()
    rows.add("r", plan_for(None, response=True), 1)
    run_observed(rows, bank, 0.0, ("r", 1, 0))
    assert run_observed(rows, bank, float("nan"), ("r", 1, 1)) == {}
    assert run_observed(rows, bank, 4.0, ("r", 1, 2)) == {"r": (1, 4.0)}


def test_a_bundle_without_response_probe_cannot_observe() -> None:
    """It is an error by name, not an answer that nobody reads."""
    rows, _ = rows_of()
    with pytest.raises(UnknownName, match="no response probe"):
        rows.add("r", plan_for(None, response=True), 1)
