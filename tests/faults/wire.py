"""Wire: raw connections to a server, for what no client library would send.

Knows nothing of what is served.
"""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from tests.fake_server import MODEL, RUNNING

CHAT = "/v1/chat/completions"
TLS = ssl.create_default_context()
"""Made once, since it takes longer than an answer; nothing here is encrypted."""

PATIENCE = 20.0
"""Seconds for an answer; longer than any timeout of the servers under test."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer read from a raw connection; `rest` is what followed it."""

    status: int
    headers: dict[str, str]
    body: bytes
    rest: bytes

    @property
    def code(self) -> str | None:
        """Of the error envelope."""
        return json.loads(self.body)["error"]["code"]  # type: ignore[no-any-return]


def dial(port: int) -> socket.socket:
    """A connection to a server on this machine."""
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)


def head(
    method: str = "POST",
    path: str = CHAT,
    *,
    host: str = "gateway",
    length: int | None = None,
    media: str = "application/json",
    **extra: str,
) -> bytes:
    """Request line and headers, written as they are given."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}"]
    if length is not None:
        lines += [f"Content-Type: {media}", f"Content-Length: {length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in extra.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def post(body: bytes, path: str = CHAT, **extra: str) -> bytes:
    """A whole request."""
    return head(path=path, length=len(body), **extra) + body


def read_reply(connection: socket.socket, before: bytes = b"") -> Reply:
    """Read one answer of known length.

    Args:
        connection: open.
        before: bytes that were read with the answer before.

    Raises:
        EOFError: closed before the answer was complete.
    """
    found = before
    while b"\r\n\r\n" not in found:
        found += _some(connection)
    top, _, found = found.partition(b"\r\n\r\n")
    first, *lines = top.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = int(headers.get("content-length", "0"))
    while len(found) < length:
        found += _some(connection)
    return Reply(status=int(first.split()[1]), headers=headers, body=found[:length], rest=found[length:])


def ask_raw(port: int, request: bytes) -> Reply:
    """Send bytes, read one answer."""
    with dial(port) as connection:
        connection.sendall(request)
        return read_reply(connection)


def is_closed(connection: socket.socket, within: float = 5.0) -> bool:
    """Whether the server closes the connection in time; what it still says is thrown away."""
    connection.settimeout(within)
    try:
        while connection.recv(65_536):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


def chat(text: str, **fields: Any) -> dict[str, Any]:
    """A body of one user message."""
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


def ask(url: str, text: str, **fields: Any) -> httpx.Response:
    """A chat completion of one user message."""
    return httpx.post(f"{url}{CHAT}", json=chat(text, **fields), timeout=PATIENCE, trust_env=False, verify=TLS)


def ask_bytes(url: str, body: bytes, path: str = CHAT) -> httpx.Response:
    """What is answered to a body, whatever it holds."""
    headers = {"content-type": "application/json"}
    return httpx.post(f"{url}{path}", content=body, headers=headers, timeout=PATIENCE, trust_env=False, verify=TLS)


def frames(response: httpx.Response) -> list[str]:
    """The data of each server-sent event."""
    return [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]


def gauges(admin: str) -> tuple[float, float]:
    """Requests that the gateway and that the engine say are being answered."""
    text = httpx.get(f"{admin}/metrics", timeout=PATIENCE, trust_env=False, verify=TLS).text
    values = {}
    for line in text.splitlines():
        if line.startswith(("steering_inflight_requests ", f"{RUNNING} ", f"{RUNNING}{{")):
            values[line.partition(" ")[0].partition("{")[0]] = float(line.rpartition(" ")[2])
    return values["steering_inflight_requests"], values[RUNNING]


def eventually(is_so: Callable[[], bool], within: float = 1.0) -> bool:
    """Whether something becomes true in time."""
    end = time.monotonic() + within
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _some(connection: socket.socket) -> bytes:
    found = connection.recv(65_536)
    if not found:
        raise EOFError("the connection was closed before the answer was complete")
    return found
