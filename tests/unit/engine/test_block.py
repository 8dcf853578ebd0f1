"""Block: matrix products make the edit that the compiled loop makes, where all tokens share one, and only there."""

from __future__ import annotations

import pytest
import torch

from steering.engine import block, compiled, prepared
from steering.engine.kernels import (
    BIAS,
    COUNT,
    COUNTS,
    EDIT,
    EDITS,
    FIRST,
    GAIN,
    MUTED,
    PLACE,
    ROW_WIDTH,
    SCALARS,
    STRENGTH,
    TOUCHED,
)

TOKENS, ROW = block.SHORTEST + 37, 3


def step(*, width: int, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Arguments of the op: a prompt all of whose tokens read one row, whose edit has that rank."""
    draw = torch.Generator().manual_seed(rank * width)
    hidden = torch.randn(TOKENS, 2 * width, generator=draw).to(dtype)[:, :width]  # rows lie apart
    residual = torch.randn(TOKENS, width, generator=draw).to(dtype)
    table = torch.zeros(rank + 3, 2 * width + SCALARS)
    table[2 : 2 + rank, : 2 * width] = torch.randn(rank, 2 * width, generator=draw) / width**0.5
    scalars = table[:, 2 * width :]
    scalars[2 : 2 + rank, GAIN] = torch.randn(rank, generator=draw)
    scalars[2 : 2 + rank : 2, GAIN] = 0.0
    scalars[2 : 2 + rank, BIAS] = torch.randn(rank, generator=draw)
    scalars[1, FIRST], scalars[1, COUNT] = 2, rank
    scalars[0, EDITS] = 1
    rows = torch.zeros(5, ROW_WIDTH)
    rows[ROW, EDIT], rows[ROW, STRENGTH] = 1, -1.5
    token_rows = torch.zeros(2 * TOKENS + COUNTS, dtype=torch.int32)
    token_rows[:TOKENS] = ROW
    token_rows[TOUCHED] = TOKENS
    return hidden, residual, token_rows, rows, table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "rank"), [(block.LEAST_WORK // 32, 32), (block.LEAST_WORK, 1)])
def test_a_shared_edit_is_the_loops(width: int, rank: int, dtype: torch.dtype) -> None:
    """To rounding, for every dtype, rank and pieces that do not come out even; the witness is left likewise."""
    mine, loop = step(width=width, rank=rank, dtype=dtype), step(width=width, rank=rank, dtype=dtype)
    before = mine[0].clone()
    assert block.edit_block(*mine)
    compiled.run(*loop)
    assert not torch.equal(mine[0], before)
    torch.testing.assert_close(mine[0], loop[0], rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
    for one, other in zip(mine[1:], loop[1:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("place", "entry"),
    [
        (TOKENS - 1, 0),
        (TOKENS - 1, -ROW),
        (TOKENS // 2, ROW + 1),
        (0, ROW | 1 << PLACE),
        (slice(0, TOKENS), ROW | 1 << MUTED),
        (slice(0, TOKENS), -ROW),
    ],
    ids=["untouched", "deciding", "another row", "observed", "muted", "all deciding"],
)
def test_anything_else_is_left_to_the_loop(place: int | slice, entry: int) -> None:
    """One token of another kind, or all: nothing is written."""
    arguments = step(width=block.LEAST_WORK // 32, rank=32, dtype=torch.float32)
    arguments[2][place] = entry
    before = [each.clone() for each in arguments]
    assert not block.edit_block(*arguments)
    for each, was in zip(arguments, before, strict=True):
        assert torch.equal(each, was)


def test_small_edits_are_left_to_the_loop() -> None:
    """Where it is as fast: few terms, or none at this layer."""
    assert not block.edit_block(*step(width=block.LEAST_WORK // 32, rank=31, dtype=torch.float32))
    arguments = step(width=block.LEAST_WORK, rank=1, dtype=torch.float32)
    arguments[3][ROW, EDIT] = 0
    assert not block.edit_block(*arguments)


def test_a_term_without_gain_reads_nothing_infinite() -> None:
    """As in the loop: the edit of an infinite residual is its bias alone, and no NaN."""
    arguments = step(width=block.LEAST_WORK, rank=1, dtype=torch.float32)
    hidden, residual = arguments[0].clone(), arguments[1]
    residual[5] = torch.inf
    assert block.edit_block(*arguments)
    assert arguments[0].isfinite().all()
    assert not torch.equal(arguments[0][5], hidden[5])


def test_the_op_takes_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registered op edits a shared block without the loop, and calls the loop for all else."""
    calls = []
    monkeypatch.setattr(prepared, "steer_at", lambda *arguments: calls.append(arguments))
    arguments = step(width=block.LEAST_WORK // 32, rank=32, dtype=torch.bfloat16)
    before = arguments[0].clone()
    torch.ops.trimtab.edit(*arguments)
    assert not calls
    assert not torch.equal(arguments[0], before)
    arguments[2][0] = 0
    torch.ops.trimtab.edit(*arguments)
    assert len(calls) == 1
