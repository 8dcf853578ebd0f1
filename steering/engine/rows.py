"""Rows: what differs per request, and which row each token of a step reads.

The host keeps a row per live steered request and writes, once per step, one row number per token. Both model runners
use it in the same way. Knows nothing of vLLM.

Shapes: `B` requests of a step, `T` tokens of a step, `S` rows, `W` columns of a row.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from steering.engine.bank import Bank
from steering.engine.compiled import IS_DUE, IS_READ, IS_READ_TO_THE_END, NEVER, fill
from steering.engine.kernels import AWAITED, COUNTS, ROW_WIDTH
from steering.engine.orders import Orders
from steering.engine.reports import outcome_of, response_of
from steering.engine.steered import Due, Steered
from steering.engine.uploads import MapUpload, RowUpload
from steering.errors import CapacityExceeded
from steering.outcome import Outcome, Response
from steering.plan import Plan, Scope

_TAIL = 8
"""Tokens at the end of a prompt among which a template that switches thinking off puts the end of reasoning."""

_FLOAT, _LIMITS = struct.Struct("f"), struct.Struct("5q")
NOTHING = Due([], [])
"""A step makes nothing known. Never written."""


class Rows:
    """Row table and per-token map of one worker.

    Args:
        bank: names edits and gates.
        requests: most requests that can run at once; vLLM's `max_num_seqs`.
        tokens: most tokens of a step; vLLM's `max_num_batched_tokens`.
        device: where the buffers live, for ever at the same address.

    Attributes:
        rows: [S, W] float32, laid out as `kernels` says. The host writes a row when a request takes it, the gate of
            that row once after that.
        token_rows: [tokens + COUNTS] int32; the last entries are the numbers of the step's tokens that `kernels` names,
            kept on the CPU only, where the op reads them to leave at once.
    """

    def __init__(self, *, bank: Bank, requests: int, tokens: int, device: torch.device) -> None:
        # Twice as many as can run: with asynchronous scheduling a finished request may be dropped a step late.
        self.capacity = 2 * requests
        self.rows = torch.zeros(self.capacity + 1, ROW_WIDTH, dtype=torch.float32, device=device)
        self.token_rows = torch.zeros(tokens + COUNTS, dtype=torch.int32, device=device)
        self._bank, self._orders = bank, Orders(bank)
        self._requests: dict[str, Steered] = {}
        self._row_of: dict[str, int] = {}
        self._free = list(range(self.capacity, 0, -1))
        self._limits = np.full((self.capacity + 1, 5), NEVER, dtype=np.int64)
        """Of each row, see `compiled.fill`; those of row 0 are never reached."""
        self._limits_bytes = self._limits.data.cast("B")
        self._batch, self._news = (np.zeros(self.capacity + 1, dtype=np.int64) for _ in range(2))
        self._batch_numbers = self._batch.data.cast("B").cast("q")
        self._rows_upload, self._tokens_upload = RowUpload(self.rows), MapUpload(self.token_rows)
        self._over: list[Steered] = []
        """Requests that nothing is asked of any more: only observed, or left alone by their gate. They have a row until
        the next step, and are then as if they had never been steered. A device's thread appends.
        """
        self._written = 0
        """Leading entries of `token_rows` that may differ from 0."""

    @property
    def live(self) -> int:
        """Steered requests that are known, running or preempted."""
        return len(self._requests)

    @property
    def requests(self) -> dict[int, str]:
        """Requests that have a row, by its number."""
        return {row: request_id for request_id, row in self._row_of.items()}

    def names(self, digest: str) -> bool:
        """Whether the plan of a known request, running or preempted, names this bundle."""
        return any(steered.order.plan.bundle == digest for steered in self._requests.values())

    def add(
        self,
        request_id: str,
        plan: Plan,
        prompt_length: int,
        tokens: Sequence[int] = (),
        computed: int = 0,
        *,
        plan_id: str | None = None,
    ) -> None:
        """Take a row for a request that starts or comes back after a preemption.

        Args:
            request_id: the engine's id of the sample.
            plan: what to do; its edit, gate or response probe must be in the bank. Requests may share one.
            prompt_length: number of prompt tokens, without tokens generated before a preemption.
            tokens: the prompt and those generated before a preemption; read where reasoning is spared.
            computed: how many of them need not be computed again.
            plan_id: under which its outcome is told; the plan's own by default.

        Raises:
            UnknownName: the edit, gate or response probe is not in the bank, or the bundle spares no reasoning.
            CapacityExceeded: no row is free; cannot happen while vLLM keeps to `max_num_seqs`.
        """
        steered = self._requests.get(request_id)
        if steered is None:
            steered = Steered(
                request_id=request_id,
                plan_id=plan.id if plan_id is None else plan_id,
                order=self._orders.of(plan),
                prompt_length=prompt_length,
            )
        elif steered.row or steered.is_over:
            return
        elif steered.reading is not None:
            # Preempted before the host had read what the gate decided: rare, and the only wait.
            steered.reading.result()
        if not self._free:
            raise CapacityExceeded(f"all {self.capacity} rows are in use")
        order, first = steered.order, steered.order.row
        if order.is_spared or steered.latched is not None:
            first = self._first_row(steered, tokens, computed)
        row = self._free.pop()
        self._rows_upload.write(row, first)
        self._limit(steered, row)
        steered.row = row
        self._requests[request_id] = steered
        self._row_of[request_id] = row

    def _first_row(self, steered: Steered, tokens: Sequence[int], computed: int) -> bytes:
        """[W] what a row holds before the next step of a request, where that is not what its order says."""
        order = steered.order
        row = bytearray(order.row)
        if steered.latched is not None:
            order.told.pack_into(row, 0, *steered.latched)
        if order.is_spared:
            # What may have ended reasoning before the next token to compute.
            length = steered.prompt_length
            before = tokens[max(length - _TAIL, 0) : max(length, computed)]
            end = self._bank.reasoning_end(bundle=order.plan.bundle)
            _FLOAT.pack_into(row, AWAITED * _FLOAT.size, 0 if end in before else end + 1)
        return bytes(row)

    def _limit(self, steered: Steered, row: int) -> None:
        """Say from where to where a request is edited, decided on and read; see `compiled.fill`."""
        order, end = steered.order, steered.prompt_length
        first_edited = due = decides = read_from = read_to = NEVER
        if order.plan.is_steering:
            first_edited = 0 if order.plan.scope is Scope.ALL else end - 1
            if not steered.is_due:
                due = end - 1
                decides = NEVER if order.gate is None else due
        if order.response is not None:
            steered.is_observed = True
            read_from, read_to = end, end + order.response.tokens
        _LIMITS.pack_into(self._limits_bytes, row * _LIMITS.size, first_edited, due, decides, read_from, read_to)

    def resume(self, request_id: str, tokens: Sequence[int] = (), computed: int = 0) -> None:
        """Take a row again for a request that was preempted; does nothing for an unsteered one. See `add`."""
        steered = self._requests.get(request_id)
        if steered is not None:
            self.add(request_id, steered.order.plan, steered.prompt_length, tokens, computed)

    def preempt(self, request_id: str) -> None:
        """Give the row back and keep the plan and what was decided; does nothing for an unsteered request."""
        steered = self._requests.get(request_id)
        if steered is not None and steered.row:
            self._free.append(self._row_of.pop(request_id))
            steered.row = 0
            steered.is_observed = False

    def remove(self, request_id: str) -> None:
        """Forget a request that finished; does nothing for an unsteered one."""
        self.preempt(request_id)
        self._requests.pop(request_id, None)

    def write_step(self, request_ids: Sequence[str], tokens: NDArray[np.int32], computed: NDArray[np.int32]) -> Due:
        """Write the row of every token of the next step.

        Positions decide, never phases: a token is edited when its position is at or after the request's first edited
        one, so chunked prefill, recomputation after a preemption and decoding need no case of their own (rule 4).

        Args:
            request_ids: [B] in batch order.
            tokens: [B] tokens of each request in this step.
            computed: [B] tokens of each request computed before it: the position of its first token.

        Returns:
            What is true once the step's forward pass has run.
        """
        while self._over:
            self._give_back(self._over.pop())
        row_of = self._row_of
        of_request = [row_of.get(request_id, 0) for request_id in request_ids] if row_of else ()
        if not any(of_request):
            self._clear()
            return NOTHING
        if self._rows_upload.waiting:
            self._rows_upload.send()
        here, written = self._tokens_upload.here, self._written
        self._batch_numbers[: len(of_request)] = array("q", of_request)
        self._written, told = fill(
            self._tokens_upload.array() if here is None else here,
            self._batch,
            self._limits,
            tokens,
            computed,
            written,
            self._news,
        )
        if here is None:
            self._tokens_upload.send(max(self._written, written))
        return self._due(request_ids, self._news[:told].tolist()) if told else NOTHING

    def outcome(self, steered: Steered, table: memoryview, place: int) -> Outcome:
        """What came of a due request; see `reports.outcome_of`. One that its gate left alone is over once it has been
        observed.
        """
        told = outcome_of(steered, table, place, self._bank)
        if steered.order.gate is not None and told.edit is None and not told.error:
            steered.is_left_alone = True
            if not steered.is_observed and (steered.row or steered.order.response is None):
                self._over.append(steered)
        return told

    def response(self, steered: Steered, table: memoryview, place: int) -> Response | None:
        """What the response probe has read of an observed request; see `reports.response_of`."""
        return response_of(steered, table, place)

    def _clear(self) -> None:
        """Point every token to row 0; free of cost when they do already."""
        if self._written:
            target = self._tokens_upload.array()
            target[: self._written] = 0
            target[-COUNTS:] = 0
            self._tokens_upload.send(self._written)
            self._written = 0

    def _give_back(self, steered: Steered) -> None:
        """Take the row of a request that is over; it stays known, so that nothing is observed or decided once more."""
        if self._requests.get(steered.request_id) is steered:
            steered.is_over = True
            self.preempt(steered.request_id)

    def _due(self, request_ids: Sequence[str], news: Sequence[int]) -> Due:
        """What the step's forward pass makes known."""
        due = Due([], [])
        for each in news:
            place, what = divmod(each, 8)
            steered = self._requests[request_ids[place]]
            if what & IS_READ:
                due.responses.append(steered)
            if what & IS_DUE:
                steered.is_due = True
                due.outcomes.append(steered)
            if what & IS_READ_TO_THE_END:
                steered.is_observed = False
                if steered.is_left_alone or not steered.order.plan.is_steering:
                    self._over.append(steered)
        return due if due.outcomes or due.responses else NOTHING
