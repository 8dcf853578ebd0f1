"""Answers: JSON and server-sent events, as plain ASGI.

Knows nothing of what is in them.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

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


class EventStream(Response):
    """Server-sent events, of one `data:` line each.

    An error after the first byte is told in a frame of its own, after which the stream ends without `[DONE]`.

    Args:
        events: closed, and so the generation ended, when the client leaves.
        decision: for the header.
        ends_with_done: `data: [DONE]` is the last line.
        on_disconnect: called when the client leaves.
    """

    def __init__(
        self,
        events: AsyncGenerator[tuple[str | None, dict[str, Any]], None],
        *,
        decision: str,
        ends_with_done: bool = True,
        on_disconnect: Callable[[], None],
    ) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", DECISION_HEADER: decision},
        )
        del self.headers["content-length"]
        self._events = events
        self._ends_with_done = ends_with_done
        self._on_disconnect = on_disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Send everything, as an ASGI application."""
        async with aclosing(self._events) as events:
            try:
                await unless_disconnected(receive, self._send_all(events, send))
            except ClientGone:
                self._on_disconnect()

    async def _send_all(self, events: AsyncGenerator[tuple[str | None, dict[str, Any]], None], send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for name, data in events:
                await _send_event(send, to_json(data), name)
            if self._ends_with_done:
                await _send_event(send, b"[DONE]")
        except TrimtabError as error:
            await _send_event(send, envelope_bytes(error))
        except OSError:  # how servers say that the client has left
            raise ClientGone from None
        except Exception:  # noqa: BLE001 - the stream is finished off here: logged with its traceback, told in a frame
            _log.exception("a stream broke")
            await _send_event(send, envelope_bytes(EngineError("internal error; the answer is incomplete")))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, payload: bytes, name: str | None = None) -> None:
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    await send({"type": "http.response.body", "body": head + b"data: " + payload + b"\n\n", "more_body": True})
