"""Answers: JSON and server-sent events, as plain ASGI.

Knows nothing of what is in them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.body import ClientGone, unless_disconnected
from server.errors import envelope_bytes, reply_to
from steering.errors import EngineError, TrimtabError

DECISION_HEADER = "x-trimtab-decision"

_log = logging.getLogger("trimtab")


class JsonAnswer(Response):
    """A JSON body; `body` may be bytes that are JSON already."""

    media_type = "application/json"

    def __init__(self, body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(body if isinstance(body, bytes) else to_json(body), status_code=status, headers=headers)


def error_answer(error: TrimtabError, headers: Mapping[str, str] | None = None) -> JsonAnswer:
    """The error in OpenAI's envelope, with the status and headers of the table."""
    reply = reply_to(error)
    return JsonAnswer(envelope_bytes(error), reply.status, {**reply.headers, **(headers or {})})


class Opened(NamedTuple):
    """A stream whose first event is there: its events, to be closed by whoever reads them, and the decision."""

    events: AsyncGenerator[tuple[str | None, dict[str, Any]], None]
    decision: str


class EventStream(Response):
    """Server-sent events, of one `data:` line each.

    An error before the first byte is raised, so that it is answered with its status. One after it is told in a frame of
    its own, after which the stream ends without `[DONE]`. When nothing was there to be sent for `keep_alive` seconds, a
    comment is; one before the first event is the first byte, and then the decision is told by the last event alone.

    Args:
        opening: awaited for the events; cancelled, or the events closed, and so the generation ended, when the client
            leaves.
        ends_with_done: `data: [DONE]` is the last line.
        keep_alive: seconds.
        on_disconnect: called when the client leaves after the first byte.

    Raises:
        ClientGone: when called as an application; the client left before the first byte.
    """

    def __init__(
        self,
        opening: Awaitable[Opened],
        *,
        ends_with_done: bool = True,
        keep_alive: float,
        on_disconnect: Callable[[], None],
    ) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._opening = opening
        self._ends_with_done = ends_with_done
        self._keep_alive = keep_alive
        self._on_disconnect = on_disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Send everything, as an ASGI application."""
        wire = _Wire(send, self.raw_headers)
        beat = asyncio.create_task(wire.keep_alive(self._keep_alive), name="keep-alive")
        try:
            await unless_disconnected(receive, self._send_all(wire))
        except ClientGone:
            if not wire.has_begun:
                raise
            self._on_disconnect()
        finally:
            beat.cancel()

    async def _send_all(self, wire: _Wire) -> None:
        try:
            opened = await self._opening
            async with aclosing(opened.events) as events:
                wire.decide(opened.decision)
                async for name, data in events:
                    await wire.event(to_json(data), name)
            if self._ends_with_done:
                await wire.event(b"[DONE]")
        except OSError:  # how servers say that the client has left
            raise ClientGone from None
        except TrimtabError as error:
            if not wire.has_begun:
                raise
            await wire.event(envelope_bytes(error))
        except Exception:
            if not wire.has_begun:
                raise
            # The stream is finished off here: logged with its traceback, told in a frame.
            _log.exception("a stream broke")
            await wire.event(envelope_bytes(EngineError("internal error; the answer is incomplete")))
        await wire.end()


class _Wire:
    """What was sent of a stream so far; whole events only, whoever sends them.

    Attributes:
        has_begun: the status and headers are sent, or just being.
    """

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self.has_begun = False
        self._send = send
        self._headers = headers
        self._turn = asyncio.Lock()
        self._sent_at = asyncio.get_running_loop().time()

    def decide(self, decision: str) -> None:
        """Tell the decision in the headers, where they are not sent yet."""
        if not self.has_begun:
            self._headers.append((DECISION_HEADER.encode(), decision.encode()))

    async def event(self, payload: bytes, name: str | None = None) -> None:
        """Send an event."""
        head = b"" if name is None else b"event: " + name.encode() + b"\n"
        await self._write(head + b"data: " + payload + b"\n\n")

    async def end(self) -> None:
        """Send the end."""
        await self._write(b"", is_more=False)

    async def keep_alive(self, interval: float) -> None:
        """Send a comment whenever nothing else was sent for a while, until cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(max(0.0, self._sent_at + interval - clock()))
            if clock() >= self._sent_at + interval:
                try:
                    await self._write(b": keep-alive\n\n")
                except OSError:  # the client has left, which whoever sends the events is told as well
                    return

    async def _write(self, body: bytes, *, is_more: bool = True) -> None:
        is_first, self.has_begun = not self.has_begun, True
        async with self._turn:
            if is_first:
                await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
            await self._send({"type": "http.response.body", "body": body, "more_body": is_more})
            self._sent_at = asyncio.get_running_loop().time()
