"""Faults of the engine, of clients and of the machine, injected over the scripted engine: what is answered and freed.

`tests/faults/test_table.py` says which line of the table of faults each test stands for.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.fake_server import MODEL, FakeServer
from tests.faults.wire import PATIENCE, TLS, ask, ask_raw, chat, dial, eventually, frames, gauges, post

INSIDE = "secret internals"
"""What the scripted engine says where it raises what is no error of ours."""


def error_of(frame: str) -> dict[str, str]:
    """The error of an error frame."""
    return json.loads(frame)["error"]  # type: ignore[no-any-return]


def metric(server: FakeServer, name: str) -> float:
    """The sum of a counter over its labels."""
    lines = httpx.get(f"{server.admin}/metrics", timeout=PATIENCE, verify=TLS).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("script", "status", "retries"), [("#fail", 500, "false"), ("#raise", 500, None)])
def test_engine_that_fails_before_the_first_byte(
    patient: FakeServer, script: str, status: int, retries: str | None, stream: bool
) -> None:
    """A status, the envelope, nothing of the inside; the SDK is told where sending it again cannot help."""
    response = ask(patient.url, script, stream=stream)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "server_error"
    assert INSIDE not in response.text
    assert response.headers.get("x-should-retry") == "false" or retries is None
    assert gauges(patient.admin) == (0, 0)


def test_bug_ends_its_connection_with_notice(patient: FakeServer) -> None:
    """The server closes the connection after a bug and says so, else the client's next request would be lost."""
    reply = ask_raw(patient.port, post(json.dumps(chat("#raise")).encode()))
    assert (reply.status, reply.headers["connection"]) == (500, "close")


@pytest.mark.parametrize(("script", "code"), [("#full", "steering_capacity"), ("#busy", "server_is_overloaded")])
@pytest.mark.parametrize("stream", [False, True])
def test_engine_without_room(patient: FakeServer, script: str, code: str, stream: bool) -> None:
    """503 with Retry-After; a request that cannot be steered is never answered unsteered."""
    response = ask(patient.url, script, stream=stream)
    assert (response.status_code, response.json()["error"]["code"]) == (503, code)
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("stream", [False, True])
def test_engine_that_hangs_before_the_first_byte(impatient: FakeServer, stream: bool) -> None:
    """504 after the time for a first token (for an answer in one piece: of the whole), and its place is free."""
    response = ask(impatient.url, "#hang", stream=stream)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "engine_timeout")
    assert gauges(impatient.admin) == (0, 0)


def test_engine_that_hangs_in_mid_stream(impatient: FakeServer) -> None:
    """An error frame after the time between two chunks, then the end, without `[DONE]`."""
    began = time.monotonic()
    said = frames(ask(impatient.url, "#hang:3", stream=True))
    assert error_of(said[-1])["code"] == "engine_timeout"
    assert "[DONE]" not in said
    assert time.monotonic() - began < 3
    assert gauges(impatient.admin) == (0, 0)


def test_engine_that_never_ends(impatient: FakeServer) -> None:
    """A stream that goes on and on is ended with a frame after the total time."""
    said = frames(ask(impatient.url, "#tokens:100000 #pace:0.05", stream=True))
    assert error_of(said[-1])["code"] == "engine_timeout"
    assert gauges(impatient.admin) == (0, 0)


@pytest.mark.parametrize("script", ["#fail:3", "#raise:3", "#malformed:2", "#cut:2"])
def test_engine_that_breaks_in_mid_stream(patient: FakeServer, script: str) -> None:
    """An error, a bug, a chunk that is none, an end before the end: an error frame each time, and never `[DONE]`."""
    said = frames(ask(patient.url, f"{script} #tokens:9", stream=True))
    assert error_of(said[-1])["type"] == "server_error"
    assert "[DONE]" not in said
    assert len(said) > 1
    assert INSIDE not in "".join(said)
    assert gauges(patient.admin) == (0, 0)


@pytest.mark.parametrize("script", ["#cut", "#malformed"])
def test_engine_that_breaks_before_the_first_token(patient: FakeServer, script: str) -> None:
    """Then it is still a status."""
    response = ask(patient.url, script, stream=True)
    assert response.status_code in (500, 503)
    assert response.json()["error"]["type"] == "server_error"


def test_failures_are_counted(patient: FakeServer) -> None:
    """By their code, each once."""
    before = metric(patient, "steering_errors_total")
    for script in ("#fail", "#full", "#raise:3"):
        ask(patient.url, script, stream=True)
    assert eventually(lambda: metric(patient, "steering_errors_total") == before + 3)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("phase", "script"),
    [("probe", "#late"), ("prefill", "#hang"), ("decode", "#hang:3"), ("decoding", "#pace:0.01 #tokens:9999")],
)
def test_client_that_leaves(patient: FakeServer, phase: str, script: str, stream: bool) -> None:
    """In each phase the engine's request is ended within a second, and both gauges go back to zero."""
    del phase
    with dial(patient.port) as connection:
        connection.sendall(post(json.dumps(chat(script, stream=stream)).encode()))
        assert eventually(lambda: gauges(patient.admin)[0] == 1, 2.0)
        time.sleep(0.1)
        assert gauges(patient.admin)[0] == 1
    assert eventually(lambda: gauges(patient.admin) == (0, 0), 1.0)


def test_client_that_is_reset(patient: FakeServer) -> None:
    """The same for a connection that is torn down rather than closed."""
    with dial(patient.port) as connection:
        connection.sendall(post(json.dumps(chat("#pace:0.01 #tokens:9999", stream=True)).encode()))
        connection.recv(100)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert eventually(lambda: gauges(patient.admin) == (0, 0), 1.0)


def test_client_that_leaves_while_its_body_is_read(patient: FakeServer) -> None:
    """Nothing was begun, so nothing is left."""
    payload = post(json.dumps(chat("hi")).encode())
    for cut in (10, 60, len(payload) - 1):
        with dial(patient.port) as connection:
            connection.sendall(payload[:cut])
    assert ask(patient.url, "hi").status_code == 200
    assert gauges(patient.admin) == (0, 0)


def grown(server: FakeServer) -> int:
    """Bytes that a server takes more after a while."""
    before = server.resident_bytes()
    time.sleep(1.5)
    return server.resident_bytes() - before


def test_readers_that_do_not_read(patient: FakeServer) -> None:
    """Twenty streams that nobody reads hold up neither memory nor others, and end with their connections."""
    request = post(json.dumps(chat("#tokens:10000000", stream=True)).encode())
    connections = [dial(patient.port) for _ in range(20)]
    try:
        before = patient.resident_bytes()
        for connection in connections:
            connection.sendall(request)
        assert eventually(lambda: gauges(patient.admin)[0] == 20, 5.0)
        assert ask(patient.url, "hi").status_code == 200
        assert eventually(lambda: grown(patient) < 500_000, 20.0), "buffers that nobody reads keep growing"
        assert patient.resident_bytes() - before < 40_000_000
    finally:
        for connection in connections:
            connection.close()
    assert eventually(lambda: gauges(patient.admin) == (0, 0), 2.0)


@pytest.mark.parametrize("stream", [False, True])
def test_probe_that_reads_no_number(patient: FakeServer, stream: bool) -> None:
    """The answer is withheld: without scores nobody knows what was decided."""
    before = metric(patient, "steering_unapplied_total")
    response = ask(patient.url, "#nan", stream=stream)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "steering_not_applied")
    assert metric(patient, "steering_unapplied_total") == before + 1


@pytest.mark.parametrize("stream", [False, True])
def test_probe_that_takes_too_long(impatient: FakeServer, stream: bool) -> None:
    """The answer is withheld after the time for a confirmation, and the failure is counted."""
    before = metric(impatient, "steering_unapplied_total")
    response = ask(impatient.url, "#late", stream=stream)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "steering_not_applied")
    assert metric(impatient, "steering_unapplied_total") == before + 1


def test_more_requests_than_places(impatient: FakeServer) -> None:
    """Those beyond the limit get 503 with Retry-After at once; the others are answered."""
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: ask(impatient.url, "#pace:0.2 #tokens:3"), range(20)))
    assert {answer.status_code for answer in answers} == {200, 503}
    assert sum(answer.status_code == 200 for answer in answers) >= 8
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 503)


def test_more_prompts_than_places(impatient: FakeServer) -> None:
    """What no waiting helps is 400, which no client sends again."""
    response = httpx.post(
        f"{impatient.url}/v1/completions", json={"model": MODEL, "prompt": ["x"] * 9}, timeout=PATIENCE, verify=TLS
    )
    assert (response.status_code, response.json()["error"]["param"]) == (400, "n")


def test_scrapes_during_load(patient: FakeServer) -> None:
    """Metrics and health asked for all the time change no answer of thirty-two streams."""
    is_over = threading.Event()
    scrapes: list[int] = []

    def scrape() -> None:
        with httpx.Client(timeout=PATIENCE, verify=TLS) as client:
            while not is_over.is_set():
                scrapes.extend(client.get(f"{patient.admin}{path}").status_code for path in ("/metrics", "/readyz"))

    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(lambda _: ask(patient.url, "#pace:0.01 #tokens:20", stream=True), range(64)))
    finally:
        is_over.set()
        scraper.join()
    assert {frames(answer)[-1] for answer in answers} == {"[DONE]"}
    assert set(scrapes) == {200}
    assert len(scrapes) > 10
