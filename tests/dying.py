"""Clients that end badly: connections reset or half closed, and processes killed in the middle of an answer.

Nothing is owed to them but an end: whatever they do, the server goes on, and holds nothing of theirs for long. Knows of
what is served nothing but that it speaks HTTP/1.1.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

WAYS = ("reset in a request", "reset in an answer", "half-closed")
PATIENCE = 60.0
"""Seconds in which an answer begins, and a connection that its client has closed halfway ends."""

RESET = struct.pack("ii", 1, 0)
"""Of SO_LINGER: closing sends a reset and drops what was not sent."""

VICTIM = """
import json, select, socket, sys
host, port, requests = json.load(sys.stdin)
held = [socket.create_connection((host, port)) for _ in requests]
for connection, request in zip(held, requests):
    connection.sendall(request.encode())
while True:
    for connection in select.select(held, [], [])[0]:
        if not connection.recv(4096):
            held.remove(connection)
    print(flush=True)
"""
"""A process that asks on several connections at once, says when something came, and reads on."""


def request_of(path: str, body: Mapping[str, Any]) -> bytes:
    """A whole request, as it goes over the wire."""
    payload = json.dumps(body).encode()
    lines = (f"POST {path} HTTP/1.1", "Host: gateway", "Content-Type: application/json")
    return ("\r\n".join(lines) + f"\r\nContent-Length: {len(payload)}\r\n\r\n").encode() + payload


async def die(way: str, url: str, request: bytes, dice: random.Random) -> str:
    """Ask on a connection that ends in one of `WAYS`.

    Returns:
        `killed`, or `lost: ` and what the server did wrong.
    """
    try:
        reader, writer = await asyncio.open_connection(*_address(url))
    except OSError as error:
        return f"lost: {way}: no connection: {error}"
    try:
        async with asyncio.timeout(PATIENCE):
            if way == "reset in a request":
                await _send(writer, request[: dice.randrange(1, len(request))])
                await asyncio.sleep(dice.uniform(0, 0.05))
            elif way == "reset in an answer":
                await _send(writer, request)
                await reader.read(1)
                await asyncio.sleep(dice.uniform(0, 0.05))
            else:
                await _send(writer, request)
                writer.write_eof()
                while await reader.read(65_536):
                    pass
    except TimeoutError:
        return f"lost: {way}: nothing came in {PATIENCE:g} s"
    except OSError:
        pass  # the server may have ended it first
    finally:
        connection: socket.socket = writer.get_extra_info("socket")
        with contextlib.suppress(OSError):  # closed already
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.transport.abort()
    return "killed"


async def kill_a_process(url: str, requests: Sequence[bytes], dice: random.Random) -> str:
    """Have a process of its own ask, and kill it while it is being answered; returns as `die`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", "-c", VICTIM, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        asked = json.dumps([*_address(url), [request.decode() for request in requests]])
        process.stdin.write(asked.encode())
        process.stdin.close()
        async with asyncio.timeout(PATIENCE):
            told = await process.stdout.readline()
        await asyncio.sleep(dice.uniform(0, 0.3))
    except TimeoutError:
        told = b""
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        ended = await process.wait()
    if not told or ended != -signal.SIGKILL:
        return f"lost: a process was not answered, and ended with {ended}"
    return "killed"


async def _send(writer: asyncio.StreamWriter, payload: bytes) -> None:
    writer.write(payload)
    await writer.drain()


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port
