"""Reading a request: its body under a cap, and whether the client is still there.

Works on ASGI messages, below any framework's request object.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, MutableMapping
from typing import Any, TypeVar

from starlette.types import Receive

from server.errors import BodyTimeout, BodyTooLarge, UnsupportedMedia

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection; nothing can be answered."""


async def read_json_body(headers: Mapping[str, str], receive: Receive, *, limit: int, wait: float) -> bytes:
    """The body's bytes, counted while they arrive.

    Args:
        headers: of the request, names in lower case.
        receive: of ASGI.
        limit: most bytes.
        wait: seconds for the whole body.

    Raises:
        UnsupportedMedia: not declared as plain JSON.
        BodyTooLarge: more than `limit`, whatever Content-Length says.
        BodyTimeout: not complete in time.
        ClientGone: closed before it was complete.
    """
    media = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise UnsupportedMedia(f"content-type must be application/json, got {media[:100]!r}")
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise UnsupportedMedia("compressed bodies are not accepted; send the body without content-encoding")
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    try:
        async with asyncio.timeout(wait):
            return await _read(receive, limit)
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {wait:g} s") from None


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, and cancel it as soon as the client closes its connection.

    It runs in a task of its own: each piece of a stream that wakes it would else go through every layer that stands
    around a request.

    Raises:
        ClientGone: the client left first; the work has ended by then.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait((working,))
            if not working.cancelled():
                working.exception()  # of no interest to anybody any more, and would be logged as never retrieved


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read(receive: Receive, limit: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while True:
        message: MutableMapping[str, Any] = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece = message.get("body", b"")
        size += len(piece)
        if size > limit:
            raise _too_large(limit)
        pieces.append(piece)
        if not message.get("more_body", False):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has more than {limit} bytes")
