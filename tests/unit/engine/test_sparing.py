"""Spared reasoning: which positions are edited, over the op and the rows, in every way a request can be computed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from steering.engine.bank import Bank
from steering.engine.kernels import MUTED, spare_compiled
from steering.engine.rows import Rows
from steering.errors import UnknownName
from steering.gate import Probe
from steering.plan import Plan, Reasoning
from tests.samples import DIGEST, bundle_in_memory, gate_plan, plan_for, random_edit
from tests.unit.engine.sparing import END, judge_sparing
from tests.unit.engine.steps import row_of

CPU = torch.device("cpu")
EDITS = {"e": random_edit("e", ranks={0: 1})}
LARGEST = 2**24 - 1


def rows_of(end: int | None = END, **named: object) -> tuple[Rows, Bank]:
    """Rows over a bank of a bundle that spares reasoning up to `end`."""
    bank = Bank(layers=(0,), width=16, terms=8, device=CPU)
    bank.load(bundle_in_memory(EDITS, reasoning_end=end, **named))  # type: ignore[arg-type]
    return Rows(bank=bank, requests=8, tokens=64, device=CPU), bank


def sparing(edit: str = "e") -> Plan:
    """A plan that spares reasoning."""
    return Plan(id="p", bundle=DIGEST, edit=edit, strength=1.0, reasoning=Reasoning.SPARED)


def run(rows: Rows, *parts: tuple[str, list[int], int, int]) -> dict[str, list[bool]]:
    """A step of (request, all its tokens, first position, tokens); by request, which of them would be edited."""
    due = rows.write_step(
        [name for name, *_ in parts],
        np.array([count for *_, count in parts], dtype=np.int32),
        np.array([first for *_, first, _ in parts], dtype=np.int32),
    )
    ids = [token for _, tokens, first, count in parts for token in tokens[first : first + count]]
    torch.ops.trimtab.spare(torch.tensor(ids, dtype=torch.int32), rows.token_rows, rows.rows)
    entries = rows.token_rows.tolist()
    assert all(rows.outcome(each, *row_of(rows, each)).reasoning for each in due.outcomes)
    edited, start = {}, 0
    for name, _, _, count in parts:
        edited[name] = [entry != 0 and not abs(entry) >> MUTED for entry in entries[start : start + count]]
        start += count
    return edited


def positions(tokens: list[int], prompt: int) -> list[bool]:
    """The meaning of spared, one position at a time."""
    if END in tokens[max(prompt - 8, 0) : prompt]:
        return [position >= prompt - 1 for position in range(len(tokens))]
    ends = [position for position in range(prompt, len(tokens)) if tokens[position] == END]
    return [bool(ends) and position >= ends[0] for position in range(len(tokens))]


@pytest.mark.parametrize("seed", range(40))
def test_the_op_is_the_reference(seed: int) -> None:
    """Several rows in a step, ends at their first and last token and between, none, and rows that never wait."""
    judge_sparing(spare_compiled, seed)


@pytest.mark.parametrize("seed", range(60))
def test_the_same_positions_are_edited_however_a_request_is_computed(seed: int) -> None:
    """Chunks, decoding, preemption in mid-reasoning and after it, with any part found in the cache, in either runner;
    prompts that hold the end early, among their last tokens, or not.
    """
    draw = random.Random(seed)
    rows, _ = rows_of()
    live = {}
    for number in range(4):
        prompt, length = draw.randint(1, 20), draw.randint(2, 30)
        tokens = [draw.choice([END, *range(10, 40)]) for _ in range(prompt + length)]
        live[f"r{number}"] = tokens, prompt
    computed = {}
    for name, (tokens, prompt) in live.items():
        computed[name] = draw.randint(0, prompt - 1)
        rows.add(name, sparing(), prompt, tokens[:prompt], computed[name])
    known = {name: prompt for name, (_, prompt) in live.items()}
    for _ in range(40):
        parts = []
        for name, (tokens, prompt) in live.items():
            if draw.random() < 0.15:
                rows.preempt(name)
                computed[name] = draw.randint(0, known[name] - 1)
                if draw.random() < 0.5:
                    rows.resume(name, tokens[: known[name]], computed[name])
                else:
                    rows.add(name, sparing(), prompt, tokens[: known[name]], computed[name])
            count = min(draw.randint(1, 9), known[name] - computed[name])
            if count and draw.random() < 0.9:
                parts.append((name, tokens, computed[name], count))
        if not parts:
            continue
        for name, edited in run(rows, *parts).items():
            tokens, prompt = live[name]
            assert edited == positions(tokens, prompt)[computed[name] : computed[name] + len(edited)]
            computed[name] += len(edited)
            if computed[name] == known[name] < len(tokens):
                known[name] += 1


def test_a_gate_decides_on_the_last_prompt_token_though_its_edit_waits() -> None:
    """The latch is written, nothing is edited before the end, and its token is; another request is edited as ever."""
    probe = Probe(name="probe", layer=0, categories=("test",), weight=torch.ones(2, 16), bias=torch.zeros(2))
    rows, bank = rows_of(gates={"gate": (probe, {"test": "e"}, {"test": "e"})})
    plan = gate_plan("gate")
    order = Plan(id="p", bundle=plan.bundle, gate=plan.gate, strength=1.0, reasoning=Reasoning.SPARED)
    tokens = [1, 2, 3, 4, END, 5]
    rows.add("r", order, 3, tokens[:3], 0)
    rows.add("s", plan_for("e"), 3, tokens[:3], 0)
    for first, count, changed in ((0, 3, [False] * 5 + [True]), (3, 1, [False, True]), (4, 1, [True, True])):
        due = rows.write_step(["r", "s"], np.array([count] * 2, dtype=np.int32), np.array([first] * 2, dtype=np.int32))
        ids = torch.tensor(tokens[first : first + count] * 2, dtype=torch.int32)
        torch.ops.trimtab.spare(ids, rows.token_rows, rows.rows)
        hidden = torch.ones(2 * count, 16)
        torch.ops.trimtab.edit(hidden, torch.zeros(2 * count, 16), rows.token_rows, rows.rows, bank.tables[0])
        assert (hidden != 1).any(1).tolist() == changed
        for each in due.outcomes:
            outcome = rows.outcome(each, *row_of(rows, each))
            is_first = outcome.request_id == "r"
            assert outcome.applied
            assert outcome.edit == "e"
            assert outcome.reasoning is (Reasoning.SPARED if is_first else Reasoning.EDITED)
            assert (outcome.decision is not None) == is_first


def test_the_largest_id_a_bundle_may_name_is_told_from_its_neighbours() -> None:
    """One more than it is the largest whole number up to which float32 holds them all; larger ids are refused."""
    rows, _ = rows_of(end=LARGEST)
    tokens = [1, LARGEST - 1, LARGEST + 1, LARGEST + 2, 2**31 - 1, LARGEST, 2]
    rows.add("r", sparing(), 1, tokens[:1], 0)
    assert run(rows, ("r", tokens, 0, 7)) == {"r": [False] * 5 + [True] * 2}
    with pytest.raises(ValueError, match="less than 16777216"):
        rows_of(end=LARGEST + 1)


def test_a_bundle_that_spares_nothing_takes_no_such_request() -> None:
    """The op does not run for it, so that the request must not either."""
    rows, bank = rows_of(end=None)
    assert not bank.is_sparing
    with pytest.raises(UnknownName, match="spares reasoning"):
        rows.add("r", sparing(), 1, [1], 0)
    assert rows.live == 0
