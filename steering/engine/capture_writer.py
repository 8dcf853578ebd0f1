"""Capture writer: a thread that puts captured residuals into safetensors shards.

    capture-00000.safetensors   index [n] int64; layer.<l> [n, D] float32, the residuals at the last prompt token;
                                generated.<l> [n, G, D] float32 and mask [n, G] bool where generated tokens are kept

A shard appears whole or not at all, and a folder that holds some is gone on with. Rows come in any order; their index
says whose they are. `steering.fit.captured` reads the files. Knows nothing of requests.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from steering.engine.options import CaptureSettings
from steering.engine.uploads import Taken
from steering.errors import CaptureError

IDLE_SECONDS = 30.0
"""After this long without anything new, what is complete is written, however little."""

MOST_WAITING = 64
"""Steps whose residuals may wait for the thread; a disk that is slower than the engine holds the engine up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Whose residual it is, and 0 for that at the last prompt token, 1 for that at the first generated one."""

    index: int
    place: int


class CaptureWriter:
    """Collects residuals by index and writes them as they become complete.

    Args:
        settings: folder, generated tokens and size of shards.
        layers: in the order of the residuals.
        width: of the residual stream, D.

    Attributes:
        done: indexes in files already when the thread started, and those handed over since.

    Raises:
        CaptureError: the folder holds residuals of other layers or of another number of generated tokens.
    """

    def __init__(self, settings: CaptureSettings, *, layers: tuple[int, ...], width: int) -> None:
        self._folder, self._layers, self._generated = settings.folder, layers, settings.generated
        self._shape = (1 + settings.generated, len(layers), width)
        self._most = max(1, settings.shard_bytes // (4 * int(np.prod(self._shape))))
        self._facts = {"layers": json.dumps(layers), "generated": str(settings.generated), "width": str(width)}
        self._folder.mkdir(parents=True, exist_ok=True)
        self.done, self._number = self._found()
        self._in_files = len(self.done)
        self._open: dict[int, tuple[NDArray[np.float32], NDArray[np.bool_]]] = {}
        self._complete: list[int] = []
        self._error: BaseException | None = None
        self._queue: Queue[tuple[list[Place], Taken] | int | Future[int]] = Queue(MOST_WAITING)
        threading.Thread(target=self._work, name="trimtab-capture", daemon=True).start()

    def put(self, places: Sequence[Place], taken: Taken) -> None:
        """Hand over the residuals [n, L, D] that belong to these places."""
        self.done.update(place.index for place in places)
        self._queue.put((list(places), taken))

    def end(self, index: int) -> None:
        """No more residuals of this index will come."""
        self._queue.put(index)

    def flush(self) -> int:
        """Write everything that is complete and wait for it; indexes in files then.

        Raises:
            CaptureError: something could not be written.
        """
        written: Future[int] = Future()
        self._queue.put(written)
        return written.result()

    def _found(self) -> tuple[set[int], int]:
        """Indexes in the folder's shards, and the number of the next shard."""
        found: set[int] = set()
        numbers = [-1]
        for partial in self._folder.glob("capture-*.part"):
            partial.unlink()
        for path in shard_files(self._folder):
            try:
                with safe_open(path, framework="np") as shard:
                    facts, indexes = shard.metadata() or {}, shard.get_tensor("index")
            except (OSError, SafetensorError) as error:
                raise CaptureError(f"{path} cannot be read: {error}; remove it to capture its prompts again") from error
            if facts != self._facts:
                raise CaptureError(
                    f"{path} holds residuals of other layers or tokens ({facts}) than are to be captured now "
                    f"({self._facts}); name an empty folder"
                )
            found.update(indexes.tolist())
            numbers.append(int(path.stem.rpartition("-")[2]))
        return found, max(numbers) + 1

    def _work(self) -> None:
        while True:
            try:
                message = self._queue.get(timeout=IDLE_SECONDS if self._complete else None)
            except Empty:
                message = None
            try:
                self._take(message)
            except Exception as error:  # noqa: BLE001 - kept for `flush`, which everyone calls who reads the files
                self._error = self._error or error
            if isinstance(message, Future):
                if self._error is None:
                    message.set_result(self._in_files)
                else:
                    message.set_exception(CaptureError(f"residuals cannot be written: {self._error}"))

    def _take(self, message: tuple[list[Place], Taken] | int | Future[int] | None) -> None:
        if isinstance(message, tuple):
            places, taken = message
            for place, rows in zip(places, taken.array(), strict=True):
                self._fill(place, rows)
        elif isinstance(message, int) and message in self._open:
            self._complete.append(message)
        while len(self._complete) >= self._most:
            self._write(self._complete[: self._most])
        if self._complete and (message is None or isinstance(message, Future)):
            self._write(list(self._complete))

    def _fill(self, place: Place, rows: NDArray[np.float32]) -> None:
        if place.index not in self._open:
            self._open[place.index] = np.zeros(self._shape, dtype=np.float32), np.zeros(self._shape[0], dtype=np.bool_)
        residuals, mask = self._open[place.index]
        residuals[place.place] = rows
        mask[place.place] = True
        if mask.all():
            self._complete.append(place.index)

    def _write(self, indexes: list[int]) -> None:
        del self._complete[: len(indexes)]
        parts = [self._open.pop(index) for index in indexes]
        # Without its last prompt token an index is as good as not captured: readers find it missing.
        kept = [(index, part) for index, part in zip(indexes, parts, strict=True) if part[1][0]]
        if not kept:
            return
        residuals = np.stack([part[0] for _, part in kept])
        tensors: dict[str, NDArray[np.generic]] = {"index": np.array([index for index, _ in kept], dtype=np.int64)}
        for number, layer in enumerate(self._layers):
            tensors[f"layer.{layer}"] = np.ascontiguousarray(residuals[:, 0, number])
            if self._generated:
                tensors[f"generated.{layer}"] = np.ascontiguousarray(residuals[:, 1:, number])
        if self._generated:
            tensors["mask"] = np.ascontiguousarray(np.stack([part[1][1:] for _, part in kept]))
        path = self._folder / f"capture-{self._number:05d}.safetensors"
        partial = path.with_suffix(".part")
        save_file(tensors, partial, metadata=self._facts)
        partial.replace(path)
        self._number += 1
        self._in_files += len(kept)


def shard_files(folder: Path) -> list[Path]:
    """The shards of a folder in the order they were written."""
    return sorted(folder.glob("capture-*.safetensors"))
