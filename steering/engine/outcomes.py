"""Outcomes: what the engine tells whoever started it, received over the pipe that `outcome_sender` writes to.

An outcome is there before the token that it is about, so that whoever has the token finds it without waiting: nobody is
woken for it, which on a small machine would take the processor from the engine when it makes that token. Only while
somebody waits does the event loop watch. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import logging
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from steering.engine.outcome_sender import ADDRESS_VARIABLE, HEAD
from steering.errors import EditFailed, EditNotConfirmed, TrimtabError, UnsupportedConfiguration
from steering.outcome import Message, Outcome, Response

_log = logging.getLogger("trimtab")

SWEEP = 0.2
"""Seconds between looks at what nobody asked for; what a pipe holds until then is some thousand messages, and a worker
keeps what it has no room for."""

ROOM, AT_ONCE = 1 << 20, 1 << 16
"""Bytes that a pipe holds, where the system lets it, and that are read at once."""


class _Receiver:
    """A named pipe, and what there is to read of it.

    Attributes:
        address: its path.

    Raises:
        UnsupportedConfiguration: none can be made in the folder for temporary files.
    """

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="trimtab-")
        path = Path(self._directory.name) / "outcomes"
        self.address = str(path)
        self._buffer = memoryview(bytearray(AT_ONCE))
        self._begun = 0
        """Bytes of a message in the buffer whose end has not been read."""
        try:
            os.mkfifo(path, mode=0o600)
            self._pipe = io.FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "r")
        except OSError as error:
            self._directory.cleanup()
            raise UnsupportedConfiguration(
                f"no pipe can be made at {self.address!r}: {error}; TMPDIR says where temporary files go"
            ) from error
        # A pipe without a writer looks as if there always were something to read.
        self._writer = io.FileIO(os.open(path, os.O_WRONLY | os.O_NONBLOCK), "w")
        with contextlib.suppress(OSError):  # the user has no more room for pipes: workers keep what does not fit
            fcntl.fcntl(self._writer, fcntl.F_SETPIPE_SZ, ROOM)

    def fileno(self) -> int:
        """Readable when `receive` has something to do."""
        return self._pipe.fileno()

    def receive(self) -> list[Message]:
        """Every message there is and that can be read, without waiting: one system call, if there are not many."""
        found: list[Message] = []
        buffer, begun = self._buffer, self._begun
        while count := self._pipe.readinto(buffer[begun:] if begun else buffer):
            end, place = begun + count, HEAD.size
            while place <= end:
                length, is_left = HEAD.unpack_from(buffer, place - HEAD.size)
                if place + length > end:
                    break
                try:
                    message = buffer[place : place + length]
                    found.append(Message.from_bytes(self._left(message) if is_left else message))
                except (ValueError, OSError):
                    # One broken message fails the requests that wait for it, by their time limit, and no other.
                    _log.exception("outcomes cannot be read")
                place += length + HEAD.size
            begun = end - (place - HEAD.size)
            if begun:
                buffer[:begun] = bytes(buffer[end - begun : end])
            if end < AT_ONCE:
                break
        self._begun = begun
        return found

    def close(self) -> None:
        """Close the pipe and remove it."""
        self._pipe.close()
        self._writer.close()
        self._directory.cleanup()

    def _left(self, name: memoryview) -> bytes:
        """What a sender left beside the pipe under a name."""
        path = Path(self.address).with_name(bytes(name).decode())
        message = path.read_bytes()
        path.unlink()
        return message


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
        address: of the pipe, in the environment as well.
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
        if not _has(outcomes, samples):
            self._receive()
        if not _has(outcomes, samples):  # as a rule all are here: whoever has a token asks
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
        """Stop receiving and remove the pipe."""
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
        """Receive what nobody waits for, before the pipe is full of it."""
        assert self._loop is not None
        self._receive()
        self._sweeping = self._loop.call_later(SWEEP, self._sweep)

    def _receive(self) -> None:
        """Take every message there is."""
        for message in self._receiver.receive():
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
        """Make the pipe and name it in the environment."""
        self._receiver = _Receiver()
        self._before = os.environ.get(ADDRESS_VARIABLE)
        os.environ[ADDRESS_VARIABLE] = self._receiver.address
        return self

    def __exit__(self, *_error: object) -> None:
        """Remove the pipe."""
        self._receiver.close()
        if self._before is None:
            os.environ.pop(ADDRESS_VARIABLE, None)
        else:
            os.environ[ADDRESS_VARIABLE] = self._before

    def drain(self) -> tuple[list[Outcome], list[Response]]:
        """Every outcome and response there is, without waiting."""
        messages = self._receiver.receive()
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
