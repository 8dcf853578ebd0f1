"""Outcomes: what the engine tells whoever started it, received over the socket that `outcome_sender` sends to.

An outcome is there before the token that it is about, so that whoever has the token finds it without waiting: nobody is
woken for it, which on a small machine would take the processor from the engine when it makes that token. Only while
somebody waits does the event loop watch. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from steering.engine.outcome_sender import ADDRESS_VARIABLE, LONGEST_MESSAGE
from steering.errors import EditFailed, EditNotConfirmed, TrimtabError, UnsupportedConfiguration
from steering.outcome import Message, Outcome, Response

_log = logging.getLogger("trimtab")

SWEEP = 0.2
"""Seconds between looks at what nobody asked for; what a socket holds until then is some hundred messages, and a worker
keeps what it has no room for."""


class _Receiver:
    """A bound socket and the workers' connections to it, of which the kernel says at once what there is to read.

    Raises:
        UnsupportedConfiguration: no socket can be made in the folder for temporary files.
    """

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="trimtab-")
        self.address = str(Path(self._directory.name) / "outcomes")
        self._buffer = memoryview(bytearray(LONGEST_MESSAGE))
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listening.settimeout(0)
        self._workers: dict[int, socket.socket] = {}
        self._readable = select.epoll()
        try:
            self._listening.bind(self.address)
        except OSError as error:
            self.close()
            raise UnsupportedConfiguration(
                f"no socket can be made at {self.address!r}: {error}; TMPDIR says where temporary files go"
            ) from error
        self._listening.listen(1024)
        self._readable.register(self._listening, select.EPOLLIN)

    def fileno(self) -> int:
        """Readable when `receive` has something to do."""
        return self._readable.fileno()

    @property
    def connected(self) -> int:
        """Connections that are open."""
        return len(self._workers)

    def take(self) -> Message | None:
        """One message, for one system call where there is one worker; None where none that can be read is there yet, or
        `receive` has more to do than to read it.
        """
        for worker in self._workers.values():
            try:
                length = worker.recv_into(self._buffer)
            except OSError:
                continue
            if length:
                return self._read(length)
        return None

    def receive(self) -> Iterator[Message]:
        """Every message there is and that can be read, without waiting; a worker that is gone is forgotten."""
        while found := self._readable.poll(0):
            for number, _ in found:
                if number == self._listening.fileno():
                    self._accept()
                elif (message := self._message(number)) is not None:
                    yield message

    def close(self) -> None:
        """Close every socket and remove the file."""
        self._readable.close()
        for each in (self._listening, *self._workers.values()):
            each.close()
        self._directory.cleanup()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # one that is gone already
            worker, _ = self._listening.accept()
            worker.settimeout(0)
            self._workers[worker.fileno()] = worker
            self._readable.register(worker, select.EPOLLIN)

    def _message(self, number: int) -> Message | None:
        """The next message of a worker that has one, or has ended."""
        worker = self._workers[number]
        try:
            length = worker.recv_into(self._buffer)
        except OSError:
            length = 0
        if not length:
            self._readable.unregister(number)
            del self._workers[number]
            worker.close()
            return None
        return self._read(length)

    def _read(self, length: int) -> Message | None:
        """What has been received."""
        try:
            return Message.from_bytes(self._buffer[:length])
        except ValueError:
            # One broken message fails the requests that wait for it, by their time limit, and no other.
            _log.exception("outcomes cannot be read")
            return None


@dataclass(slots=True, eq=False)
class _Told:
    """What has been told of a plan.

    Attributes:
        outcomes: by sample; one that was preempted may be reported again and still counts once.
        responses: likewise; the one that has read most of it.
        rejection: why the request was never run.
        arrived: set when something has come; there once somebody waits.
    """

    outcomes: dict[int, Outcome] = field(default_factory=dict)
    responses: dict[int, Response] = field(default_factory=dict)
    rejection: TrimtabError | None = None
    arrived: asyncio.Event | None = None

    def has_changed(self) -> None:
        """Wake whoever waits."""
        if self.arrived is not None:
            self.arrived.set()


class OutcomeListener:
    """Gateway's end. Make it before the engine starts, call `start` in the running event loop.

    Attributes:
        address: of the socket, in the environment as well.
    """

    def __init__(self) -> None:
        self._receiver = _Receiver()
        self.address = self._receiver.address
        os.environ[ADDRESS_VARIABLE] = self.address
        self._told: dict[str, _Told] = {}
        """By plan."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sweeping: asyncio.TimerHandle | None = None
        self._waiting = 0

    def start(self) -> None:
        """Begin to receive in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._sweep()

    def expect(self, plan_id: str) -> None:
        """Keep outcomes of this plan; call before the request is sent. Others are dropped."""
        if plan_id not in self._told:
            self._told[plan_id] = _Told()

    async def wait(self, plan_id: str, samples: Collection[int], timeout: float) -> dict[int, Outcome]:  # noqa: ASYNC109 - a deadline is part of the contract
        """Outcomes of these samples of a plan, once all of them are there.

        Raises:
            EditNotConfirmed: one did not come within `timeout` seconds.
            EditFailed: the engine says that an edit was not applied or a gate could not decide. A gate that decided to
                edit nothing is no error.
            TrimtabError: the request was never run; see `rejection`.
        """
        self.expect(plan_id)
        told = self._told[plan_id]
        outcomes = told.outcomes
        # As a rule all are here: whoever has a token asks.
        while not _has(outcomes, samples) and (message := self._receiver.take()) is not None:
            self._keep(message)
        if not _has(outcomes, samples):
            self._receive()
            try:
                async with asyncio.timeout(timeout):
                    while not _has(outcomes, samples):
                        if told.rejection is not None:
                            raise told.rejection
                        await self._change(told)
            except TimeoutError:
                there = sum(sample in outcomes for sample in samples)
                raise EditNotConfirmed(
                    f"the engine confirmed {there} of {len(samples)} edits within {timeout:.3g} s; "
                    "the answer is withheld"
                ) from None
        found = {sample: outcomes[sample] for sample in samples}
        for outcome in found.values():
            if outcome.error or not (outcome.applied or outcome.decision):
                raise EditFailed(f"the engine did not apply edit {outcome.edit!r}: {outcome.error}")
        return found

    async def responses(self, plan_id: str, wanted: Mapping[int, int], timeout: float) -> dict[int, Response]:  # noqa: ASYNC109 - a deadline is part of the contract
        """What the response probe has read of a plan's samples; what is there after `timeout` seconds at the latest.

        Args:
            wanted: generated tokens that it should have read of each sample; it is waited for no longer than for these.
        """
        told = self._told.get(plan_id) or _Told()
        kept = told.responses
        self._receive()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while True:
                    if plan_id not in self._told or all(
                        sample in kept and kept[sample].tokens >= tokens for sample, tokens in wanted.items()
                    ):
                        break
                    await self._change(told)
        return dict(kept)

    def rejection(self, plan_id: str) -> TrimtabError | None:
        """Why the request of a plan was never run, once vLLM has said that it failed; None where it was run.

        The scheduler tells before vLLM answers, so what it told is here, read or not.
        """
        self._receive()
        told = self._told.get(plan_id)
        return None if told is None else told.rejection

    def forget(self, plan_id: str) -> None:
        """Drop what is kept of a plan; call when its request ends, however it ends."""
        self._told.pop(plan_id, None)

    async def close(self) -> None:
        """Stop receiving and remove the socket."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        self._receiver.close()
        if os.environ.get(ADDRESS_VARIABLE) == self.address:
            del os.environ[ADDRESS_VARIABLE]

    async def _change(self, told: _Told) -> None:
        """Wait until more is told of a plan."""
        if told.arrived is None:
            told.arrived = asyncio.Event()
        told.arrived.clear()
        with self._watching():
            await told.arrived.wait()

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Have the event loop receive what comes while somebody waits for it."""
        assert self._loop is not None
        self._waiting += 1
        if self._waiting == 1:
            self._loop.add_reader(self._receiver.fileno(), self._receive)
        try:
            yield
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._loop.remove_reader(self._receiver.fileno())

    def _sweep(self) -> None:
        """Receive what nobody waits for, before the sockets are full of it."""
        assert self._loop is not None
        self._receive()
        self._sweeping = self._loop.call_later(SWEEP, self._sweep)

    def _receive(self) -> None:
        """Take every message there is."""
        for message in self._receiver.receive():
            self._keep(message)

    def _keep(self, message: Message) -> None:
        """Keep what is told of plans that are expected, and wake whoever waits."""
        for outcome in message.outcomes:
            if (told := self._told.get(outcome.plan_id)) is not None:
                told.outcomes[sample_of(outcome.request_id)] = outcome
                told.has_changed()
        for response in message.responses:
            if (told := self._told.get(response.plan_id)) is not None:
                _keep_longest(told.responses, response)
                told.has_changed()
        for plan_id, fields in message.rejected.items():
            if (told := self._told.get(plan_id)) is not None:
                told.rejection = TrimtabError.from_fields(fields)
                told.has_changed()


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

    def take(self) -> Sequence[Outcome]:
        """The outcomes of one message, as a gateway takes them that has a token; none where there is none yet."""
        message = self._receiver.take()
        return () if message is None else message.outcomes

    def drain(self) -> tuple[list[Outcome], list[Response]]:
        """Every outcome and response there is, without waiting."""
        messages = list(self._receiver.receive())
        return [each for one in messages for each in one.outcomes], [each for one in messages for each in one.responses]

    def drain_into(self, outcomes: dict[str, dict[int, Outcome]], responses: dict[str, dict[int, Response]]) -> None:
        """Take every message there is, without waiting, into these by plan and sample."""
        told, read = self.drain()
        for outcome in told:
            outcomes.setdefault(outcome.plan_id, {})[sample_of(outcome.request_id)] = outcome
        for response in read:
            _keep_longest(responses.setdefault(response.plan_id, {}), response)


def _keep_longest(known: dict[int, Response], response: Response) -> None:
    """Keep what has read most of a sample; messages of a slow time may overtake each other."""
    sample = sample_of(response.request_id)
    before = known.get(sample)
    if before is None or response.tokens >= before.tokens:
        known[sample] = response


def _has(outcomes: Mapping[int, Outcome], samples: Collection[int]) -> bool:
    return all(map(outcomes.__contains__, samples))


def sample_of(request_id: str) -> int:
    """Which sample of its request this is: vLLM's `ParentRequest` puts that before the ids where n > 1."""
    number, _, own = request_id.partition("_")
    return int(number) if own and number.isdecimal() else 0
