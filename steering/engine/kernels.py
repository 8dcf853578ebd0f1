"""The steering ops: one call per steered layer lets gates decide and edits every steered token of the step; one call
per step, where reasoning can be spared, keeps the edit off it.

`torch.ops.trimtab.edit(hidden, residual, token_rows, rows, table)` has two implementations with one contract: a loop
that Numba compiles (CPU, `compiled.py`) and a Triton kernel (CUDA, `triton_kernel.py`); the reference of both is
`steering.terms` and `steering.gate`. It is opaque to the compiler and no splitting op, so full CUDA graphs stay whole;
only the contents of its fixed buffers change between steps.

Shapes: `T` tokens of the step, `M` most tokens of a step, `S` rows, `N` terms of a layer's table, `D` residual width.

    hidden      [T, D]      the half of the residual stream that is written; strides of the row are free
    residual    [T, D]      the other half: x = hidden + residual (vLLM's fused norms add them later)
    token_rows  [M + 3]     int32, row of each token; 0 means untouched, a negative number that the gate of that row
                            decides on this token. From bit `PLACE` on it holds 1 to 8 where the response probe of the
                            row reads this token: the how manieth generated token it is. On the CPU the last entries
                            are the numbers of touched tokens, of those that a gate decides on and of those that a
                            response probe reads, so that a layer that has nothing to do in a step leaves at once. Bit
                            `MUTED` of the absolute value keeps the edit, and nothing else, off this token
    rows        [S, 40]     float32, what differs per live request, laid out as below; row 0 is zero
    table       [N, 2D + 8] float32, one layer's bank: columns 0…D-1 read, D…2D-1 write, then the scalars below

Packing a layer's bank into one tensor, and a request's parameters and latch into one row, keeps the op at five tensor
arguments: every further one costs host time at each launch.

A gate decides once per request, in the pass that reads the last prompt token, at its probe's layer and before that
layer's edit. It writes edit and strength into its own row, on the device: this layer's edit, those of the layers above
and those of every later step read them there (the latch). The host reads the row afterwards, to tell what was decided.

A response probe writes the score of each generated token it reads into a cell of its own, so that a token that is
computed again changes nothing.

`torch.ops.trimtab.spare(input_ids, token_rows, rows)` runs before the first layer of a model whose bundles spare
reasoning; with asynchronous scheduling only the device knows the tokens. A row that waits for the token at which
reasoning ends has the tokens before it muted; that token, whose pass predicts the first of the answer, is edited, and
the row waits no more. Tokens of a row are consecutive in a step: on a device the program at the first of them does all
of them, so that no two write the same row.

    input_ids   [T]         the step's tokens, int32 or int64; token_rows and rows as above, both written
"""

from __future__ import annotations

import os
import struct
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from steering.manifest import MAX_CATEGORIES, MAX_RESPONSE_TOKENS

GAIN, BIAS, FIRST, COUNT = 0, 1, 2, 3
"""Scalar columns of a table, counted from column 2D: gain and bias of term n; first term and number of terms of edit n.
Edit 0 is "none"; its FIRST cell is the witness: 1 once this op edited a token."""

GATE_FIRST, GATE_COUNT, REFUSE_EDIT, COMPLY_EDIT = 4, 5, 6, 7
"""More of them. Gate n has its GATE_COUNT scores in the terms from GATE_FIRST on: read and bias of the first are those
of the refusal score, each other one is a category's, with the edits that category gets; 0 is none. A response probe is
a gate of one score. Gate 0 is "none"; its GATE_COUNT cell is the number of gates at this layer, and one `OF_RESPONSE`
for each response probe."""

OF_RESPONSE = 2.0**-12
"""Its share in that cell, so that both can be told."""

EDITS = GATE_FIRST
"""Of gate 0 this cell is the number of edits at this layer."""

SCALARS = 8
"""How many of them there are; a multiple of 4 keeps every row 16-byte aligned where D is."""

EDIT, STRENGTH, STATE, GATE, LOW, HIGH, FACTOR, ALLOWED, GRADED, CATEGORY, SCORES = range(11)
"""Columns of a row: edit and strength that are read at every layer; state of the latch; the gate's number, its two
thresholds as log-odds, the strength it gives, the allowed categories as bits, 1 for graded strength; what it wrote: the
category's index and the scores."""

RESPONSE = SCORES + 1 + MAX_CATEGORIES
"""Column of a row: number of the response probe, 0 for none. Its scores follow, one per generated token."""

AWAITED = RESPONSE + 1 + MAX_RESPONSE_TOKENS
"""Column of a row: one more than the id of the token at which reasoning ends, while it is waited for; 0 otherwise."""

BROKEN = AWAITED + 1
"""Column of a row: not 0 once the finite check has seen what is no number in a token of it; see `finite.py`."""

ROW_WIDTH = 40
"""A multiple of 4."""

ROW = struct.Struct(f"{ROW_WIDTH}f")
"""How a row lies in the host's memory."""

COUNTS = 3
"""Entries of `token_rows` behind those of tokens."""

TOUCHED, DECIDED, OBSERVED = -3, -2, -1
"""Which they are, on the CPU."""

PLACE = 24
"""First bit of an entry of `token_rows` that is not the row's number; four bits."""

MUTED = 28
"""The bit after them."""


class Latch(IntEnum):
    """State of a row: whether a gate decides, and what it decided."""

    FIXED = 0
    PENDING = 1
    REFUSE = 2
    COMPLY = 3
    ABSTAIN = 4
    FAILED = 5


PREPARED = "steering_prepared"
"""Attribute of a table on the CPU: its layer's `PreparedEdit`, which edits as this op does and asks for less."""

_LIBRARY = torch.library.Library("trimtab", "FRAGMENT")

assert BROKEN < ROW_WIDTH
assert 1 << (MUTED - PLACE) > MAX_RESPONSE_TOKENS


def table_width(width: int) -> int:
    """Columns of a layer's table for a residual stream of `width`."""
    return 2 * width + SCALARS


def edit_compiled(hidden: Tensor, residual: Tensor, token_rows: Tensor, rows: Tensor, table: Tensor) -> None:
    """The CPU's: leaves at once where no token is steered, else one compiled loop over them, or matrix products where
    they share one edit.
    """
    prepared = getattr(table, PREPARED, None)
    if prepared is None:  # of no engine's
        from steering.engine.prepared import PreparedEdit

        prepared = PreparedEdit(token_rows, rows, table)
    prepared(hidden, residual)


def edit_triton(hidden: Tensor, residual: Tensor, token_rows: Tensor, rows: Tensor, table: Tensor) -> None:
    """The Triton kernels, one program per token in each: gates decide in the first, edits are made in the second."""
    from steering.engine.triton_kernel import launch

    launch(hidden, residual, token_rows, rows, table)


def _edit_fake(hidden: Tensor, residual: Tensor, token_rows: Tensor, rows: Tensor, table: Tensor) -> None:
    """Shapes for the compiler: the op returns nothing and writes `hidden` in place."""


def spare_compiled(input_ids: Tensor, token_rows: Tensor, rows: Tensor) -> None:
    """The CPU's: leaves at once where no token is steered."""
    if token_rows.numpy()[TOUCHED]:
        from steering.engine.compiled import spare

        spare(input_ids, token_rows, rows)


def spare_triton(input_ids: Tensor, token_rows: Tensor, rows: Tensor) -> None:
    """The Triton kernel: one program per token, of which the first of each row that waits does that row's."""
    from steering.engine.triton_kernel import launch_spare

    launch_spare(input_ids, token_rows, rows)


def _spare_fake(input_ids: Tensor, token_rows: Tensor, rows: Tensor) -> None:
    """Shapes for the compiler: the op returns nothing."""


def _define() -> None:
    # The latch in `rows` and the witness cell of `table` are written too. Both are left out of the schema on purpose:
    # in a compiled graph only this op reads them, its calls are ordered by `hidden`, which runs through all of them,
    # and declaring them would make the compiler copy both tensors at every call.
    _LIBRARY.define("edit(Tensor(a!) hidden, Tensor residual, Tensor token_rows, Tensor rows, Tensor table) -> ()")
    _LIBRARY.define("spare(Tensor input_ids, Tensor(a!) token_rows, Tensor(b!) rows) -> ()")
    is_triton = os.environ.get("TRIMTAB_KERNEL") == "triton"
    on_cpu: tuple[Any, Any] = (edit_triton, spare_triton) if is_triton else (edit_compiled, spare_compiled)
    for name, of_cpu, of_cuda, fake in (
        ("edit", on_cpu[0], edit_triton, _edit_fake),
        ("spare", on_cpu[1], spare_triton, _spare_fake),
    ):
        _LIBRARY.impl(name, of_cpu, "CPU")
        _LIBRARY.impl(name, of_cuda, "CUDA")
        torch.library.register_fake(f"trimtab::{name}", fake, lib=_LIBRARY)


_define()
