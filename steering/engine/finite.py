"""The finite check: which requests with a row have residuals that are no numbers any more.

What is not finite at one layer stays so up to the last norm, and a later token that attends to such a key is not finite
either. So the output of the model is looked at once a step, on the device, beside the row map that is there already; a
flag per row comes back with what else a step makes known. Off by default, and then nothing of it runs.

Knows nothing of vLLM.
"""

from __future__ import annotations

from queue import Empty, SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steering.engine.kernels import BROKEN, PLACE
from steering.engine.rows import Rows
from steering.engine.uploads import RowDownload

BROKEN_REQUESTS = "trimtab_broken"
"""Attribute of vLLM's `ModelRunnerOutput`: ids of requests to be ended."""


def mark(hidden: Tensor, token_rows: Tensor, rows: Tensor) -> None:
    """Mark the rows of which a token is not finite; never waits for the device.

    Args:
        hidden: [T, D] output of the model, padding included.
        token_rows, rows: as `kernels` says; column BROKEN of `rows` is written.
    """
    number = token_rows[: len(hidden)].abs() & ((1 << PLACE) - 1)
    is_broken = ~torch.isfinite(hidden).all(dim=-1) & (number != 0)
    rows[:, BROKEN].index_add_(0, number, is_broken.to(rows.dtype))


class FiniteCheck:
    """The check of one worker."""

    def __init__(self, rows: Rows, download: RowDownload) -> None:
        self._rows, self._download = rows, download
        self._found: SimpleQueue[str] = SimpleQueue()

    def after_forward(self) -> None:
        """Read the flags of the step whose forward pass has just been launched, once it has run."""
        requests = self._rows.requests
        if not requests:
            return

        def find(table: NDArray[np.float32]) -> None:
            for number in np.flatnonzero(table[:, BROKEN]).tolist():
                if number in requests:
                    self._found.put(requests[number])

        self._download.then(find)

    def take(self) -> tuple[str, ...]:
        """Requests found since the last call; on a device perhaps a step late."""
        found: dict[str, None] = {}
        while True:
            try:
                found[self._found.get_nowait()] = None
            except Empty:
                return tuple(found)
