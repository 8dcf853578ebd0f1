"""The steering op on the CPU: it is the algebra of `steering.terms` on x = hidden + residual, and nothing more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steering.engine import kernels
from tests.unit.engine.cases import DTYPES, check, random_case


def run(arguments: tuple[Tensor, ...]) -> None:
    """Call the registered op, as the model does."""
    torch.ops.trimtab.edit(*arguments)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("is_strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("seed", range(12))
def test_op_is_the_algebra(dtype: torch.dtype, is_strided: bool, seed: int) -> None:
    """Mixed batches of edits of ranks 1 to 8 with gain and bias; untouched tokens keep every bit."""
    case = random_case(seed, dtype=dtype, is_strided=is_strided)
    run(case.arguments)
    check(case, f"seed {seed}")


def test_every_strided_neighbour_is_left_alone() -> None:
    """Where hidden is a slice of something wider, what lies between its rows is not written."""
    wide = torch.randn(6, 32)
    before, case = wide.clone(), random_case(0, dtype=torch.float32, width=16)
    hidden = wide[:, 8:24]
    token_rows = torch.tensor([1, 0, 1, 0, 1, 0, 3, 0, 0], dtype=torch.int32)
    run((hidden, torch.randn(6, 16), token_rows, *case.arguments[3:]))
    assert torch.equal(wide[:, :8], before[:, :8])
    assert torch.equal(wide[:, 24:], before[:, 24:])


def test_nothing_is_read_or_written_when_no_token_is_steered() -> None:
    """A count of 0 in the last entry ends the op at once, whatever stands before it: an idle plugin costs one look."""
    case = random_case(1, dtype=torch.bfloat16)
    case.arguments[2][-kernels.COUNTS :] = 0
    run(case.arguments)
    assert torch.equal(case.hidden, case.before)
    assert case.arguments[4][0, 2 * 48 + kernels.FIRST] == 0.0


def test_rows_beyond_the_step_are_not_read() -> None:
    """Only the first T entries of the map belong to the step; padding behind them may hold anything."""
    case = random_case(2, dtype=torch.float32)
    hidden, residual, token_rows, rows, table = case.arguments
    padding, counts = torch.full((9,), 10**6, dtype=torch.int32), token_rows[-kernels.COUNTS :]
    longer = torch.cat([token_rows[: len(hidden)], padding, counts])
    run((hidden, residual, longer, rows, table))
    check(case, "padded map")


def test_a_step_without_tokens_is_allowed() -> None:
    """T = 0 does nothing."""
    case = random_case(3, dtype=torch.float32)
    empty = torch.empty(0, 48)
    run((empty, empty, *case.arguments[2:]))
    assert empty.shape == (0, 48)


@pytest.mark.parametrize("seed", range(3))
def test_schema_fake_and_functionalisation_hold(seed: int) -> None:
    """Torch's own check: the schema's claim of what is written is true, fake tensors and AOT dispatch agree.

    The witness cell and the latch are written too and left out of the schema on purpose (see `kernels`); here the
    witness is set before the check, no gate decides and no probe observes, so that the op leaves both as they are.
    """
    case = random_case(seed, dtype=torch.float32)
    case.arguments[4][0, 2 * 48 + kernels.FIRST] = 1.0
    case.arguments[2][: -kernels.COUNTS].abs_().bitwise_and_((1 << kernels.PLACE) - 1)
    case.arguments[2][[kernels.DECIDED, kernels.OBSERVED]] = 0
    torch.library.opcheck(torch.ops.trimtab.edit.default, case.arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_code_around_the_op_gives_the_same(dtype: torch.dtype) -> None:
    """torch.compile keeps the op whole, in order and in place between the computations around it."""

    def block(hidden: Tensor, residual: Tensor, token_rows: Tensor, rows: Tensor, table: Tensor) -> Tensor:
        hidden = hidden * 2
        torch.ops.trimtab.edit(hidden, residual, token_rows, rows, table)
        return hidden + residual

    case = random_case(2, dtype=dtype)
    case.arguments[1].nan_to_num_()  # so that equal is equal
    eager = block(*case.arguments)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(*case.arguments), eager)
    case.arguments[2].zero_()
    assert torch.equal(compiled(*case.arguments), case.hidden * 2 + case.arguments[1])
    assert not torch.equal(eager, case.hidden * 2 + case.arguments[1])
