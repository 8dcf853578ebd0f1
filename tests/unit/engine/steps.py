"""Steps: rows over a small bank, and what a scheduler and a forward pass do to them."""

from __future__ import annotations

import numpy as np
import torch

from steering.engine.bank import Bank
from steering.engine.kernels import COUNTS, ROW
from steering.engine.rows import Rows
from steering.engine.steered import Steered
from steering.gate import Probe
from steering.outcome import Outcome
from tests.samples import bundle_in_memory, random_edit

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
    return [rows.outcome(steered, *row_of(rows, steered)) for steered in due.outcomes]


def row_of(rows: Rows, steered: Steered) -> tuple[memoryview, int]:
    """A copy of the rows as they are, and where in it the request's begins."""
    return memoryview(rows.rows.numpy().tobytes()), steered.row * ROW.size


def decide(rows: Rows, bank: Bank, residual: torch.Tensor) -> None:
    """Run the op of the last step on this residual, alike for every token: what a forward pass does to the rows."""
    tokens = len(rows.token_rows) - COUNTS
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
