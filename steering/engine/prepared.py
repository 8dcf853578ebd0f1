"""Prepared: a layer's steering op on the CPU, with all that stays the same between steps asked for once.

Without a compiler layers call it in place of the op: what torch's dispatcher, look-ups of buffers and views take is
most of the op's time there, since a step of a small model finds none of it in the processor's caches.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from steering.engine.block import SHORTEST, edit_block
from steering.engine.compiled import run, steer_at
from steering.engine.kernels import COUNTS, EDITS, GATE_COUNT, PREPARED, SCALARS


class PreparedEdit:
    """What `torch.ops.trimtab.edit` does, for one layer.

    Args:
        token_rows, rows, table: those of the op, as `kernels` describes them; on the CPU, never moved.
    """

    def __init__(self, token_rows: Tensor, rows: Tensor, table: Tensor) -> None:
        self._views = token_rows.detach(), rows.detach(), table.detach()  # an attribute of `table` must not hold it
        self._counts = token_rows.numpy()[-COUNTS:]
        scalars = table.shape[1] - SCALARS
        self._here = self._views[2].numpy()[0, scalars + EDITS : scalars + GATE_COUNT + 1]
        self._places = token_rows.data_ptr(), rows.data_ptr(), len(rows), table.data_ptr(), *table.shape

    def __call__(self, hidden: Tensor, residual: Tensor) -> None:
        """Edit `hidden` in place; both [T, D]."""
        touched, decided, observed = self._counts.tolist()
        if not touched:
            return
        edits, readers = self._here.tolist()
        if not (edits or (decided and readers >= 1.0) or (observed and readers % 1.0)):
            return
        count = hidden.shape[0]
        if count >= SHORTEST and edit_block(hidden, residual, *self._views):
            return
        # Addresses: to have torch and NumPy make views of five tensors takes longer than to edit a few tokens. So does
        # every question to a tensor, which is why there are so few.
        stride, other = hidden.stride(), residual.stride()
        if hidden.dtype is torch.bfloat16 and stride[1] == other[1] == 1:
            steer_at(hidden.data_ptr(), stride[0], residual.data_ptr(), other[0], count, *self._places)
        else:
            run(hidden, residual, *self._views)


def prepare(token_rows: Tensor, rows: Tensor, table: Tensor) -> PreparedEdit | None:
    """Have the op find a layer's `PreparedEdit` at its table; None where the Triton kernel edits."""
    if table.device.type != "cpu" or os.environ.get("TRIMTAB_KERNEL") == "triton":
        return None
    prepared = PreparedEdit(token_rows, rows, table)
    setattr(table, PREPARED, prepared)
    return prepared
