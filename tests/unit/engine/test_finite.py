"""The finite check: a row is marked by its own tokens alone, and its request is named once it was seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steering.engine.bank import Bank
from steering.engine.finite import FiniteCheck, mark
from steering.engine.kernels import BROKEN, MUTED, PLACE, ROW_WIDTH
from steering.engine.rows import Rows
from steering.engine.uploads import RowDownload
from tests.samples import WIDTH, bundle_in_memory, plan_for, random_edit
from tests.unit.engine.steps import row_of


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_marked_by_their_own_tokens(wrong: float, dtype: torch.dtype) -> None:
    """Untouched tokens mark nobody, padding neither; deciding, observed and muted entries are those of their row."""
    entries = [0, 1, 1, -2, 3 | (1 << PLACE), 4 | (1 << MUTED), 5]
    token_rows = torch.tensor([*entries, 0, 0, 6, 0, 0], dtype=torch.int32)
    rows, hidden = torch.zeros(8, ROW_WIDTH), torch.randn(9, WIDTH).to(dtype)
    for token in (0, 2, 3, 4, 5, 7):
        hidden[token, token] = wrong
    mark(hidden, token_rows, rows)
    assert (rows[:, BROKEN] != 0).tolist() == [False, True, True, True, True, False, False, False]
    rows[:, BROKEN] = 0
    assert not rows.any()


def test_a_request_is_named_until_its_row_is_anothers() -> None:
    """Named at the step it broke in, not by a finite one; the next request in its row starts unmarked."""
    bank = Bank(layers=[0], width=WIDTH, terms=8, device=torch.device("cpu"))
    bundle = bundle_in_memory({"e": random_edit("e", ranks={0: 1})})
    bank.load(bundle)
    rows = Rows(bank=bank, requests=2, tokens=8, device=torch.device("cpu"))
    check = FiniteCheck(rows, RowDownload(rows.rows))
    for name in ("good", "bad"):
        rows.add(name, plan_for("e", bundle=bundle.digest), 2)

    def step(names: list[str], hidden: torch.Tensor) -> list[str]:
        due = rows.write_step(names, np.full(len(names), 2, dtype=np.int32), np.zeros(len(names), dtype=np.int32))
        mark(hidden, rows.token_rows, rows.rows)
        check.after_forward()
        return [rows.outcome(steered, *row_of(rows, steered)).error for steered in due.outcomes]

    hidden = torch.zeros(4, WIDTH)
    hidden[3, 0] = float("nan")
    assert step(["good", "bad"], hidden) == ["", "the residuals are not finite"]
    assert check.take() == ("bad",)
    assert check.take() == ()
    rows.remove("bad")
    rows.add("next", plan_for("e", bundle=bundle.digest), 2)
    assert step(["next"], torch.zeros(2, WIDTH)) == [""]
    assert check.take() == ()
