"""The steering op: one call per steered layer lets gates decide and edits every steered token of the step.

`torch.ops.trimtab.edit(hidden, residual, token_rows, rows, table)` has two implementations with one contract: plain
torch (CPU, and the reference) and a Triton kernel (CUDA). It is opaque to the compiler and no splitting op, so full
CUDA graphs stay whole; only the contents of its fixed buffers change between steps.

Shapes: `T` tokens of the step, `M` most tokens of a step, `S` rows, `N` terms of a layer's table, `D` residual width.

    hidden      [T, D]      the half of the residual stream that is written; strides of the row are free
    residual    [T, D]      the other half: x = hidden + residual (vLLM's fused norms add them later)
    token_rows  [M + 2]     int32, row of each token; 0 means untouched, a negative number that the gate of that row
                            decides on this token. On the CPU the last two entries are the numbers of steered and of
                            deciding tokens, so that an idle step costs one comparison
    rows        [S, 28]     float32, what differs per live request, laid out as below; row 0 is zero
    table       [N, 2D + 8] float32, one layer's bank: columns 0…D-1 read, D…2D-1 write, then the scalars below

Packing a layer's bank into one tensor, and a request's parameters and latch into one row, keeps the op at five tensor
arguments: every further one costs host time at each launch.

A gate decides once per request, in the pass that reads the last prompt token, at its probe's layer and before that
layer's edit. It writes edit and strength into its own row, on the device: this layer's edit, those of the layers above
and those of every later step read them there (the latch). The host reads the row afterwards, to tell what was decided.
"""

from __future__ import annotations

import os
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steering.manifest import MAX_CATEGORIES

GAIN, BIAS, FIRST, COUNT = 0, 1, 2, 3
"""Scalar columns of a table, counted from column 2D: gain and bias of term n; first term and number of terms of edit n.
Edit 0 is "none"; its FIRST cell is the witness: 1 once this op edited a token."""

GATE_FIRST, GATE_COUNT, REFUSE_EDIT, COMPLY_EDIT = 4, 5, 6, 7
"""More of them. Gate n has its GATE_COUNT scores in the terms from GATE_FIRST on: read and bias of the first are those
of the refusal score, each other one is a category's, with the edits that category gets; 0 is none. Gate 0 is "none";
its GATE_COUNT cell is the number of gates at this layer."""

SCALARS = 8
"""How many of them there are; a multiple of 4 keeps every row 16-byte aligned where D is."""

EDIT, STRENGTH, STATE, GATE, LOW, HIGH, FACTOR, ALLOWED, GRADED, CATEGORY, SCORES = range(11)
"""Columns of a row: edit and strength that are read at every layer; state of the latch; the gate's number, its two
thresholds as log-odds, the strength it gives, the allowed categories as bits, 1 for graded strength; what it wrote: the
category's index and the scores."""

ROW_WIDTH = 28
"""`SCORES`, the refusal score and `MAX_CATEGORIES` others, and one to make it a multiple of 4."""


class Latch(IntEnum):
    """State of a row: whether a gate decides, and what it decided."""

    FIXED = 0
    PENDING = 1
    REFUSE = 2
    COMPLY = 3
    ABSTAIN = 4
    FAILED = 5


_LIBRARY = torch.library.Library("trimtab", "FRAGMENT")

assert SCORES + 1 + MAX_CATEGORIES < ROW_WIDTH


def table_width(width: int) -> int:
    """Columns of a layer's table for a residual stream of `width`."""
    return 2 * width + SCALARS


def edit_reference(hidden: Tensor, residual: Tensor, token_rows: Tensor, rows: Tensor, table: Tensor) -> None:
    """Plain torch on the CPU; sums in float32, rounded once when `hidden` is written.

    Index arithmetic is done in NumPy, on views of the same memory: a call costs a tenth of what torch's would, and at
    the few tokens of a decoding step calls are all there is.
    """
    of_step = token_rows.numpy()
    if of_step[-2] == 0:
        return
    width, number_of, bank = hidden.shape[-1], rows.numpy(), table.numpy()
    of_token = of_step[: hidden.shape[0]]
    if of_step[-1] and bank[0, 2 * width + GATE_COUNT]:
        _decide(hidden, residual, of_token, number_of, bank)
    at = np.flatnonzero(of_token)
    row = np.abs(of_token[at])
    edit = number_of[row, EDIT].astype(np.int64)
    count = bank[edit, 2 * width + COUNT]
    if not count.all():
        at, row, edit, count = (values[count > 0] for values in (at, row, edit, count))
    if at.size == 0:
        return
    first, strength = bank[edit, 2 * width + FIRST].astype(np.int64), number_of[row, STRENGTH]
    where = None if at.size == hidden.shape[0] else torch.from_numpy(at)
    old = (hidden if where is None else hidden[where]).to(torch.float32)
    x = old + (residual if where is None else residual[where])
    if (edit == edit[0]).all():
        total = _one_edit(x, table[first[0] : first[0] + int(count[0])], torch.from_numpy(strength))
    else:
        total = _many_edits(x.numpy(), bank, first, count.astype(np.int64), strength)
    new = (old + total).to(hidden.dtype)
    if where is None:
        hidden.copy_(new)
    else:
        hidden[where] = new
    bank[0, 2 * width + FIRST] = 1.0


def _one_edit(x: Tensor, terms: Tensor, strength: Tensor) -> Tensor:
    """What is added to all rows of `x` [n, D] under the same terms [R, 2D + 8]: two products of matrices."""
    width = x.shape[-1]
    gain, bias = terms[:, 2 * width + GAIN], terms[:, 2 * width + BIAS]
    coefficients = bias.expand(len(x), -1)
    # A term without gain reads nothing, also where x is infinite.
    reads = gain != 0
    if bool(reads.all()):
        coefficients = (x @ terms[:, :width].T).mul_(gain).add_(bias)
    elif bool(reads.any()):
        coefficients = coefficients.clone()
        coefficients[:, reads] += (x @ terms[reads, :width].T).mul_(gain[reads])
    return (coefficients * strength.unsqueeze(1)) @ terms[:, width : 2 * width]


def _many_edits(
    x: NDArray[np.float32],
    bank: NDArray[np.float32],
    first: NDArray[np.int64],
    count: NDArray[np.int64],
    strength: NDArray[np.float32],
) -> Tensor:
    """What is added to each row of `x` [n, D] under the terms that begin at its `first` [n]."""
    width = x.shape[1]
    total = np.zeros_like(x)
    for offset in range(int(count.max())):
        at = np.flatnonzero(offset < count)
        term = bank[first[at] + offset]
        gain, coefficient = term[:, 2 * width + GAIN], term[:, 2 * width + BIAS]
        if gain.any():
            read = np.einsum("nd,nd->n", x[at], term[:, :width])
            coefficient = coefficient + np.where(gain != 0, gain * read, 0)
        total[at] += (strength[at] * coefficient)[:, None] * term[:, width : 2 * width]
    return torch.from_numpy(total)


def _decide(
    hidden: Tensor,
    residual: Tensor,
    of_token: NDArray[np.int32],
    rows: NDArray[np.float32],
    bank: NDArray[np.float32],
) -> None:
    """Let the gates of this layer decide for the tokens that say so; `steering.gate.rule` for many rows at a time."""
    width = hidden.shape[-1]
    deciding = np.flatnonzero(of_token < 0)
    gate_of = rows[-of_token[deciding], GATE].astype(np.int64)
    for gate in np.unique(gate_of):
        first, count = bank[gate, 2 * width + GATE_FIRST : 2 * width + REFUSE_EDIT].astype(np.int64)
        if count == 0:  # it reads at another layer
            continue
        at = torch.from_numpy(deciding[gate_of == gate])
        row = -of_token[at.numpy()]
        terms = bank[first : first + count]
        x = (hidden[at].to(torch.float32) + residual[at]).numpy()
        with np.errstate(invalid="ignore", over="ignore"):
            scores = x @ terms[:, :width].T + terms[:, 2 * width + BIAS]
        _latch(rows, row, scores, terms[1:, 2 * width + REFUSE_EDIT : 2 * width + COMPLY_EDIT + 1])


def _latch(
    rows: NDArray[np.float32], row: NDArray[np.int32], scores: NDArray[np.float32], edits: NDArray[np.float32]
) -> None:
    """Write what follows from `scores` [n, 1 + C] into the rows; `edits` [C, 2] are those to refuse and to comply."""
    is_finite = np.isfinite(scores).all(1)
    refusal = scores[:, 0]
    is_allowed = (rows[row, ALLOWED].astype(np.int64)[:, None] >> np.arange(len(edits))) & 1
    category = np.where(is_allowed == 1, scores[:, 1:], -np.inf).argmax(1)
    low, high, factor = rows[row, LOW], rows[row, HIGH], rows[row, FACTOR]
    side = np.where(refusal >= high, Latch.REFUSE, np.where(refusal <= low, Latch.COMPLY, Latch.ABSTAIN))
    chosen = np.where(side == Latch.ABSTAIN, 0, edits[category, (side == Latch.COMPLY).astype(np.int64)])
    side = np.where(chosen == 0, Latch.ABSTAIN, side)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        probability, floor, ceiling = (1 / (1 + np.exp(-values)) for values in (refusal, low, high))
        is_refusal = side == Latch.REFUSE
        room = np.where(is_refusal, 1 - ceiling, floor)
        way = np.where(is_refusal, probability - ceiling, floor - probability)
        share = np.where((rows[row, GRADED] != 0) & (room > 0), np.clip(way / room, 0, 1), 1)
    is_applied = is_finite & (chosen != 0) & (factor != 0)
    rows[row, EDIT] = np.where(is_applied, chosen, 0)
    rows[row, STRENGTH] = np.where(is_applied, factor * share, 0)
    rows[row, STATE] = np.where(is_finite, side, Latch.FAILED)
    rows[row, CATEGORY] = category
    rows[row, SCORES : SCORES + scores.shape[1]] = scores


def edit_triton(hidden: Tensor, residual: Tensor, token_rows: Tensor, rows: Tensor, table: Tensor) -> None:
    """The Triton kernel: one program per token, which leaves at once when its row is 0."""
    from steering.engine.triton_kernel import launch

    launch(hidden, residual, token_rows, rows, table)


def _edit_fake(hidden: Tensor, residual: Tensor, token_rows: Tensor, rows: Tensor, table: Tensor) -> None:
    """Shapes for the compiler: the op returns nothing and writes `hidden` in place."""


def _define() -> None:
    # The latch in `rows` and the witness cell of `table` are written too. Both are left out of the schema on purpose:
    # in a compiled graph only this op reads them, its calls are ordered by `hidden`, which runs through all of them,
    # and declaring them would make the compiler copy both tensors at every call.
    _LIBRARY.define("edit(Tensor(a!) hidden, Tensor residual, Tensor token_rows, Tensor rows, Tensor table) -> ()")
    on_cpu: Any = edit_triton if os.environ.get("TRIMTAB_KERNEL") == "triton" else edit_reference
    _LIBRARY.impl("edit", on_cpu, "CPU")
    _LIBRARY.impl("edit", edit_triton, "CUDA")
    torch.library.register_fake("trimtab::edit", _edit_fake, lib=_LIBRARY)


_define()
