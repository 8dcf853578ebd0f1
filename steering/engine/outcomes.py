"""Outcomes: what the engine tells whoever started it, received over the socket that `outcome_sender` sends to.

Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self

from steering.engine.outcome_sender import ADDRESS_VARIABLE, LONGEST_MESSAGE, REJECTION
from steering.errors import EditNotApplied, TrimtabError, UnsupportedConfiguration
from steering.outcome import Outcome, Response, from_message

_log = logging.getLogger("trimtab")


class _Receiver:
    """A bound socket and the workers' connections to it.

    Args:
        on_gone: is told of a worker whose connection is about to be closed.
        on_rejected: is told of a plan whose request was never run, and why.

    Raises:
        UnsupportedConfiguration: no socket can be made in the folder for temporary files.
    """

    def __init__(
        self,
        on_gone: Callable[[socket.socket], None] = lambda _worker: None,
        on_rejected: Callable[[str, TrimtabError], None] = lambda _plan, _error: None,
    ) -> None:
        self._on_gone = on_gone
        self._on_rejected = on_rejected
        self._directory = tempfile.TemporaryDirectory(prefix="trimtab-")
        self.address = str(Path(self._directory.name) / "outcomes")
        self._buffer = memoryview(bytearray(LONGEST_MESSAGE))
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listening.settimeout(0)
        self._workers: list[socket.socket] = []
        try:
            self._listening.bind(self.address)
        except OSError as error:
            self.close()
            raise UnsupportedConfiguration(
                f"no socket can be made at {self.address!r}: {error}; TMPDIR says where temporary files go"
            ) from error
        self._listening.listen(1024)

    @property
    def listening(self) -> socket.socket:
        """Readable when a worker connects."""
        return self._listening

    @property
    def workers(self) -> list[socket.socket]:
        """Connections that are open."""
        return list(self._workers)

    def accept(self) -> list[socket.socket]:
        """Workers that have connected since the last call."""
        fresh = []
        with contextlib.suppress(BlockingIOError):
            while True:
                worker, _ = self._listening.accept()
                worker.settimeout(0)
                fresh.append(worker)
        self._workers += fresh
        return fresh

    def receive(self, worker: socket.socket) -> Iterator[tuple[list[Outcome], list[Response]]]:
        """Every message a worker has sent; a worker that is gone is forgotten, its socket closed."""
        while True:
            try:
                length = worker.recv_into(self._buffer)
            except BlockingIOError:
                return
            except OSError:
                length = 0
            if not length:
                self._on_gone(worker)
                self._workers.remove(worker)
                worker.close()
                return
            message = bytes(self._buffer[:length])
            try:
                if message.startswith(REJECTION):
                    plan_id, fields = json.loads(message)["rejected"]
                    self._on_rejected(plan_id, TrimtabError.from_fields(fields))
                else:
                    yield from_message(message)
            except (ValueError, TypeError, KeyError, AttributeError):
                # One broken message fails the requests that wait for it, by their time limit, and no other.
                _log.exception("outcomes of %d bytes cannot be read", length)

    def receive_all(self) -> Iterator[tuple[list[Outcome], list[Response]]]:
        """Every message there is, without waiting."""
        self.accept()
        for worker in self.workers:
            yield from self.receive(worker)

    def close(self) -> None:
        """Close every socket and remove the file."""
        for each in (self._listening, *self._workers):
            each.close()
        self._directory.cleanup()


class OutcomeListener:
    """Gateway's end. Make it before the engine starts, call `start` in the running event loop.

    Attributes:
        address: of the socket, in the environment as well.
    """

    def __init__(self) -> None:
        self._receiver = _Receiver(self._unwatch, self._reject)
        self.address = self._receiver.address
        os.environ[ADDRESS_VARIABLE] = self.address
        self._expected: dict[str, dict[str, Outcome]] = {}
        """By plan and sample: a sample that was preempted may be reported again and still counts once."""
        self._responses: dict[str, dict[str, Response]] = {}
        """Likewise; the one that has read most of a sample."""
        self._rejected: dict[str, TrimtabError] = {}
        self._arrived: dict[str, asyncio.Event] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watched: set[int] = set()

    def start(self) -> None:
        """Begin to receive in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._watch(self._receiver.listening, self._accept)

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
            TrimtabError: the request was never run; see `rejection`.
        """
        self.expect(plan_id)
        outcomes, arrived = self._expected[plan_id], self._arrived[plan_id]
        try:
            async with asyncio.timeout(timeout):
                while len(outcomes) < samples:
                    if plan_id in self._rejected:
                        raise self._rejected[plan_id]
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

    def rejection(self, plan_id: str) -> TrimtabError | None:
        """Why the request of a plan was never run, once vLLM has said that it failed; None where it was run.

        The scheduler tells before vLLM answers, so what it told is here, read or not.
        """
        self._accept()
        for worker in self._receiver.workers:
            self._receive(worker)
        return self._rejected.get(plan_id)

    def forget(self, plan_id: str) -> None:
        """Drop what is kept of a plan; call when its request ends, however it ends."""
        self._rejected.pop(plan_id, None)
        self._expected.pop(plan_id, None)
        self._responses.pop(plan_id, None)
        self._arrived.pop(plan_id, None)

    async def close(self) -> None:
        """Stop receiving and remove the socket."""
        if self._loop is not None:
            for number in self._watched:
                self._loop.remove_reader(number)
            self._watched.clear()
        self._receiver.close()
        if os.environ.get(ADDRESS_VARIABLE) == self.address:
            del os.environ[ADDRESS_VARIABLE]

    def _watch(self, connection: socket.socket, on_readable: Callable[[], None]) -> None:
        assert self._loop is not None
        self._loop.add_reader(connection.fileno(), on_readable)
        self._watched.add(connection.fileno())

    def _unwatch(self, connection: socket.socket) -> None:
        assert self._loop is not None
        self._loop.remove_reader(connection.fileno())
        self._watched.discard(connection.fileno())

    def _reject(self, plan_id: str, error: TrimtabError) -> None:
        if plan_id in self._expected:
            self._rejected[plan_id] = error
            self._arrived[plan_id].set()

    def _accept(self) -> None:
        for worker in self._receiver.accept():
            self._watch(worker, functools.partial(self._receive, worker))

    def _receive(self, worker: socket.socket) -> None:
        for outcomes, responses in self._receiver.receive(worker):
            for outcome in outcomes:
                if (expected := self._expected.get(outcome.plan_id)) is not None:
                    expected[outcome.request_id] = outcome
                    self._arrived[outcome.plan_id].set()
            for response in responses:
                if (known := self._responses.get(response.plan_id)) is not None:
                    _keep_longest(known, response)
                    self._arrived[response.plan_id].set()


class OutcomeInbox:
    """The other end without an event loop, for an engine in this process; a context manager.

    Make it before the engine starts.
    """

    def __enter__(self) -> Self:
        """Bind the socket and name it in the environment."""
        self._receiver = _Receiver()
        self._before = os.environ.get(ADDRESS_VARIABLE)
        os.environ[ADDRESS_VARIABLE] = self._receiver.address
        return self

    def __exit__(self, *_error: object) -> None:
        """Remove the socket."""
        self._receiver.close()
        if self._before is None:
            os.environ.pop(ADDRESS_VARIABLE, None)
        else:
            os.environ[ADDRESS_VARIABLE] = self._before

    def drain(self) -> tuple[list[Outcome], list[Response]]:
        """Every outcome and response there is, without waiting."""
        messages = list(self._receiver.receive_all())
        return [each for told, _ in messages for each in told], [each for _, read in messages for each in read]

    def drain_into(self, outcomes: dict[str, dict[str, Outcome]], responses: dict[str, dict[str, Response]]) -> None:
        """Take every message there is, without waiting, into these by plan and the engine's id of the sample."""
        told, read = self.drain()
        for outcome in told:
            outcomes.setdefault(outcome.plan_id, {})[outcome.request_id] = outcome
        for response in read:
            _keep_longest(responses.setdefault(response.plan_id, {}), response)


def _keep_longest(known: dict[str, Response], response: Response) -> None:
    """Keep what has read most of a sample; messages of a slow time may overtake each other."""
    before = known.get(response.request_id)
    if before is None or response.tokens >= before.tokens:
        known[response.request_id] = response


def sample_of(request_id: str) -> int:
    """Which sample of its request this is: vLLM's `ParentRequest` puts that before the ids where n > 1."""
    found = re.match(r"(\d+)_", request_id)
    return int(found.group(1)) if found else 0
