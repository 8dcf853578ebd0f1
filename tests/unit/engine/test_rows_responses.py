"""Rows and response probes: which generated tokens are read, and what is told of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from steering.engine import kernels
from steering.engine.bank import Bank
from steering.engine.rows import Rows
from steering.engine.steered import Steered
from steering.errors import UnknownName
from steering.gate import Probe
from steering.plan import Decision
from tests.samples import bundle_in_memory, gate_plan, plan_for, random_edit
from tests.unit.engine.steps import BUNDLE, CPU, EDITS, TOKENS, decide, row_of, rows_of


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
    told = [rows.response(steered, *row_of(rows, steered)) for steered in due.responses]
    return {response.request_id: (response.tokens, response.score) for response in told if response is not None}


def left_alone() -> tuple[Rows, Bank, Steered, tuple[memoryview, int]]:
    """A request that its gate has just left alone, whose response probe reads the sum of two tokens; and its row."""
    gate = Probe(name="probe", layer=0, categories=("safety",), weight=torch.zeros(2, 16), bias=torch.zeros(2))
    reader = Probe(name="response", layer=0, categories=(), weight=torch.ones(1, 16), bias=torch.zeros(1))
    bank = Bank(layers=(0,), width=16, terms=8, device=CPU)
    edits = {"a": random_edit("a", ranks={0: 1})}
    bank.load(bundle_in_memory(edits, gates={"gate": (gate, {"safety": "a"}, {})}, response=(reader, 2)))
    rows = Rows(bank=bank, requests=2, tokens=TOKENS, device=CPU)
    rows.add("r", replace(gate_plan("gate"), response=True), 2)
    due = rows.write_step(["r"], np.array([2], dtype=np.int32), np.array([0], dtype=np.int32))
    decide(rows, bank, torch.zeros(16))
    (steered,) = due.outcomes
    return rows, bank, steered, row_of(rows, steered)


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


@pytest.mark.parametrize("is_late", [False, True], ids=["at once", "late"])
def test_a_request_its_gate_leaves_alone_is_read_to_the_end(is_late: bool) -> None:
    """Its row is free when the response probe has read its tokens, and not before; also where the host learns of the
    decision only then.
    """
    rows, bank, steered, told = left_alone()
    if not is_late:
        assert rows.outcome(steered, *told).decision is Decision.ABSTAIN
    assert run_observed(rows, bank, 1.0, ("r", 1, 2)) == {"r": (1, 1.0)}
    assert run_observed(rows, bank, 3.0, ("r", 1, 3)) == {"r": (2, 2.0)}
    if is_late:
        assert rows.outcome(steered, *told).decision is Decision.ABSTAIN
    assert run_observed(rows, bank, 9.0, ("r", 1, 4)) == {}
    assert (rows.token_rows.count_nonzero(), rows.requests) == (0, {})


def test_a_request_left_alone_while_it_waits_is_read_when_it_is_back() -> None:
    """Preempted before the host has read that its gate leaves it alone: its response probe still reads its tokens."""
    rows, bank, steered, told = left_alone()
    rows.preempt("r")
    assert rows.outcome(steered, *told).decision is Decision.ABSTAIN
    rows.resume("r")
    assert run_observed(rows, bank, 1.0, ("r", 4, 0)) == {"r": (2, 1.0)}
    assert run_observed(rows, bank, 1.0, ("r", 1, 4)) == {}
    assert rows.requests == {}


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
