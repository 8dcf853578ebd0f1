"""Rows: what differs per request, and which row each token of a step reads.

The host keeps a row per live steered request and writes, once per step, one row number per token. Both model runners
use it in the same way. Knows nothing of vLLM.

Shapes: `B` requests of a step, `T` tokens of a step, `S` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steering.engine.bank import Bank
from steering.errors import CapacityExceeded
from steering.plan import Outcome, Plan, Scope

_NEVER = np.iinfo(np.int64).max // 2
"""First edited position of row 0."""


@dataclass(slots=True, kw_only=True)
class _Steered:
    """A live steered request; `row` is 0 while it waits after a preemption."""

    plan: Plan
    prompt_length: int
    row: int = 0
    is_reported: bool = False


class _Upload:
    """Copies a host array into a fixed device tensor without waiting for the device.

    On the CPU the tensor is the array. On a device two pinned buffers take turns, so that the host may fill one for the
    next step while the copy of the other is in flight.
    """

    def __init__(self, target: Tensor) -> None:
        self._target = target
        self._on_host = target.device.type == "cpu"
        self._turn = 0
        if self._on_host:
            self._arrays = [target.numpy()]
        else:
            self._pinned = [torch.zeros_like(target, device="cpu", pin_memory=True) for _ in range(2)]
            self._arrays = [pinned.numpy() for pinned in self._pinned]
            self._events = [torch.cuda.Event() for _ in range(2)]

    def array(self) -> NDArray[np.generic]:
        """The host array to fill before `send`; waits only if its last copy, two steps ago, has not ended."""
        if not self._on_host:
            self._events[self._turn].synchronize()
        return self._arrays[self._turn]

    def send(self, length: int) -> None:
        """Copy the first `length` entries; ordered on the current stream before the step's kernels."""
        if self._on_host:
            return
        self._target[:length].copy_(self._pinned[self._turn][:length], non_blocking=True)
        self._events[self._turn].record()
        self._turn = 1 - self._turn


class Rows:
    """Row table and per-token map of one worker.

    Args:
        bank: names the edits.
        requests: most requests that can run at once; vLLM's `max_num_seqs`.
        tokens: most tokens of a step; vLLM's `max_num_batched_tokens`.
        device: where the buffers live, for ever at the same address.

    Attributes:
        rows: [S, 2] float32, (edit number, strength).
        token_rows: [tokens + 1] int32; the last entry is the number of steered tokens of the step, kept on the CPU
            only, where the op reads it to leave at once.
    """

    def __init__(self, *, bank: Bank, requests: int, tokens: int, device: torch.device) -> None:
        # Twice as many as can run: with asynchronous scheduling a finished request may be dropped a step late.
        self.capacity = 2 * requests
        self.rows = torch.zeros(self.capacity + 1, 2, dtype=torch.float32, device=device)
        self.token_rows = torch.zeros(tokens + 1, dtype=torch.int32, device=device)
        self._bank = bank
        self._requests: dict[str, _Steered] = {}
        self._row_of: dict[str, int] = {}
        self._free = list(range(self.capacity, 0, -1))
        self._first_edited = np.full(self.capacity + 1, _NEVER, dtype=np.int64)
        self._host_rows = np.zeros((self.capacity + 1, 2), dtype=np.float32)
        self._rows_upload, self._tokens_upload = _Upload(self.rows), _Upload(self.token_rows)
        self._rows_changed = False
        self._unreported: dict[str, _Steered] = {}
        self._written = 0
        """Leading entries of `token_rows` that may differ from 0."""

    @property
    def live(self) -> int:
        """Steered requests that are known, running or preempted."""
        return len(self._requests)

    def add(self, request_id: str, plan: Plan, prompt_length: int) -> None:
        """Take a row for a request that starts or comes back after a preemption.

        Args:
            request_id: the engine's id of the sample.
            plan: what to do; its edit must be in the bank.
            prompt_length: number of prompt tokens, without tokens generated before a preemption.

        Raises:
            UnknownName: the edit is not in the bank.
            CapacityExceeded: no row is free; cannot happen while vLLM keeps to `max_num_seqs`.
        """
        known = self._requests.get(request_id)
        if known is not None and known.row:
            return
        number = self._bank.number(bundle=plan.bundle, edit=plan.edit)
        if not self._free:
            raise CapacityExceeded(f"all {self.capacity} rows are in use")
        row = self._free.pop()
        steered = known or _Steered(plan=plan, prompt_length=prompt_length)
        steered.row = row
        self._requests[request_id] = steered
        self._row_of[request_id] = row
        self._first_edited[row] = 0 if plan.scope is Scope.ALL else prompt_length - 1
        self._host_rows[row] = (number, plan.strength)
        self._rows_changed = True
        if not steered.is_reported:
            self._unreported[request_id] = steered

    def resume(self, request_id: str) -> None:
        """Take a row again for a request that was preempted; does nothing for an unsteered one."""
        steered = self._requests.get(request_id)
        if steered is not None:
            self.add(request_id, steered.plan, steered.prompt_length)

    def preempt(self, request_id: str) -> None:
        """Give the row back and keep the plan; does nothing for an unsteered request."""
        steered = self._requests.get(request_id)
        if steered is not None and steered.row:
            self._free.append(self._row_of.pop(request_id))
            steered.row = 0
            self._unreported.pop(request_id, None)

    def remove(self, request_id: str) -> None:
        """Forget a request that finished; does nothing for an unsteered one."""
        self.preempt(request_id)
        self._requests.pop(request_id, None)

    def write_step(
        self, request_ids: Sequence[str], tokens: NDArray[np.integer], computed: NDArray[np.integer]
    ) -> list[Outcome]:
        """Write the row of every token of the next step.

        Positions decide, never phases: a token is edited when its position is at or after the request's first edited
        one, so chunked prefill, recomputation after a preemption and decoding need no case of their own (rule 4).

        Args:
            request_ids: [B] in batch order.
            tokens: [B] tokens of each request in this step.
            computed: [B] tokens of each request computed before it: the position of its first token.

        Returns:
            Outcomes that are true once this step's forward pass has run: of requests whose last prompt token is in it.
        """
        if not self._row_of:
            self._clear()
            return []
        of_request = np.fromiter(
            (self._row_of.get(request_id, 0) for request_id in request_ids), dtype=np.int64, count=len(request_ids)
        )
        if not of_request.any():
            self._clear()
            return []
        untouched = np.clip(self._first_edited[of_request] - computed, 0, tokens)
        runs = np.empty(2 * len(of_request), dtype=np.int64)
        runs[0::2], runs[1::2] = untouched, tokens - untouched
        values = np.zeros_like(runs)
        values[1::2] = of_request
        steered_tokens = int(runs[1::2][of_request > 0].sum())
        total = int(runs.sum())
        self._send_rows()
        length = max(total, self._written)
        target = self._tokens_upload.array()
        target[:total] = np.repeat(values, runs)
        target[total:length] = 0
        target[-1] = steered_tokens
        self._tokens_upload.send(length)
        self._written = total
        return self._outcomes(request_ids, tokens, computed) if self._unreported else []

    def _clear(self) -> None:
        """Point every token to row 0; free of cost when they do already."""
        if self._written:
            target = self._tokens_upload.array()
            target[: self._written] = 0
            target[-1] = 0
            self._tokens_upload.send(self._written)
            self._written = 0

    def _send_rows(self) -> None:
        if self._rows_changed:
            self._rows_upload.array()[:] = self._host_rows
            self._rows_upload.send(len(self._host_rows))
            self._rows_changed = False

    def _outcomes(
        self, request_ids: Sequence[str], tokens: NDArray[np.integer], computed: NDArray[np.integer]
    ) -> list[Outcome]:
        outcomes = []
        end_of = {
            request_id: int(start + count)
            for request_id, start, count in zip(request_ids, computed, tokens, strict=True)
            if request_id in self._unreported
        }
        for request_id, end in end_of.items():
            steered = self._unreported[request_id]
            if end >= steered.prompt_length:
                del self._unreported[request_id]
                steered.is_reported = True
                outcomes.append(
                    Outcome(
                        plan_id=steered.plan.id,
                        request_id=request_id,
                        applied=True,
                        edit=steered.plan.edit,
                        strength=steered.plan.strength,
                        scope=steered.plan.scope,
                    )
                )
        return outcomes
