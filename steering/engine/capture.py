"""Capture: residuals of chosen tokens, on their way from a running engine to files.

An operator starts an engine with layers and a folder; a request may then ask, with an index of its own, that the
residuals at its last prompt token, and at the first tokens generated after it, be kept under that index. Positions
decide, never phases, so that chunked prefill, a prefix-cache hit, recomputation after a preemption and n > 1 give each
residual once. Knows nothing of vLLM's classes.

Shapes: `B` requests of a step, `K` tokens captured in a step, `L` captured layers, `D` residual width, `G` generated
tokens kept at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import steering.engine.capture_op  # noqa: F401 - defines torch.ops.trimtab.capture
from steering.engine.capture_writer import CaptureWriter, Place
from steering.engine.options import CaptureSettings
from steering.engine.outcomes import sample_of
from steering.engine.uploads import MapUpload, SlotDownload
from steering.errors import InvalidSpec

CAPTURE_KEY = "trimtab_capture"
"""Key of a request's wish in `SamplingParams.extra_args`: its index, or [index, tokens of the prompt] where an answer
is given with the prompt. The gateway sends no such key and takes none from clients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureOrder:
    """What a request wants kept.

    Attributes:
        index: under which; 0 or more, and unique among the requests of a folder.
        prompt_length: where its prompt ends; None where all its tokens are prompt.
    """

    index: int
    prompt_length: int | None = None


def capture_of(request: Any) -> CaptureOrder | None:
    """What a vLLM request, or its `NewRequestData`, wants kept; None for nothing.

    Raises:
        InvalidSpec: there is a wish and it is not valid.
    """
    parameters = request.sampling_params
    extra = parameters.extra_args if parameters is not None else None
    given = extra.get(CAPTURE_KEY) if extra else None
    if given is None:
        return None
    numbers = list(given) if isinstance(given, list | tuple) else [given]
    if not all(type(number) is int for number in numbers) or len(numbers) not in (1, 2) or numbers[0] < 0:
        raise InvalidSpec(f"{CAPTURE_KEY} must be an index or [index, tokens of the prompt], got {given!r}")
    if len(numbers) == 1:
        return CaptureOrder(index=numbers[0])
    if numbers[1] < 1:
        raise InvalidSpec(f"{CAPTURE_KEY}: a prompt has at least one token, got {numbers[1]}")
    return CaptureOrder(index=numbers[0], prompt_length=numbers[1])


@dataclass(slots=True, kw_only=True, eq=False)
class _Captured:
    """A request with positions still to be captured: `next` to `last`."""

    index: int
    first: int
    next: int
    last: int


class Capture:
    """What one worker captures.

    Args:
        settings: layers, folder and how much.
        layers: decoder blocks that are captured, ascending.
        width: of the residual stream, D.
        requests: most requests that can run at once; vLLM's `max_num_seqs`.
        tokens: most tokens of a step; vLLM's `max_num_batched_tokens`.
        device: where the buffers live, for ever at the same address.
        is_writing: False on every rank but the first: residuals are the same on all of them.

    Attributes:
        slots: [tokens + 1] int32, as `capture_op` says.
    """

    def __init__(
        self,
        settings: CaptureSettings,
        *,
        layers: tuple[int, ...],
        width: int,
        requests: int,
        tokens: int,
        device: torch.device,
        is_writing: bool,
    ) -> None:
        self.layers = layers
        self._generated = settings.generated
        most = min(tokens, requests * (1 + settings.generated))
        # Slots first, so that what a step captured lies together for one copy.
        self._kept = torch.zeros(most + 1, len(layers), width, dtype=torch.float32, device=device)
        self.slots = torch.zeros(tokens + 1, dtype=torch.int32, device=device)
        self._upload, self._download = MapUpload(self.slots), SlotDownload(self._kept)
        self._writer = CaptureWriter(settings, layers=layers, width=width) if is_writing else None
        self._wanting: dict[str, _Captured] = {}
        self._owner: dict[int, str] = {}
        """By index the request whose residuals are kept."""
        self._due: list[Place] = []
        self._written = 0
        """Leading entries of `slots` that may differ from 0."""

    @property
    def live(self) -> int:
        """Requests with positions still to be captured."""
        return len(self._wanting)

    @property
    def count(self) -> int:
        """Indexes of which residuals are in files, or on their way there."""
        return len(self._writer.done) if self._writer is not None else 0

    def kept(self, layer: int) -> Tensor:
        """[K + 1, D] the buffer of one layer."""
        return self._kept[:, self.layers.index(layer)]

    def add(self, request_id: str, order: CaptureOrder, prompt_length: int) -> None:
        """A request that asks starts, or comes back after a preemption.

        Of n > 1 samples the first is captured. Nothing is done for an index that another request has, or that is in a
        file already.

        Args:
            request_id: the engine's id of the sample.
            order: what it wants kept.
            prompt_length: number of prompt tokens, without tokens generated before a preemption.
        """
        if sample_of(request_id) != 0 or order.index in self._owner:
            return
        if self._writer is not None and order.index in self._writer.done:
            return
        first = (order.prompt_length or prompt_length) - 1
        self._owner[order.index] = request_id
        self._wanting[request_id] = _Captured(index=order.index, first=first, next=first, last=first + self._generated)

    def remove(self, request_id: str) -> None:
        """Forget a request that ended; one that did not get as far as its last prompt token leaves its index free."""
        captured = self._wanting.pop(request_id, None)
        if captured is None:
            return
        if captured.next == captured.first:
            del self._owner[captured.index]
        elif self._writer is not None:
            self._writer.end(captured.index)

    def write_step(
        self, request_ids: Sequence[str], tokens: NDArray[np.integer], computed: NDArray[np.integer]
    ) -> None:
        """Write where every token of the next step goes; arguments as of `Rows.write_step`."""
        places: list[int] = []
        if self._wanting:
            starts = np.cumsum(tokens) - tokens
            for request_id, start, first, count in zip(request_ids, starts, computed, tokens, strict=True):
                captured = self._wanting.get(request_id)
                if captured is None:
                    continue
                end = min(int(first + count), captured.last + 1)
                # A position below `first` was not computed here and never will be: it came from the prefix cache.
                for position in range(max(captured.next, int(first)), end):
                    places.append(int(start) + position - int(first))
                    self._due.append(Place(index=captured.index, place=position - captured.first))
                captured.next = max(captured.next, end)
                if captured.next > captured.last:
                    del self._wanting[request_id]
        if not places and not self._written:
            return
        target = self._upload.array()
        target[: self._written] = 0
        target[places] = np.arange(1, len(places) + 1)
        target[-1] = len(places)
        length = max(self._written, max(places, default=-1) + 1)
        self._upload.send(length)
        self._written = max(places, default=-1) + 1

    def after_forward(self) -> None:
        """Hand over what the step captured; called once its forward pass has been launched without an error."""
        if not self._due:
            return
        due, self._due = self._due, []
        if self._writer is not None:
            self._writer.put(due, self._download.take(len(due)))

    def flush(self) -> int:
        """Write what has come so far into files and wait for it.

        Returns:
            How many indexes are in files.

        Raises:
            CaptureError: something could not be written.
        """
        return self._writer.flush() if self._writer is not None else 0
