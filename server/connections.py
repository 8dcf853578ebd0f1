"""Connections: uvicorn's HTTP protocol, with limits on what a peer may send ahead of a body and how long it may wait.

They speak HTTP/1.1 and nothing else: a wish for another protocol is ignored. Knows nothing of what is served.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.errors import HeadersTooLarge, envelope_bytes, reply_to
from steering.errors import CallerError, EngineOverloaded, TrimtabError

UNSENT = 128 * 1024
"""Bytes that the kernel keeps of an answer before the peer has room for them; without, it may be megabytes."""

LINGER = 5.0
"""Seconds that the rest of a body is thrown away for after an answer that did not wait for it; closing at once would
make the peer's kernel drop the answer."""

SURPLUS, SURPLUS_PATIENCE = 128, 1.0
"""Connections beyond the most that wait at once to be told so, and seconds that they may: until the peer has sent
something, since an answer ahead of what is asked may be lost. More are closed without a word."""

_PER_BYTE = 8
"""Bytes of framing that a byte of a body may come with: a chunk of one byte takes six."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """What a peer is allowed; times in seconds.

    Attributes:
        headers: from the first byte of a request, or from the connection, to the end of the request's headers.
        write: for what waits to be sent to drain; a peer that reads more slowly is cut off.
        header_bytes: most bytes of request line and headers.
        header_fields: most headers.
        connections: most that are open at once.
        on_stall: called when a peer was cut off for not reading.
        on_surplus: called for each connection beyond the most.
    """

    headers: float = 10.0
    write: float = 60.0
    header_bytes: int = 16 * 1024
    header_fields: int = 100
    connections: int = 2048
    on_stall: Callable[[], None] = lambda: None
    on_surplus: Callable[[], None] = lambda: None


def protocol_of(patience: Patience) -> type[HttpToolsProtocol]:
    """The protocol class, for `uvicorn.Config(http=...)`, that allows a peer so much."""
    return type("Connection", (_Connection,), {"patience": patience})


class _Connection(HttpToolsProtocol):
    patience: Patience

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._framing = 0
        """Bytes of the message being read, without those that its body makes up for."""
        self._head_bytes = self._head_fields = 0
        self._plain_head = b""
        """Of a request that wishes for another protocol, its head without that wish."""
        self._is_reading = False
        """A message has begun and is not complete."""
        self._is_surplus = False
        """One too many: whatever it asks, it is told so."""
        self._is_told = False
        self._headers_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # uvicorn's signature
        super().connection_made(transport)
        _keep_little_unsent(transport)
        beyond = len(self.connections) - self.patience.connections
        self._is_surplus = beyond > 0
        if self._is_surplus:
            self.patience.on_surplus()
        if beyond > SURPLUS:
            transport.abort()
            return
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._headers_timer, self._write_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_surplus:
            self._turn_away()
            return
        self._framing += len(data)
        if self._headers_timer is None and not self._is_reading:
            self._await_headers()
        self._unset_keepalive_if_required()
        try:
            rest = memoryview(data)
            while rest:
                rest = self._parse(rest)
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")
        if self._is_reading and self._framing > self.patience.header_bytes and not self.transport.is_closing():
            self._refuse(_too_large(self.patience))

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is told in the envelope; errors raised while headers are read come here as well."""
        if not self.transport.is_closing():
            self._refuse(CallerError(msg, code="invalid_http"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._framing = self._head_bytes = self._head_fields = 0
        self._is_reading = True

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._head_bytes += len(name) + len(value) + 4
        self._head_fields += 1
        if self._head_fields > self.patience.header_fields or self._head_bytes > self.patience.header_bytes:
            self._refuse(_too_large(self.patience))
            raise ValueError  # ends the parser; uvicorn then asks for a 400, which is not sent any more

    def on_headers_complete(self) -> None:
        if self._wishes_to_upgrade:
            kept = b"".join(b"%s: %s\r\n" % field for field in self.headers if field[0] != b"upgrade")
            version = self.parser.get_http_version().encode()
            self._plain_head = b"%s %s HTTP/%s\r\n%s\r\n" % (self.parser.get_method(), self.url, version, kept)
            return
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None
        if not self.transport.is_closing():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._framing -= len(body) * (_PER_BYTE + 1)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._wishes_to_upgrade:
            return
        self._is_reading = False
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Also: a body that nobody waits for any more is not read for long."""
        if self._is_reading and not self.transport.is_closing():
            self._linger_timer = self.loop.call_later(LINGER, self.transport.abort)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.patience.write, self._cut_off)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """As uvicorn's; a peer that has not even read its answer is not waited for."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        super().timeout_keep_alive_handler()

    @property
    def _is_answering(self) -> bool:
        cycle: Any = self.cycle  # None before the first request, which uvicorn's annotation leaves out
        return cycle is not None and not cycle.response_complete

    @property
    def _wishes_to_upgrade(self) -> bool:
        """The head being read asks for another protocol; CONNECT, which has no plain form, is left to be refused."""
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _parse(self, data: memoryview) -> memoryview:
        """Read up to the first head that wishes for another protocol, and this head without its wish.

        A server may ignore it (RFC 9110, 7.8), while the parser ends such a message ahead of its body.

        Returns:
            What is not read yet, the body of such a request first.

        Raises:
            HttpParserError: it is no HTTP.
        """
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._plain_head:
                head, self._plain_head = self._plain_head, b""
                # A new one, as the old one reads nothing more after `connection: close`; as lenient as uvicorn's.
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self.parser.feed_data(head)
                return data[upgrade.args[0] :]
        return data[:0]

    def _await_headers(self) -> None:
        wait = min(self.patience.headers, SURPLUS_PATIENCE) if self._is_surplus else self.patience.headers
        self._headers_timer = self.loop.call_later(wait, self._give_up)

    def _give_up(self) -> None:
        """No request line, or no end of the headers, in time. What came is not answered: it is no request yet."""
        self._headers_timer = None
        if not self._is_answering and not self.transport.is_closing():
            self.transport.close()

    def _cut_off(self) -> None:
        self._write_timer = None
        self.patience.on_stall()
        self.transport.abort()  # closing would wait for the peer to read

    def _turn_away(self) -> None:
        """Tell a peer that it is one too many, and read what it still sends until it closes or its time is up."""
        if self._is_told or self.transport.is_closing():
            return
        self._is_told = True
        self.transport.write(_reply(_too_many(self.patience)))
        self.transport.write_eof()

    def _refuse(self, error: TrimtabError) -> None:
        """Answer in the envelope, below ASGI, and close."""
        if not self._is_answering:
            self.transport.write(_reply(error))
        self.transport.close()


def _reply(error: TrimtabError) -> bytes:
    """An error as a whole answer, the last of its connection."""
    reply, body = reply_to(error), envelope_bytes(error)
    fixed = {"content-type": "application/json", "connection": "close", "content-length": str(len(body))}
    headers = {**reply.headers, **fixed}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return STATUS_LINE[reply.status] + head.encode() + b"\r\n" + body


def _too_large(patience: Patience) -> HeadersTooLarge:
    return HeadersTooLarge(
        f"request line and headers have more than {patience.header_bytes} bytes or {patience.header_fields} fields"
    )


def _too_many(patience: Patience) -> EngineOverloaded:
    return EngineOverloaded(f"this server has {patience.connections} connections open, and takes no more; try again")


def _keep_little_unsent(transport: asyncio.Transport) -> None:
    """Bound what the kernel keeps for a peer that does not read."""
    connection: socket.socket | None = transport.get_extra_info("socket")
    option = getattr(socket, "TCP_NOTSENT_LOWAT", 25)  # of Linux; Python 3.11 does not name it
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, option, UNSENT)
