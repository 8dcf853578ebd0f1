"""Rows and gates: decided once, at the last prompt token, and kept over preemptions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steering.engine import kernels
from steering.engine.bank import Bank
from steering.engine.rows import Rows
from steering.errors import UnknownName
from steering.gate import Probe
from steering.outcome import Outcome
from steering.plan import Decision
from tests.samples import bundle_in_memory, gate_plan, random_edit
from tests.unit.engine.steps import BUNDLE, decide, gated, row_of, step


def run_gated(rows: Rows, bank: Bank, residual: torch.Tensor, *parts: tuple[str, int, int]) -> list[Outcome]:
    """A step of gated requests, its forward pass, and the outcomes that are true after it."""
    ids, tokens, computed = zip(*parts, strict=True)
    due = rows.write_step(ids, np.array(tokens, dtype=np.int32), np.array(computed, dtype=np.int32))
    decide(rows, bank, residual)
    return [rows.outcome(steered, *row_of(rows, steered)) for steered in due.outcomes]


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


@pytest.mark.parametrize("is_observed", [False, True], ids=["abstains", "only observes"])
def test_a_request_its_gate_leaves_alone_costs_nothing_afterwards(is_observed: bool) -> None:
    """Its row is free at the next step, which finds nothing to do; after a preemption it takes none and decides no
    more. One that is edited beside it keeps its own, also where the two decide in one step.
    """
    rows, bank, harmful, _ = gated(requests=1)
    residual = harmful if is_observed else torch.zeros(16)
    rows.add("r", gate_plan("gate", is_observed=is_observed), 2)
    (outcome,) = run_gated(rows, bank, residual, ("r", 2, 0))
    assert outcome.edit is None
    assert outcome.decision is (Decision.REFUSE if is_observed else Decision.ABSTAIN)
    rows.add("edited", gate_plan("gate"), 1)
    assert run_gated(rows, bank, harmful, ("r", 1, 2), ("edited", 1, 0))[0].edit == "a"
    assert list(rows.requests.values()) == ["edited"]
    assert rows.token_rows[0] == 0
    rows.remove("edited")
    rows.preempt("r")
    rows.resume("r")
    assert run_gated(rows, bank, harmful, ("r", 3, 0)) == []
    assert rows.token_rows.count_nonzero() == 0
    assert rows.live == 1
    rows.remove("r")
    rows.add("r", gate_plan("gate"), 2)
    assert run_gated(rows, bank, harmful, ("r", 2, 0))[0].edit == "a"


def test_a_late_report_ends_nothing_of_a_later_request() -> None:
    """On a device an outcome may be read when its request has ended and its id has come again: that keeps its row."""
    rows, bank, harmful, _ = gated()
    rows.add("r", gate_plan("gate"), 1)
    due = rows.write_step(["r"], np.array([1], dtype=np.int32), np.array([0], dtype=np.int32))
    decide(rows, bank, torch.zeros(16))
    row = row_of(rows, due.outcomes[0])
    rows.remove("r")
    rows.add("r", gate_plan("gate"), 1)
    assert rows.outcome(due.outcomes[0], *row).decision is Decision.ABSTAIN
    assert run_gated(rows, bank, harmful, ("r", 1, 0))[0].edit == "a"
    run_gated(rows, bank, harmful, ("r", 1, 1))
    assert rows.token_rows[0] > 0


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


def test_a_plan_means_what_the_bank_holds_when_its_request_comes() -> None:
    """One plan for many requests, under ids of their own: bundles come and go, and its numbers with them."""
    probe = Probe(name="probe", layer=0, categories=("safety",), weight=torch.zeros(2, 16), bias=torch.ones(2))
    edits = {name: random_edit(name, ranks={0: 1}) for name in ("a", "b")}
    first, second = (
        bundle_in_memory(edits, digest=digest, gates={"gate": (probe, {"safety": edit}, {})})
        for digest, edit in (("first", "a"), ("second", "b"))
    )
    bank = Bank(layers=(0,), width=16, terms=16, device=torch.device("cpu"))
    rows, plan = Rows(bank=bank, requests=4, tokens=8, device=torch.device("cpu")), gate_plan("gate", bundle="second")
    told = []
    for loaded in ((first, second), (second,), (second, first)):
        for bundle in loaded:
            bank.load(bundle)
        rows.add("r", plan, 1, plan_id="mine")
        told += run_gated(rows, bank, torch.zeros(16), ("r", 1, 0))
        rows.remove("r")
        for bundle in loaded:
            bank.unload(bundle.digest)
        with pytest.raises(UnknownName, match="no gate 'gate'"):
            rows.add("r", plan, 1)
    assert [(outcome.plan_id, outcome.edit) for outcome in told] == [("mine", "b")] * 3


def test_unknown_gates_and_categories_take_no_row() -> None:
    """A plan for a gate that is not loaded, or for a category it does not have, is refused by name."""
    rows, _, _, _ = gated(requests=1)
    for _ in range(rows.capacity + 1):
        with pytest.raises(UnknownName, match="no gate 'absent'"):
            rows.add("r", gate_plan("absent"), 1)
        with pytest.raises(UnknownName, match="no categories"):
            rows.add("r", gate_plan("gate", categories=("safety", "weather")), 1)
    assert rows.live == 0
