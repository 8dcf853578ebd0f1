"""Connections: peers that send too much, too slowly, or do not read, spoken to over raw sockets."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import pairwise
from typing import Any, BinaryIO

import httpx
import pytest

from server.connections import SURPLUS
from tests.fake_server import RUNNING, FakeServer, fake_serving
from tests.fakes import MODEL

HEADERS = 0.5
STALL = 1.0
BEAT = 0.2
FIRST = 1.0
IDLE = 1
PATIENCE = 15.0


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    """A server that waits for little, over the engine that follows a script."""
    with fake_serving(
        "--quiet",
        TRIMTAB_HEADER_TIMEOUT=str(HEADERS),
        TRIMTAB_WRITE_TIMEOUT=str(STALL),
        TRIMTAB_KEEP_ALIVE_INTERVAL=str(BEAT),
        TRIMTAB_FIRST_TOKEN_TIMEOUT=str(FIRST),
    ) as running:
        yield running


@pytest.fixture(scope="module")
def crowded() -> Iterator[FakeServer]:
    """A server that has room for two connections, and keeps those that nobody uses for a second."""
    with fake_serving("--quiet", TRIMTAB_MAX_CONNECTIONS="2", TRIMTAB_KEEP_ALIVE_TIMEOUT=str(IDLE)) as running:
        yield running


def connect(server: FakeServer, **options: int) -> socket.socket:
    """A connection; `receive_buffer` bytes are taken in without being read."""
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if "receive_buffer" in options:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options["receive_buffer"])
    connection.settimeout(PATIENCE)
    connection.connect(("127.0.0.1", server.port))
    return connection


def everything(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    pieces = []
    while True:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            piece = b""
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)


def send(connection: socket.socket, data: bytes) -> None:
    """As much as the other side takes; it may close in between."""
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(data)


def ask(**fields: object) -> bytes:
    """A request for a streamed completion."""
    body = json.dumps({"model": MODEL, "stream": True, **fields}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def say(script: str) -> list[dict[str, str]]:
    """Messages that tell the engine what to do."""
    return [{"role": "user", "content": script}]


def metric(server: FakeServer, name: str) -> float:
    """The sum of a metric's samples."""
    text = httpx.get(f"{server.admin}/metrics", timeout=PATIENCE).text
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.1\r\nhost: x\r\n" + b"x: y\r\n" * 100 + b"\r\n",
        b"GET /livez HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 17_000 + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 3_000_000,
        b"GET /livez?" + b"y" * 17_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /livez?" + b"y" * 3_000_000,
    ],
    ids=["fields", "bytes", "no end", "address", "address without end"],
)
def test_too_much_ahead_of_a_body_is_431(server: FakeServer, head: bytes) -> None:
    """Told in the envelope and ended, however it is spread; what has no end is not kept."""
    before = server.resident_bytes()
    with connect(server) as connection:
        send(connection, head)
        answer = everything(connection)
    if len(head) < 100_000:  # else the kernel may drop the answer with what was not read
        status, _, body = answer.partition(b"\r\n\r\n")
        assert status.startswith(b"HTTP/1.1 431 ")
        assert json.loads(body)["error"]["code"] == "headers_too_large"
    assert server.resident_bytes() - before < 8_000_000
    assert httpx.get(f"{server.url}/livez").status_code == 200


def test_headers_up_to_the_limits_are_read(server: FakeServer) -> None:
    """Just below both, in pieces."""
    with connect(server) as connection:
        for piece in (
            b"GET /livez HTTP/1.1\r\nhost: x\r\n",
            b"x: " + b"y" * 15_000 + b"\r\n",
            b"z: y\r\n" * 90,
            b"\r\n",
        ):
            connection.sendall(piece)
            time.sleep(0.02)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("sent", [b"", b"G", b"GET /livez HTTP/1.1\r\nhost: x\r\n", b"\r\n"])
def test_a_peer_that_does_not_ask_is_not_waited_for(server: FakeServer, sent: bytes) -> None:
    """Nothing, or the beginning of headers: closed without an answer."""
    with connect(server) as connection:
        connection.sendall(sent)
        began = time.monotonic()
        assert everything(connection) == b""
        assert time.monotonic() - began < PATIENCE - 1


def test_a_peer_between_two_requests_is_waited_for(server: FakeServer) -> None:
    """The limit is for a request that has begun; a connection kept for the next one stays."""
    with httpx.Client(base_url=server.url) as client:
        assert client.get("/livez").status_code == 200
        (pooled,) = client._transport._pool.connections  # type: ignore[attr-defined]
        time.sleep(HEADERS * 3)
        assert client.get("/livez").status_code == 200
        assert client._transport._pool.connections == [pooled]  # type: ignore[attr-defined]


def test_a_body_that_nobody_waits_for_is_not_read_for_long(server: FakeServer) -> None:
    """Refused by its length, it may come for some seconds more, so that the answer is read, and then the end is."""
    with connect(server) as connection:
        connection.sendall(ask(messages=say("x")).replace(b"content-length: ", b"content-length: 99999"))
        assert everything(connection).startswith(b"HTTP/1.1 413 ")


def test_what_is_no_http_is_told_in_the_envelope(server: FakeServer) -> None:
    """400, and the server does not name itself."""
    with connect(server) as connection:
        connection.sendall(b"EHLO mail\r\n\r\n")
        status, _, body = everything(connection).partition(b"\r\n\r\n")
    assert status.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "invalid_http"
    assert "server" not in httpx.get(f"{server.url}/livez").headers


def next_answer(answers: BinaryIO) -> tuple[int, dict[str, Any]]:
    """The status and the body of the next answer of a connection's."""
    status = int(answers.readline().split()[1])
    length = int(http.client.parse_headers(answers)["content-length"])
    return status, json.loads(answers.read(length))


H2C = b"connection: keep-alive, Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
WEBSOCKET = (
    b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


@pytest.mark.parametrize("wish", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
@pytest.mark.parametrize("cuts", [(), (40,), (-1,), (150, -20)], ids=str)
def test_a_wish_for_another_protocol_is_ignored(server: FakeServer, wish: bytes, cuts: tuple[int, ...]) -> None:
    """The request is answered as the plain one that it is, from its whole body, however it is cut into pieces; so are
    those that were sent behind it and the one after them.
    """
    plain = [ask(messages=say(f"#tokens:{count}"), stream=False) for count in (3, 4, 5)]
    wishing = [request.replace(b"host: x\r\n", b"host: x\r\n" + wish) for request in plain]
    with connect(server) as connection, connection.makefile("rb") as answers:
        sent = wishing[0] + plain[1] + wishing[2]
        ends = [cut % len(sent) for cut in cuts] + [len(sent)]
        for begin, end in pairwise([0, *ends]):
            connection.sendall(sent[begin:end])
            time.sleep(0.02)
        for count in (3, 4, 5):
            status, body = next_answer(answers)
            assert (status, body["usage"]["completion_tokens"]) == (200, count)
        connection.sendall(wishing[1])
        assert next_answer(answers)[1]["usage"]["completion_tokens"] == 4


def test_a_body_in_chunks_is_read_despite_a_wish_for_another_protocol(server: FakeServer) -> None:
    """Chunks are put together as ever, and a body that is no JSON is told of as ever."""
    head, _, body = ask(messages=say("#tokens:3"), stream=False).partition(b"\r\n\r\n")
    head = re.sub(rb"content-length: \d+", H2C + b"transfer-encoding: chunked", head)
    for text, status in ((body, 200), (b"{", 400)):
        with connect(server) as connection, connection.makefile("rb") as answers:
            connection.sendall(head + b"\r\n\r\n")
            for piece in (text[:1], text[1:]):
                connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if piece else b"")
            connection.sendall(b"0\r\n\r\n")
            assert next_answer(answers)[0] == status


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_last_request_is_answered_despite_a_wish_for_another_protocol(server: FakeServer, version: str) -> None:
    """A connection that is to be closed behind the answer is, in the old version and by what the headers say."""
    request = ask(messages=say("#tokens:3"), stream=False)
    request = request.replace(
        b"HTTP/1.1\r\n", b"HTTP/%s\r\nconnection: Upgrade, close\r\nupgrade: h2c\r\n" % version.encode()
    )
    with connect(server) as connection:
        connection.sendall(request)
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(("path", "status"), [("/v1/realtime", 404), ("/v1/chat/completions", 405)])
def test_a_websocket_gets_a_plain_answer(server: FakeServer, path: str, status: int) -> None:
    """Never 101: a handshake is a GET of something that is not there, and the connection goes on as HTTP."""
    with connect(server) as connection, connection.makefile("rb") as answers:
        for _ in range(2):
            connection.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n".encode() + WEBSOCKET + b"\r\n")
            found, body = next_answer(answers)
            assert (found, body["error"]["type"]) == (status, "invalid_request_error")


@pytest.mark.parametrize("target", ["x:443", "/v1/models"])
def test_a_tunnel_is_refused(server: FakeServer, target: str) -> None:
    """CONNECT, which parsers take for a change of protocol too, with a wish for one or without."""
    for wish in (b"", WEBSOCKET):
        with connect(server) as connection, connection.makefile("rb") as answers:
            connection.sendall(f"CONNECT {target} HTTP/1.1\r\nhost: x\r\n".encode() + wish + b"\r\n")
            assert next_answer(answers)[0] in (400, 404, 405)


def test_too_many_headers_are_431_beside_a_wish_for_another_protocol(server: FakeServer) -> None:
    """The limits are kept while a head is read, so that none is read twice beyond them."""
    with connect(server) as connection:
        send(connection, b"GET /livez HTTP/1.1\r\nhost: x\r\n" + WEBSOCKET + b"x: y\r\n" * 100 + b"\r\n")
        assert everything(connection).startswith(b"HTTP/1.1 431 ")


def test_peers_that_do_not_read_are_cut_off(server: FakeServer) -> None:
    """Sixteen streams: memory does not grow with what is generated, the engine is freed, and each is counted."""
    stalls, before = metric(server, "steering_stream_stalls_total"), server.resident_bytes()
    with ExitStack() as stack:
        for _ in range(16):
            connection = stack.enter_context(connect(server, receive_buffer=4096))
            connection.sendall(ask(messages=say("#tokens:100000"), max_tokens=100_000, ignore_eos=True))
        deadline = time.monotonic() + PATIENCE * 2
        most = 0
        while metric(server, "steering_stream_stalls_total") < stalls + 16:
            most = max(most, server.resident_bytes())
            assert time.monotonic() < deadline, "streams that nobody reads go on"
            time.sleep(0.05)
        while metric(server, RUNNING) or metric(server, "steering_inflight_requests"):
            assert time.monotonic() < deadline, "the engine still works for peers that were cut off"
            time.sleep(0.05)
    assert most - before < 16 * 2_000_000


def test_a_stream_that_waits_is_kept_alive(server: FakeServer) -> None:
    """Comments come while no token does; what goes wrong then is told in a frame, as the status is out."""
    with httpx.stream(
        "POST",
        f"{server.url}/v1/chat/completions",
        json={"model": MODEL, "stream": True, "messages": say("#hang:0")},
        timeout=PATIENCE,
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.status_code == 200
    assert "x-trimtab-decision" not in response.headers
    assert lines[:2] == [": keep-alive"] * 2
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "engine_timeout"


def test_a_slow_stream_is_kept_alive_and_complete(server: FakeServer) -> None:
    """Comments between tokens belong to no event: what is said is the same."""
    with httpx.stream(
        "POST",
        f"{server.url}/v1/chat/completions",
        json={"model": MODEL, "stream": True, "messages": say("#tokens:4 #pace:0.5"), "max_tokens": 4},
        timeout=PATIENCE,
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert ": keep-alive" in lines
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert chunks[-1]["choices"][0]["finish_reason"]
    assert chunks[-1]["steering"]["decision"] == "off"


def test_what_fails_before_the_first_byte_keeps_its_status(server: FakeServer) -> None:
    """Within the interval nothing was sent."""
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", json={"model": MODEL, "stream": True, "messages": say("#fail:0")}
    )
    assert answer.status_code == 500


def occupied(server: FakeServer, stack: ExitStack, script: str = "#tokens:3 #pace:1") -> list[socket.socket]:
    """Two connections on which answers are awaited, which is all that there is room for."""
    connections = [stack.enter_context(connect(server)) for _ in range(2)]
    for connection in connections:
        connection.sendall(ask(messages=say(script), stream=False))
    deadline = time.monotonic() + PATIENCE
    while metric(server, RUNNING) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return connections


@pytest.mark.parametrize("request_", [b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n", b"no HTTP", b"x" * 1_000_000])
def test_one_connection_too_many_is_told_so_in_the_envelope(crowded: FakeServer, request_: bytes) -> None:
    """503, to be tried again soon, and closed, whatever is asked and however much is sent; others are answered, and
    operators reach their own port.
    """
    with ExitStack() as stack:
        refused = metric(crowded, "steering_connections_refused_total")
        held = occupied(crowded, stack)
        with connect(crowded) as connection:
            send(connection, request_)
            head, _, body = everything(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in head
        assert b"connection: close" in head
        error = json.loads(body)["error"]
        assert (error["code"], error["type"]) == ("server_is_overloaded", "server_error")
        assert "2 connections" in error["message"]
        assert metric(crowded, "steering_connections_refused_total") == refused + 1
        assert httpx.get(f"{crowded.admin}/readyz").status_code == 200
        for each in held:
            with each.makefile("rb") as answers:
                assert next_answer(answers)[0] == 200
    deadline = time.monotonic() + PATIENCE
    while httpx.get(f"{crowded.url}/livez").status_code != 200:
        assert time.monotonic() < deadline, "room is not given back"


def test_silent_connections_beyond_the_most_are_not_kept(crowded: FakeServer) -> None:
    """Some wait for a moment, so that what they ask can be answered; those beyond them are closed at once."""
    with ExitStack() as stack:
        occupied(crowded, stack)
        waiting = [stack.enter_context(connect(crowded)) for _ in range(SURPLUS)]
        assert everything(stack.enter_context(connect(crowded))) == b""
        send(waiting[-1], b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        assert everything(waiting[-1]).startswith(b"HTTP/1.1 503 ")
        assert everything(waiting[0]) == b""


def test_an_idle_connection_is_closed_after_the_time_that_is_set(crowded: FakeServer) -> None:
    """Kept for the next request for so long, and no longer."""
    with connect(crowded) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        with connection.makefile("rb") as answers:
            assert next_answer(answers)[0] == 200
        began = time.monotonic()
        assert everything(connection) == b""
        assert IDLE * 0.8 < time.monotonic() - began < IDLE + 5
