"""Outcome sender: the worker's and the scheduler's end of the way back, one message per step, no RPC.

The receiver makes a named pipe and names it in the environment, which engine processes inherit; the first rank of the
worker sends what a step made known as soon as the forward pass that edited the last prompt token has been launched,
which is before that token's successor is sampled; the scheduler sends why it does not run a request. Knows nothing of
models.

A pipe takes up to `PIPE_BUF` bytes at once or not at all, whoever else writes, so that sending a message is one system
call of the engine's thread, and cheaper than a socket's: a message library's thread would cost each first token half a
millisecond of a small machine.
"""

from __future__ import annotations

import io
import logging
import os
import secrets
import select
import struct
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from steering.errors import TrimtabError, UnsupportedConfiguration
from steering.outcome import Message, Outcome, Response

_log = logging.getLogger("trimtab")

ADDRESS_VARIABLE = "TRIMTAB_OUTCOME_ADDRESS"
"""An environment variable, as an engine option would change vLLM's compile-cache key at every start."""

HEAD = struct.Struct("<HH")
"""What is put before a message: its length, and 1 where it is the name of a file beside the pipe that holds it."""

LONGEST = select.PIPE_BUF - HEAD.size
"""Bytes of a message that a pipe takes at once; about sixteen outcomes with every score of seven categories."""

MOST_LATE = 100_000
"""Messages a worker keeps for a receiver that is slow; with one per step this is never reached."""

_LOOK = 1000
"""Milliseconds between looks at whether the sender has been closed, while a message waits."""


class OutcomeSender:
    """Worker's end. Sends nothing where nobody listens, as under plain `vllm serve`.

    Args:
        address: of the receiver's pipe; the environment's by default, none for none.

    Raises:
        UnsupportedConfiguration: nobody listens there.
    """

    def __init__(self, address: str | None = None) -> None:
        self._address = address if address is not None else os.environ.get(ADDRESS_VARIABLE, "")
        self._pipe: io.FileIO | None = None
        self._late: deque[bytes] = deque(maxlen=MOST_LATE)
        self._lock = threading.Lock()
        self._is_late = False
        if self._address:
            try:
                self._pipe = io.FileIO(os.open(self._address, os.O_WRONLY | os.O_NONBLOCK), "w")
            except OSError as error:
                raise UnsupportedConfiguration(
                    f"{ADDRESS_VARIABLE} names {self._address!r}, where nobody waits for outcomes: {error}"
                ) from error

    def send(self, outcomes: Sequence[Outcome], responses: Sequence[Response] = ()) -> None:
        """Send what a step made known; never blocks the engine. What is lost fails its request at the gateway."""
        if self._pipe is None:
            return
        message = Message(outcomes=outcomes, responses=responses).to_bytes()
        if len(message) <= LONGEST:
            self._put(HEAD.pack(len(message), 0) + message)
            return
        if len(outcomes) + len(responses) == 1:
            self._leave(message)
            return
        for part in (outcomes[: len(outcomes) // 2], outcomes[len(outcomes) // 2 :]):
            if part:
                self.send(part)
        for read in (responses[: len(responses) // 2], responses[len(responses) // 2 :]):
            if read:
                self.send((), read)

    def reject(self, plan_id: str, error: TrimtabError) -> None:
        """Tell why a request was never run; vLLM's own way back has no room for a reason."""
        if self._pipe is not None:
            message = Message(rejected={plan_id: error.to_fields()}).to_bytes()
            if len(message) <= LONGEST:
                self._put(HEAD.pack(len(message), 0) + message)
            else:
                self._leave(message)

    def close(self) -> None:
        """Send nothing any more, not even what waits."""
        with self._lock:
            if self._pipe is not None:
                self._pipe.close()
                self._pipe = None

    def _put(self, message: bytes) -> None:
        # Without the lock, as nothing waits: messages of two threads have no order.
        if self._is_late or not self._is_sent(message):
            self._keep(message)

    def _keep(self, message: bytes) -> None:
        """Have a message sent when there is room for it."""
        with self._lock:
            self._late.append(message)
            begins, self._is_late = not self._is_late, True
        if begins:
            threading.Thread(target=self._send_late, daemon=True, name="trimtab-late-outcomes").start()

    def _leave(self, message: bytes) -> None:
        """Put a message that is too long for the pipe into a file beside it, and send the name of that."""
        name = secrets.token_hex(16)
        try:
            Path(self._address).with_name(name).write_bytes(message)
        except OSError as error:
            _log.error("an outcome of %d bytes cannot be left for its receiver: %s", len(message), error)
        self._put(HEAD.pack(len(name), 1) + name.encode())

    def _is_sent(self, message: bytes) -> bool:
        """Whether a message is off, if only because it never can be."""
        pipe = self._pipe
        if pipe is None:
            return True
        try:
            return pipe.write(message) is not None
        except (OSError, ValueError) as error:  # nobody reads any more, or it has just been closed
            _log.error("an outcome of %d bytes cannot be sent: %s", len(message), error)
            return True

    def _send_late(self) -> None:
        """Send what waits for a receiver that is slow, in order."""
        ready = select.poll()
        with self._lock:
            if self._pipe is not None:
                ready.register(self._pipe, select.POLLOUT)
        while True:
            ready.poll(_LOOK)
            with self._lock:
                while self._late and self._is_sent(self._late[0]):
                    self._late.popleft()
                if not self._late:
                    self._is_late = False
                    return
