"""A layer's prepared edit is the op, with less asked for."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from msgspec import structs

from steering.engine import kernels
from steering.engine.bank import Bank
from steering.engine.prepared import PreparedEdit, prepare
from steering.engine.rows import Rows
from steering.gate import Probe
from tests.samples import bundle_in_memory, gate_plan, random_edit, random_probe
from tests.unit.engine.cases import DTYPES, check, random_case


@pytest.mark.parametrize("is_called_by_op", [False, True], ids=["called", "called by the op"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("is_strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("seed", range(12))
def test_prepared_edit_is_the_algebra(dtype: torch.dtype, is_strided: bool, is_called_by_op: bool, seed: int) -> None:
    """Mixed batches of edits, gates and probes, as the op does them; untouched tokens keep every bit."""
    case = random_case(seed, dtype=dtype, is_strided=is_strided)
    prepared = prepare(*case.arguments[2:])
    assert prepared is not None
    if is_called_by_op:
        torch.ops.trimtab.edit(*case.arguments)
    else:
        prepared(*case.arguments[:2])
    check(case, f"seed {seed}")


def test_the_op_asks_the_prepared_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that has one is edited by it, also in compiled code, where the op is all that calls."""
    case, calls = random_case(0, dtype=torch.bfloat16), []
    prepare(*case.arguments[2:])
    monkeypatch.setattr(PreparedEdit, "__call__", lambda *given: calls.append(given))
    torch.ops.trimtab.edit(*case.arguments)

    def block(*given: torch.Tensor) -> None:
        torch.ops.trimtab.edit(*given)

    torch.compile(block, fullgraph=True, backend="aot_eager")(*case.arguments)
    assert len(calls) == 2


def test_nothing_is_touched_when_no_token_is_steered() -> None:
    """A count of 0 ends it at once."""
    case = random_case(1, dtype=torch.bfloat16)
    case.arguments[2][-kernels.COUNTS :] = 0
    prepared = prepare(*case.arguments[2:])
    assert prepared is not None
    prepared(*case.arguments[:2])
    assert torch.equal(case.hidden, case.before)
    assert case.arguments[4][0, 2 * 48 + kernels.FIRST] == 0.0


def test_a_layer_with_nothing_to_do_in_a_step_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate's layer is run where a gate decides, that of a response probe where it reads, an edit's for both and ever
    after; none is once its bundle is unloaded.
    """
    ran: list[int] = []
    monkeypatch.setattr(
        "steering.engine.prepared.run", lambda hidden, residual, token_rows, rows, table: ran.append(len(hidden))
    )
    gate = Probe(name="probe", layer=0, categories=("safety",), weight=torch.zeros(2, 16), bias=torch.ones(2))
    bank = Bank(layers=(0, 1, 2), width=16, terms=8, device=torch.device("cpu"))
    edits = {"a": random_edit("a", ranks={1: 1})}
    response = random_probe("response", layer=2, categories=()), 2
    bundle = bundle_in_memory(edits, gates={"gate": (gate, {"safety": "a"}, {})}, response=response)
    bank.load(bundle)
    rows = Rows(bank=bank, requests=2, tokens=8, device=torch.device("cpu"))
    layers = [PreparedEdit(rows.token_rows, rows.rows, bank.tables[layer]) for layer in (0, 1, 2)]

    def runs(tokens: int, computed: int) -> list[int]:
        ran.clear()
        rows.write_step(["r"], np.array([tokens], dtype=np.int32), np.array([computed], dtype=np.int32))
        for place, layer in enumerate(layers):
            before = len(ran)
            layer(torch.zeros(tokens, 16), torch.zeros(tokens, 16))
            ran[before:] = [place] * (len(ran) - before)
        return ran

    rows.add("r", structs.replace(gate_plan("gate"), response=True), 3)
    assert runs(2, 0) == []
    assert runs(1, 2) == [0, 1]
    assert [list(runs(1, computed)) for computed in (3, 4, 5)] == [[1, 2], [1, 2], [1]]
    bank.unload(bundle.digest)
    assert runs(1, 6) == []


def test_tables_end_with_their_engine() -> None:
    """What hangs on a table does not keep it alive: an engine that ends gives its memory back."""
    table = random_case(0, dtype=torch.float32).arguments[4].clone()
    prepare(torch.zeros(10, dtype=torch.int32), torch.zeros(3, kernels.ROW_WIDTH), table)
    gone = weakref.ref(table)
    del table
    gc.collect()
    assert gone() is None


def test_the_triton_kernel_is_never_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the Triton kernel is asked for on the CPU, nothing is prepared."""
    monkeypatch.setenv("TRIMTAB_KERNEL", "triton")
    assert prepare(*random_case(0, dtype=torch.float32).arguments[2:]) is None
