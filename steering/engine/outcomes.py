"""Outcomes: the way back from the worker to the gateway, one message per sample, no RPC.

The gateway binds a local socket and names it in the environment, which engine processes inherit; the first rank of the
worker pushes an outcome as soon as the forward pass that edited the last prompt token has been launched, which is
before that token's successor is sampled. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import zmq
import zmq.asyncio

from steering.errors import EditNotApplied
from steering.plan import Outcome, Response, report_from_json

_log = logging.getLogger("trimtab")

ADDRESS_VARIABLE = "TRIMTAB_OUTCOME_ADDRESS"
"""An environment variable, as an engine option would change vLLM's compile-cache key at every start."""

HIGH_WATER_MARK = 100_000
"""Messages that wait at most on either side; with one per request this is never reached before vLLM's own limits."""


class OutcomeSender:
    """Worker's end. Sends nothing where nobody listens, as under plain `vllm serve`."""

    def __init__(self, address: str | None = None) -> None:
        address = address if address is not None else os.environ.get(ADDRESS_VARIABLE)
        self._socket: zmq.Socket[bytes] | None = None
        if address:
            self._socket = zmq.Context.instance().socket(zmq.PUSH)
            self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.connect(address)

    def send(self, message: bytes) -> None:
        """Queue one message; never blocks the engine. An outcome lost here fails its request at the gateway."""
        if self._socket is not None:
            try:
                self._socket.send(message, zmq.NOBLOCK)
            except zmq.Again:
                return


class OutcomeListener:
    """Gateway's end. Make it before the engine starts, call `start` in the running event loop."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="trimtab-")
        self.address = f"ipc://{Path(self._directory.name) / 'outcomes'}"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        self._socket.bind(self.address)
        os.environ[ADDRESS_VARIABLE] = self.address
        self._expected: dict[str, dict[str, Outcome]] = {}
        """By plan and sample: a sample that was preempted may be reported again and still counts once."""
        self._responses: dict[str, dict[str, Response]] = {}
        """Likewise; the newest of a sample has read most of it."""
        self._arrived: dict[str, asyncio.Event] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to receive in a task of the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._receive(), name="outcomes")

    def expect(self, plan_id: str) -> None:
        """Keep outcomes of this plan; call before the request is sent. Others are dropped."""
        self._expected.setdefault(plan_id, {})
        self._responses.setdefault(plan_id, {})
        self._arrived.setdefault(plan_id, asyncio.Event())

    async def wait(self, plan_id: str, samples: int, timeout: float) -> list[Outcome]:  # noqa: ASYNC109 - a deadline is part of the contract
        """Outcomes of a plan, once `samples` of them are there.

        Raises:
            EditNotApplied: fewer came within `timeout` seconds, or the engine says that an edit was not applied or a
                gate could not decide. A gate that decided to edit nothing is no error.
        """
        self.expect(plan_id)
        outcomes, arrived = self._expected[plan_id], self._arrived[plan_id]
        try:
            async with asyncio.timeout(timeout):
                while len(outcomes) < samples:
                    arrived.clear()
                    await arrived.wait()
        except TimeoutError:
            raise EditNotApplied(
                f"the engine confirmed {len(outcomes)} of {samples} edits within {timeout} s; the answer is withheld"
            ) from None
        for outcome in outcomes.values():
            if outcome.error or not (outcome.applied or outcome.decision):
                raise EditNotApplied(f"the engine did not apply edit {outcome.edit!r}: {outcome.error}")
        return list(outcomes.values())

    async def responses(self, plan_id: str, wanted: Mapping[int, int], timeout: float) -> dict[int, Response]:  # noqa: ASYNC109 - a deadline is part of the contract
        """What the response probe has read of a plan's samples; what is there after `timeout` seconds at the latest.

        Args:
            wanted: generated tokens that it should have read of each sample; it is waited for no longer than for these.
        """
        kept, arrived = self._responses.get(plan_id, {}), self._arrived.get(plan_id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while True:
                    read = {sample_of(response.request_id): response for response in kept.values()}
                    if arrived is None or all(
                        sample in read and read[sample].tokens >= tokens for sample, tokens in wanted.items()
                    ):
                        return read
                    arrived.clear()
                    await arrived.wait()
        return {sample_of(response.request_id): response for response in kept.values()}

    def forget(self, plan_id: str) -> None:
        """Drop what is kept of a plan; call when its request ends, however it ends."""
        self._expected.pop(plan_id, None)
        self._responses.pop(plan_id, None)
        self._arrived.pop(plan_id, None)

    async def close(self) -> None:
        """Stop receiving and remove the socket."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close(linger=0)
        self._context.term()
        self._directory.cleanup()
        if os.environ.get(ADDRESS_VARIABLE) == self.address:
            del os.environ[ADDRESS_VARIABLE]

    async def _receive(self) -> None:
        while True:
            message = await self._socket.recv()
            try:
                report = report_from_json(message)
            except (ValueError, TypeError, KeyError, AttributeError):
                # One broken message fails the request that waits for it, by its time limit, and no other.
                _log.exception("an outcome of %d bytes cannot be read", len(message))
                continue
            for each in [report] if isinstance(report, Outcome) else report:
                known = self._expected if isinstance(each, Outcome) else self._responses
                kept: dict[str, Any] | None = known.get(each.plan_id)
                if kept is not None:
                    kept[each.request_id] = each
                    self._arrived[each.plan_id].set()


class OutcomeInbox:
    """The other end without an event loop, for an engine in this process; a context manager.

    Make it before the engine starts.
    """

    def __enter__(self) -> Self:
        """Bind the socket and name it in the environment."""
        self._directory = tempfile.TemporaryDirectory(prefix="trimtab-")
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        address = f"ipc://{Path(self._directory.name) / 'outcomes'}"
        self._socket.bind(address)
        self._before = os.environ.get(ADDRESS_VARIABLE)
        os.environ[ADDRESS_VARIABLE] = address
        return self

    def __exit__(self, *_error: object) -> None:
        """Remove the socket."""
        self._socket.close(linger=0)
        self._context.term()
        self._directory.cleanup()
        if self._before is None:
            os.environ.pop(ADDRESS_VARIABLE, None)
        else:
            os.environ[ADDRESS_VARIABLE] = self._before

    def drain_into(self, outcomes: dict[str, dict[str, Outcome]], responses: dict[str, dict[str, Response]]) -> None:
        """Take every message there is, without waiting, into these by plan and the engine's id of the sample."""
        while self._socket.poll(0):
            report = report_from_json(self._socket.recv())
            if isinstance(report, Outcome):
                outcomes.setdefault(report.plan_id, {})[report.request_id] = report
            else:
                for response in report:
                    responses.setdefault(response.plan_id, {})[response.request_id] = response


def sample_of(request_id: str) -> int:
    """Which sample of its request this is: vLLM's `ParentRequest` puts that before the ids where n > 1."""
    found = re.match(r"(\d+)_", request_id)
    return int(found.group(1)) if found else 0
