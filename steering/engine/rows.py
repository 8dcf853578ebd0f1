"""Rows: what differs per request, and which row each token of a step reads.

The host keeps a row per live steered request and writes, once per step, one row number per token. Both model runners
use it in the same way. Knows nothing of vLLM.

Shapes: `B` requests of a step, `T` tokens of a step, `S` rows, `W` columns of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from steering.engine.bank import Bank
from steering.engine.compiled import fill
from steering.engine.first_row import first_row
from steering.engine.kernels import AWAITED, COUNTS, DECIDED, OBSERVED, PLACE, RESPONSE, ROW_WIDTH, TOUCHED
from steering.engine.reports import outcome_of, response_of
from steering.engine.steered import Due, Steered
from steering.engine.uploads import MapUpload, RowUpload
from steering.errors import CapacityExceeded
from steering.manifest import MAX_RESPONSE_TOKENS
from steering.outcome import Outcome, Response
from steering.plan import Plan, Reasoning, Scope

_NEVER = np.iinfo(np.int64).max // 2
"""First edited position of row 0."""

_LAST_OF_PROMPT = 8
"""Tokens at the end of a prompt among which a template that switches thinking off puts the end of reasoning."""


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
        self._bank = bank
        self._requests: dict[str, Steered] = {}
        self._row_of: dict[str, int] = {}
        self._free = list(range(self.capacity, 0, -1))
        self._first_edited = np.full(self.capacity + 1, _NEVER, dtype=np.int64)
        self._rows_upload, self._tokens_upload = RowUpload(self.rows), MapUpload(self.token_rows)
        self._changed: set[int] = set()
        self._waiting: dict[str, Steered] = {}
        """Running requests whose last prompt token has not been in a step yet."""
        self._observing: dict[str, Steered] = {}
        """Running requests whose response probe has not read all it reads."""
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
        return any(steered.plan.bundle == digest for steered in self._requests.values())

    def add(
        self, request_id: str, plan: Plan, prompt_length: int, tokens: Sequence[int] = (), computed: int = 0
    ) -> None:
        """Take a row for a request that starts or comes back after a preemption.

        Args:
            request_id: the engine's id of the sample.
            plan: what to do; its edit, gate or response probe must be in the bank.
            prompt_length: number of prompt tokens, without tokens generated before a preemption.
            tokens: the prompt and those generated before a preemption; read where reasoning is spared.
            computed: how many of them need not be computed again.

        Raises:
            UnknownName: the edit, gate or response probe is not in the bank, or the bundle spares no reasoning.
            CapacityExceeded: no row is free; cannot happen while vLLM keeps to `max_num_seqs`.
        """
        known = self._requests.get(request_id)
        if known is not None and (known.row or known.is_over):
            return
        gate = None if plan.gate is None else self._bank.gate(bundle=plan.bundle, profile=plan.gate.profile)
        response = self._bank.response(bundle=plan.bundle) if plan.response else None
        steered = known or Steered(
            request_id=request_id, plan=plan, prompt_length=prompt_length, gate=gate, response=response
        )
        if steered.reading is not None:
            # Preempted before the host had read what the gate decided: rare, and the only wait.
            steered.reading.result()
        values = steered.latched if steered.latched is not None else first_row(plan, gate, self._bank)
        if not self._free:
            raise CapacityExceeded(f"all {self.capacity} rows are in use")
        awaited = 0
        if plan.reasoning is Reasoning.SPARED:
            # What may have ended reasoning before the next token to compute.
            before = tokens[max(prompt_length - _LAST_OF_PROMPT, 0) : max(prompt_length, computed)]
            end = self._bank.reasoning_end(bundle=plan.bundle)
            awaited = 0 if end in before else end + 1
        row = self._free.pop()
        steered.row = row
        self._requests[request_id] = steered
        self._row_of[request_id] = row
        first_edited = 0 if plan.scope is Scope.ALL else prompt_length - 1
        self._first_edited[row] = first_edited if plan.is_steering else _NEVER
        of_host = self._rows_upload.array[row]
        of_host[:] = values
        of_host[AWAITED] = awaited
        if response is not None:
            of_host[RESPONSE] = response.number
            of_host[RESPONSE + 1 : RESPONSE + 1 + MAX_RESPONSE_TOKENS] = np.nan
        self._changed.add(row)
        if plan.is_steering and not steered.is_due:
            self._waiting[request_id] = steered
        if response is not None:
            self._observing[request_id] = steered

    def resume(self, request_id: str, tokens: Sequence[int] = (), computed: int = 0) -> None:
        """Take a row again for a request that was preempted; does nothing for an unsteered one. See `add`."""
        steered = self._requests.get(request_id)
        if steered is not None:
            self.add(request_id, steered.plan, steered.prompt_length, tokens, computed)

    def preempt(self, request_id: str) -> None:
        """Give the row back and keep the plan and what was decided; does nothing for an unsteered request."""
        steered = self._requests.get(request_id)
        if steered is not None and steered.row:
            self._free.append(self._row_of.pop(request_id))
            steered.row = 0
            self._waiting.pop(request_id, None)
            self._observing.pop(request_id, None)

    def remove(self, request_id: str) -> None:
        """Forget a request that finished; does nothing for an unsteered one."""
        self.preempt(request_id)
        self._requests.pop(request_id, None)

    def write_step(self, request_ids: Sequence[str], tokens: NDArray[np.integer], computed: NDArray[np.integer]) -> Due:
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
        if not self._row_of:
            self._clear()
            return Due([], [])
        of_request = [self._row_of.get(request_id, 0) for request_id in request_ids]
        if not any(of_request):
            self._clear()
            return Due([], [])
        # Where every request is past its prompt and none is observed, no span is asked for.
        spans = _spans(request_ids, tokens, computed) if self._waiting or self._observing else []
        due, deciding = self._due(spans) if self._waiting else ([], [])
        observed = self._observed(spans) if self._observing else {}
        if self._changed:
            self._rows_upload.send(self._changed)
            self._changed.clear()
        target = self._tokens_upload.array()
        touched, total = fill(
            target,
            np.array(of_request, dtype=np.int64),
            self._first_edited,
            np.asarray(tokens, dtype=np.int32),
            np.asarray(computed, dtype=np.int32),
            self._written,
        )
        for place in deciding:
            target[place] = -target[place]
        responses, read = [], 0
        for steered, (place, start, count) in observed.items():
            target[start : start + count] = steered.row | (np.arange(place, place + count, dtype=np.int32) << PLACE)
            touched += count
            read += count
            responses.append(steered)
        target[TOUCHED], target[DECIDED], target[OBSERVED] = touched, len(deciding), read
        self._tokens_upload.send(max(total, self._written))
        self._written = total
        return Due(due, responses)

    def outcome(self, steered: Steered, row: NDArray[np.float32]) -> Outcome:
        """What came of a due request; see `reports.outcome_of`. One that its gate left alone is over once it has been
        observed.
        """
        told = outcome_of(steered, row, self._bank)
        if steered.gate is not None and told.edit is None and not told.error:
            steered.is_left_alone = True
            if steered.request_id not in self._observing:
                self._over.append(steered)
        return told

    def response(self, steered: Steered, row: NDArray[np.float32]) -> Response | None:
        """What the response probe has read of an observed request; see `reports.response_of`."""
        return response_of(steered, row)

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

    def _observed(self, spans: Sequence[_Span]) -> dict[Steered, tuple[int, int, int]]:
        """Requests of whose first generated tokens some are in this step: which generated token the first of them is,
        counted from 1, its place in the step, and how many they are.
        """
        found = {}
        for request_id, start, first, count in spans:
            steered = self._observing.get(request_id)
            if steered is None or steered.response is None:
                continue
            begin, end = steered.prompt_length, steered.prompt_length + steered.response.tokens
            low, high = max(begin, first), min(end, first + count)
            if low < high:
                found[steered] = (low - begin + 1, start + low - first, high - low)
            if first + count >= end:
                del self._observing[request_id]
                if steered.is_left_alone or not steered.plan.is_steering:
                    self._over.append(steered)
        return found

    def _due(self, spans: Sequence[_Span]) -> tuple[list[Steered], list[int]]:
        """Requests whose last prompt token is in this step, and the places of those tokens that a gate decides on."""
        due, deciding = [], []
        for request_id, start, first, count in spans:
            steered = self._waiting.get(request_id)
            if steered is not None and first + count >= steered.prompt_length:
                del self._waiting[request_id]
                steered.is_due = True
                due.append(steered)
                if steered.gate is not None:
                    deciding.append(start + steered.prompt_length - 1 - first)
        return due, deciding


_Span = tuple[str, int, int, int]
"""A request's id and its tokens in a step: where they begin in it, the position of the first, and how many they are."""


def _spans(request_ids: Sequence[str], tokens: NDArray[np.integer], computed: NDArray[np.integer]) -> list[_Span]:
    """Every request's span."""
    spans, start = [], 0
    for request_id, first, count in zip(request_ids, computed.tolist(), tokens.tolist(), strict=True):
        spans.append((request_id, start, first, count))
        start += count
    return spans
