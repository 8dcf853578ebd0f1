"""Block: tokens of a step that all share one edit, edited on the CPU by matrix products. Knows nothing of gates.

So it is while a long prompt is read that is edited at all positions. Products use all threads that vLLM gives torch,
and read directions once per `PIECE` of tokens, which the loop of `compiled` does once per token. Sums are ordered
otherwise than there, so that, as with vLLM's own products, the last bit may depend on how a prompt was chunked.

Shapes: `T` tokens of the step, `R` rank of the edit, `D` residual width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steering.engine.kernels import BIAS, COUNT, EDIT, FIRST, GAIN, PLACE, SCALARS, STRENGTH

SHORTEST = 128
"""Tokens; of fewer the loop has edited all before their shares are known to be equal."""

LEAST_WORK = 4096
"""Rank times width, below which the loop is as fast (one core of an EPYC, 128 to 2048 tokens, width 256 and 4096)."""

PIECE = 128
"""Tokens at a time, so that what is computed stays in the processor's cache."""


def edit_block(hidden: Tensor, residual: Tensor, token_rows: Tensor, rows: Tensor, table: Tensor) -> bool:
    """Do what the steering op does, if all tokens share one edit and nothing but an edit is asked of them.

    Arguments are those of the op, as `kernels` describes them.

    Returns:
        Whether it was done; where not, nothing was written.
    """
    count, width = hidden.shape
    of_token = token_rows.numpy()
    row = int(of_token[0])
    # A negative entry decides; bits from `PLACE` on ask for a response probe, or keep the edit off.
    if count < SHORTEST or row <= 0 or row >> PLACE or (of_token[:count] != row).any():
        return False
    edit, strength = int(rows[row, EDIT]), float(rows[row, STRENGTH])
    scalars = table[:, 2 * width : 2 * width + SCALARS]
    first, rank = int(scalars[edit, FIRST]), int(scalars[edit, COUNT])
    if rank * width < LEAST_WORK:
        return False
    terms = slice(first, first + rank)
    read, write = table[terms, :width].t(), table[terms, width : 2 * width]
    gain, bias = strength * scalars[terms, GAIN], strength * scalars[terms, BIAS]
    nothing = torch.zeros(())
    for start in range(0, count, PIECE):
        piece = hidden[start : start + PIECE]
        wide = piece.to(torch.float32, copy=True)
        shares = torch.mm(wide + residual[start : start + PIECE], read)
        # A term without gain reads nothing, also where the residual is infinite.
        wide.addmm_(torch.where(gain == 0, nothing, shares * gain).add_(bias), write)
        piece.copy_(wide)
    scalars[0, FIRST] = 1
    return True
