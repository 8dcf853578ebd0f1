"""Outcome sender: the worker's and the scheduler's end of the way back, one message per step, no RPC.

The receiver binds a local socket and names it in the environment, which engine processes inherit; the first rank of the
worker sends what a step made known as soon as the forward pass that edited the last prompt token has been launched,
which is before that token's successor is sampled; the scheduler sends why it does not run a request. Knows nothing of
models.

The socket keeps messages apart and in order by itself (`SOCK_SEQPACKET`), so that sending one is one system call of the
engine's thread: a message library's thread would cost each first token half a millisecond of a small machine.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Sequence

from steering.errors import TrimtabError, UnsupportedConfiguration
from steering.outcome import Message, Outcome, Response

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
        if len(outcomes) <= MOST_IN_A_MESSAGE and len(responses) <= MOST_IN_A_MESSAGE:
            self._put(Message(outcomes=outcomes, responses=responses).to_bytes())
            return
        for start in range(0, max(len(outcomes), len(responses)), MOST_IN_A_MESSAGE):
            part = slice(start, start + MOST_IN_A_MESSAGE)
            self._put(Message(outcomes=outcomes[part], responses=responses[part]).to_bytes())

    def reject(self, plan_id: str, error: TrimtabError) -> None:
        """Tell why a request was never run; vLLM's own way back has no room for a reason."""
        if self._socket is not None:
            self._put(Message(rejected={plan_id: error.to_fields()}).to_bytes())

    def close(self) -> None:
        """Send nothing any more, not even what waits."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def _put(self, message: bytes) -> None:
        # Without the lock, as nothing waits: messages of two threads have no order.
        if not self._is_late and self._is_sent(message):
            return
        with self._lock:
            self._late.append(message)
            begins, self._is_late = not self._is_late, True
        if begins:
            threading.Thread(target=self._send_late, daemon=True, name="trimtab-late-outcomes").start()

    def _is_sent(self, message: bytes) -> bool:
        """Whether a message is off, if only because it never can be."""
        receiver = self._socket
        if receiver is None:
            return True
        try:
            receiver.send(message)
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
