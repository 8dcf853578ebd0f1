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
from server.service import OpenStream
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
    """Server-sent events: one `data:` line per chunk and a last `data: [DONE]`.

    An error after the first byte is told in a frame of its own, after which the stream ends without `[DONE]`.

    Args:
        opened: the chunks; closed, and so the generation ended, when the client leaves.
        on_disconnect: called when it does.
    """

    def __init__(self, opened: OpenStream, *, on_disconnect: Callable[[], None]) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={
                "cache-control": "no-cache",
                "x-accel-buffering": "no",
                DECISION_HEADER: opened.effect.decision,
            },
        )
        del self.headers["content-length"]
        self._opened = opened
        self._on_disconnect = on_disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Send everything, as an ASGI application."""
        async with aclosing(self._opened.rest) as rest:
            try:
                await unless_disconnected(receive, self._send_all(rest, send))
            except ClientGone:
                self._on_disconnect()

    async def _send_all(self, rest: AsyncGenerator[dict[str, Any], None], send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await _send_event(send, to_json(self._opened.first))
            async for chunk in rest:
                await _send_event(send, to_json(chunk))
            await _send_event(send, b"[DONE]")
        except TrimtabError as error:
            await _send_event(send, envelope_bytes(error))
        except OSError:  # how servers say that the client has left
            raise ClientGone from None
        except Exception:  # noqa: BLE001 - the stream is finished off here: logged with its traceback, told in a frame
            _log.exception("a stream broke")
            await _send_event(send, envelope_bytes(EngineError("internal error; the answer is incomplete")))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, payload: bytes) -> None:
    await send({"type": "http.response.body", "body": b"data: " + payload + b"\n\n", "more_body": True})
