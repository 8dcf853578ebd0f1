"""The steering op: one call per steered layer edits every steered token of the step.

`torch.ops.trimtab.edit(hidden, residual, token_rows, rows, table)` has two implementations with one contract: plain
torch (CPU, and the reference) and a Triton kernel (CUDA). It is opaque to the compiler and no splitting op, so full
CUDA graphs stay whole; only the contents of its fixed buffers change between steps.

Shapes: `T` tokens of the step, `M` most tokens of a step, `S` rows, `N` terms of a layer's table, `D` residual width.

    hidden      [T, D]      the half of the residual stream that is written; strides of the row are free
    residual    [T, D]      the other half: x = hidden + residual (vLLM's fused norms add them later)
    token_rows  [M + 1]     int32, row of each token; 0 means untouched; on the CPU the last entry is the number of
                            steered tokens, so that an idle step costs one comparison
    rows        [S, 2]      float32, (edit, strength) of each live request; row 0 is (0, 0)
    table       [N, 2D + 4] float32, one layer's bank: columns 0…D-1 read, D…2D-1 write, 2D gain, 2D+1 bias of term n;
                            columns 2D+2, 2D+3 of row e: first term and number of terms of edit e; edit 0 is "none",
                            and its first-term cell is the witness: 1 once this op edited a token

Packing a layer's bank into one tensor keeps the op at five tensor arguments: every further one costs host time at each
launch.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

GAIN, BIAS, FIRST, COUNT = 0, 1, 2, 3
"""Offsets of the scalar columns of a table, counted from column 2D."""

SCALARS = 4
"""How many of them there are; a multiple of 4 keeps every row 16-byte aligned where D is."""

_LIBRARY = torch.library.Library("trimtab", "FRAGMENT")


def table_width(width: int) -> int:
    """Columns of a layer's table for a residual stream of `width`."""
    return 2 * width + SCALARS


def edit_reference(hidden: Tensor, residual: Tensor, token_rows: Tensor, rows: Tensor, table: Tensor) -> None:
    """Plain torch on the CPU; sums in float32, rounded once when `hidden` is written."""
    if token_rows[-1].item() == 0:
        return
    width = hidden.shape[-1]
    of_token = token_rows[: hidden.shape[0]]
    at = of_token.nonzero().squeeze(1)
    if at.numel() == 0:
        return
    edit, strength = rows[of_token[at]].unbind(1)
    first, count = table[edit.long(), 2 * width + FIRST :].long().unbind(1)
    most = int(count.max())
    if most == 0:
        return
    old = hidden[at].to(torch.float32)
    x = old + residual[at].to(torch.float32)
    total = torch.zeros_like(x)
    for offset in range(most):
        is_term = offset < count
        term = table[torch.where(is_term, first + offset, 0)]
        gain, bias = term[:, 2 * width + GAIN], term[:, 2 * width + BIAS]
        coefficient = strength * is_term * (gain * (x * term[:, :width]).sum(-1) + bias)
        total.addcmul_(coefficient.unsqueeze(1), term[:, width : 2 * width])
    hidden[at] = (old + total).to(hidden.dtype)
    table[0, 2 * width + FIRST] = 1.0


def edit_triton(hidden: Tensor, residual: Tensor, token_rows: Tensor, rows: Tensor, table: Tensor) -> None:
    """The Triton kernel: one program per token, which leaves at once when its row is 0."""
    from steering.engine.triton_kernel import launch

    launch(hidden, residual, token_rows, rows, table)


def _edit_fake(hidden: Tensor, residual: Tensor, token_rows: Tensor, rows: Tensor, table: Tensor) -> None:
    """Shapes for the compiler: the op returns nothing and writes `hidden` in place."""


def _define() -> None:
    # The witness cell of `table` is written too. It is left out of the schema on purpose: nothing in a compiled graph
    # reads it, and declaring it would make the compiler copy the whole table at every call.
    _LIBRARY.define("edit(Tensor(a!) hidden, Tensor residual, Tensor token_rows, Tensor rows, Tensor table) -> ()")
    on_cpu: Any = edit_triton if os.environ.get("TRIMTAB_KERNEL") == "triton" else edit_reference
    _LIBRARY.impl("edit", on_cpu, "CPU")
    _LIBRARY.impl("edit", edit_triton, "CUDA")
    torch.library.register_fake("trimtab::edit", _edit_fake, lib=_LIBRARY)


_define()
