"""Uploads: copies between host arrays and fixed device tensors that never wait for the device.

On the CPU the tensor is the array, and nothing is copied. Knows nothing of requests.

Shapes: `S` rows, `W` columns of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Result = TypeVar("Result")


class _Turns:
    """Two pinned copies of each of some tensors; the host may fill one while the other is in flight."""

    def __init__(self, targets: Sequence[Tensor]) -> None:
        self._sets = [[torch.zeros_like(target, device="cpu", pin_memory=True) for target in targets] for _ in range(2)]
        self._events = [torch.cuda.Event() for _ in range(2)]
        self._turn = 0

    def next(self) -> list[Tensor]:
        """The tensors to fill; waits only if their last copy, two turns ago, has not ended."""
        self._events[self._turn].synchronize()
        return self._sets[self._turn]

    def sent(self) -> None:
        """Their copies have been queued."""
        self._events[self._turn].record()
        self._turn = 1 - self._turn


class MapUpload:
    """Writes the leading entries of a flat int32 tensor; on the CPU all of it.

    Attributes:
        here: on the CPU, the tensor's own memory: whoever writes it needs no `send`. None on a device.
    """

    def __init__(self, target: Tensor) -> None:
        self._target = target
        # The tensor stays where it is: to ask for its array at every step costs more than a row does.
        self.here: NDArray[np.int32] | None = target.numpy() if target.device.type == "cpu" else None
        self._turns = _Turns([target]) if self.here is None else None

    def array(self) -> NDArray[np.int32]:
        """The host array to fill before `send`."""
        if self._turns is None:
            assert self.here is not None
            return self.here
        array: NDArray[np.int32] = self._turns.next()[0].numpy()
        return array

    def send(self, length: int) -> None:
        """Copy the first `length` entries; ordered on the current stream before the step's kernels."""
        if self._turns is not None:
            self._target[:length].copy_(self._turns.next()[0][:length], non_blocking=True)
            self._turns.sent()


class RowUpload:
    """Writes whole rows of a table [S, W] and leaves the others, which the device may have written, as they are.

    Attributes:
        waiting: rows that `send` would write; none on the CPU.
    """

    def __init__(self, target: Tensor) -> None:
        self._target = target
        self._turns: _Turns | None = None
        self.waiting: set[int] = set()
        # [S, W] of which rows are sent; on the CPU it is the table.
        self._array: NDArray[np.float32] = target.numpy() if target.device.type == "cpu" else target.cpu().numpy()
        # Bytes of the same memory: to have NumPy write a row costs several times as much.
        self._bytes, self._pitch = self._array.data.cast("B"), self._array.strides[0]
        if target.device.type != "cpu":
            self._staged = [
                torch.zeros_like(target),
                torch.zeros(len(target), dtype=torch.int64, device=target.device),
            ]
            self._turns = _Turns(self._staged)

    def write(self, number: int, row: bytes) -> None:
        """Write a row, as `kernels.ROW` packs it, with the next `send`; on the CPU now."""
        self._bytes[number * self._pitch : (number + 1) * self._pitch] = row
        if self._turns is not None:
            self.waiting.add(number)

    def send(self) -> None:
        """Write what is waiting; ordered on the current stream before the step's kernels."""
        if self._turns is None:
            return
        chosen = np.asarray(sorted(self.waiting), dtype=np.int64)
        self.waiting.clear()
        count = len(chosen)
        pinned_rows, pinned_numbers = self._turns.next()
        pinned_rows.numpy()[:count] = self._array[chosen]
        pinned_numbers.numpy()[:count] = chosen
        for staged, pinned in zip(self._staged, (pinned_rows, pinned_numbers), strict=True):
            staged[:count].copy_(pinned[:count], non_blocking=True)
        self._turns.sent()
        self._target.index_copy_(0, self._staged[1][:count], self._staged[0][:count])


class RowDownload:
    """Reads a table [S, W] as it is once the work queued so far has been done, without stopping the host for it.

    On a device a thread of its own waits for the copy; on the CPU everything has been done when it is asked.

    Attributes:
        table: bytes of [S, W] float32 on the CPU, to be read at once; None on a device.
    """

    def __init__(self, source: Tensor) -> None:
        self._source = source
        self._free: list[Tensor] = []
        self._array: NDArray[np.float32] | None = source.numpy() if source.device.type == "cpu" else None
        self.table: memoryview | None = None if self._array is None else self._array.data.cast("B")
        self._thread = ThreadPoolExecutor(1, "trimtab-outcomes") if self._array is None else None

    def then(self, work: Callable[[NDArray[np.float32]], Result]) -> Future[Result] | None:
        """Call `work(table)` with a host array [S, W] that is valid during the call.

        Returns:
            What ends with it, and has its result; None where it has ended, as on the CPU.
        """
        if self._thread is None:
            assert self._array is not None
            work(self._array)
            return None
        pinned = self._free.pop() if self._free else torch.empty_like(self._source, device="cpu", pin_memory=True)
        pinned.copy_(self._source, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return self._thread.submit(self._wait, event, pinned, work)

    def settle(self) -> None:
        """Wait until all work asked for so far has been done."""
        if self._thread is not None:
            self._thread.submit(lambda: None).result()

    def _wait(self, event: torch.cuda.Event, pinned: Tensor, work: Callable[[NDArray[np.float32]], Result]) -> Result:
        event.synchronize()
        try:
            return work(pinned.numpy())
        finally:
            self._free.append(pinned)


class Taken:
    """Rows copied out of a device buffer, perhaps still on their way."""

    def __init__(
        self, rows: Tensor, count: int, event: torch.cuda.Event | None = None, pool: SimpleQueue[Tensor] | None = None
    ) -> None:
        self._rows, self._count, self._event, self._pool = rows, count, event, pool

    def array(self) -> NDArray[np.float32]:
        """The rows [n, ...], once they are here, in memory of their own. To be called once, from any thread."""
        rows: NDArray[np.float32] = self._rows.numpy()[: self._count]
        if self._event is not None and self._pool is not None:
            self._event.synchronize()
            rows = rows.copy()
            self._pool.put(self._rows)
        return rows


class SlotDownload:
    """Copies rows 1 to n of a buffer [K + 1, ...] to the host without stopping it.

    Two copies may be in flight; a third waits for the first to be read, which bounds what is held in pinned memory.
    """

    def __init__(self, source: Tensor) -> None:
        self._source = source
        self._pool: SimpleQueue[Tensor] | None = None
        if source.device.type != "cpu":
            self._pool = SimpleQueue()
            for _ in range(2):
                self._pool.put(torch.empty_like(source[1:], device="cpu", pin_memory=True))

    def take(self, count: int) -> Taken:
        """Rows 1 to `count` as the work queued so far leaves them."""
        rows = self._source[1 : count + 1]
        if self._pool is None:
            return Taken(rows.clone(), count)
        pinned = self._pool.get()
        pinned[:count].copy_(rows, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Taken(pinned, count, event, self._pool)
