"""Outcomes: the way back from the worker to whoever started the engine, one message per step, no RPC.

The receiver binds a local socket and names it in the environment, which engine processes inherit; the first rank of the
worker sends what a step made known as soon as the forward pass that edited the last prompt token has been launched,
which is before that token's successor is sampled. Knows nothing of models.

The socket keeps messages apart and in order by itself (`SOCK_SEQPACKET`), so that sending one is one system call of the
engine's thread: a message library's thread would cost each first token half a millisecond of a small machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import re
import select
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from steering.errors import EditNotApplied, UnsupportedConfiguration
from steering.outcome import Outcome, Response, from_message, message_of

_log = logging.getLogger("trimtab")

ADDRESS_VARIABLE = "TRIMTAB_OUTCOME_ADDRESS"
"""An environment variable, as an engine option would change vLLM's compile-cache key at every start."""

MOST_IN_A_MESSAGE = 32
"""Outcomes, and responses; with every score of 100 categories they stay well under what Linux sends in one piece."""

LONGEST_MESSAGE = 1 << 19

MOST_LATE = 100_000
"""Messages a worker keeps for a receiver that is slow; with one per step this is never reached."""


class OutcomeSender:
    """Worker's end. Sends nothing where nobody listens, as under plain `vllm serve`.

    Args:
        address: of the receiver's socket; the environment's by default, none for none.

    Raises:
        UnsupportedConfiguration: nobody listens there.
    """

    def __init__(self, address: str | None = None) -> None:
        address = address if address is not None else os.environ.get(ADDRESS_VARIABLE)
        self._socket: socket.socket | None = None
        self._late: deque[bytes] = deque(maxlen=MOST_LATE)
        self._lock = threading.Lock()
        self._is_late = False
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                self._socket.connect(address)
            except OSError as error:
                self.close()
                raise UnsupportedConfiguration(
                    f"{ADDRESS_VARIABLE} names {address!r}, where nobody waits for outcomes: {error}"
                ) from error
            self._socket.settimeout(0)

    def send(self, outcomes: Sequence[Outcome], responses: Sequence[Response] = ()) -> None:
        """Send what a step made known; never blocks the engine. What is lost fails its request at the gateway."""
        if self._socket is None:
            return
        for start in range(0, max(len(outcomes), len(responses)), MOST_IN_A_MESSAGE):
            end = start + MOST_IN_A_MESSAGE
            self._put(message_of(outcomes[start:end], responses[start:end]))

    def close(self) -> None:
        """Send nothing any more, not even what waits."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def _put(self, message: bytes) -> None:
        with self._lock:
            if not self._is_late and self._is_sent(message):
                return
            self._late.append(message)
            begins, self._is_late = not self._is_late, True
        if begins:
            threading.Thread(target=self._send_late, daemon=True, name="trimtab-late-outcomes").start()

    def _is_sent(self, message: bytes) -> bool:
        """Whether a message is off, if only because it never can be."""
        if self._socket is None:
            return True
        try:
            self._socket.send(message)
        except BlockingIOError:
            return False
        except OSError as error:
            _log.error("an outcome of %d bytes cannot be sent: %s", len(message), error)
        return True

    def _send_late(self) -> None:
        """Send what waits for a receiver that is slow, in order."""
        assert self._socket is not None
        ready = select.poll()
        ready.register(self._socket, select.POLLOUT)
        while True:
            ready.poll()  # returns for a closed socket, too
            with self._lock:
                while self._late and self._is_sent(self._late[0]):
                    self._late.popleft()
                if not self._late:
                    self._is_late = False
                    return


class _Receiver:
    """A bound socket and the workers' connections to it.

    Args:
        on_gone: is told of a worker whose connection is about to be closed.

    Raises:
        UnsupportedConfiguration: no socket can be made in the folder for temporary files.
    """

    def __init__(self, on_gone: Callable[[socket.socket], None] = lambda _worker: None) -> None:
        self._on_gone = on_gone
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
            try:
                yield from_message(bytes(self._buffer[:length]))
            except (ValueError, TypeError, KeyError, AttributeError):
                # One broken message fails the requests that wait for it, by their time limit, and no other.
                _log.exception("outcomes of %d bytes cannot be read", length)

    def receive_all(self) -> Iterator[tuple[list[Outcome], list[Response]]]:
        """Every message there is, without waiting."""
        self.accept()
        for worker in list(self._workers):
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
        self._receiver = _Receiver(self._unwatch)
        self.address = self._receiver.address
        os.environ[ADDRESS_VARIABLE] = self.address
        self._expected: dict[str, dict[str, Outcome]] = {}
        """By plan and sample: a sample that was preempted may be reported again and still counts once."""
        self._responses: dict[str, dict[str, Response]] = {}
        """Likewise; the one that has read most of a sample."""
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
