"""The end of the process: told once it lets answers finish, told twice it does not, without an engine it fails."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from server import process
from server.settings import Settings
from steering.errors import EngineDied
from tests.fake_server import RUNNING, FakeServer, fake_serving
from tests.fakes import MODEL, FakeEngine, make_catalog
from tests.unit.server.test_connections import metric, say

PATIENCE = 60.0


class Reader:
    """A client that reads a stream to its end in a thread of its own."""

    def __init__(self, server: FakeServer, script: str) -> None:
        self.lines: list[str] = []
        body = {"model": MODEL, "stream": True, "messages": say(script), "max_tokens": 4000, "ignore_eos": True}
        self._body, self._url = body, f"{server.url}/v1/chat/completions"
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=PATIENCE) as response:
            for line in response.iter_lines():
                if line:
                    self.lines.append(line)


@contextmanager
def reading(server: FakeServer, script: str, count: int = 1) -> Iterator[list[Reader]]:
    """So many streams, once all have begun; read to their ends afterwards."""
    readers = [Reader(server, script) for _ in range(count)]
    deadline = time.monotonic() + PATIENCE
    while not all(reader.lines for reader in readers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert metric(server, RUNNING)
    yield readers
    for reader in readers:
        reader.thread.join(PATIENCE)
        assert not reader.thread.is_alive()


def test_fifty_streams_finish_before_the_end() -> None:
    """Not ready from the signal on; new work is taken until balancers had their time to see that, and then refused; all
    answers complete, exit code 0.
    """
    with fake_serving("--quiet", TRIMTAB_DRAIN_DELAY="3", TRIMTAB_DRAIN_GRACE="120") as server:
        url, body = f"{server.url}/v1/chat/completions", {"model": MODEL, "messages": say("x")}
        with reading(server, "#tokens:120 #pace:0.1", count=50) as readers:
            server.process.send_signal(signal.SIGTERM)
            signalled = time.monotonic()
            time.sleep(0.2)
            assert httpx.get(f"{server.url}/readyz").json()["error"]["code"] == "draining"
            assert httpx.get(f"{server.url}/livez").status_code == 200
            assert httpx.post(url, json=body).status_code == 200
            assert time.monotonic() < signalled + 3, "this machine is too slow to tell"
            while (refused := httpx.post(url, json=body)).status_code == 200:
                assert time.monotonic() < signalled + PATIENCE
                time.sleep(0.1)
            assert time.monotonic() > signalled + 2.9
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert server.process.wait(PATIENCE) == 0
    assert [reader.lines[-1] for reader in readers] == ["data: [DONE]"] * 50


def test_what_outlasts_the_grace_is_told() -> None:
    """The streams that are left get a frame, and the exit code is 0 all the same."""
    with fake_serving("--quiet", TRIMTAB_DRAIN_DELAY="0", TRIMTAB_DRAIN_GRACE="0.3") as server:
        with reading(server, "#tokens:4000 #pace:0.05", count=5) as readers:
            server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0
    for reader in readers:
        assert json.loads(reader.lines[-1].removeprefix("data: "))["error"]["code"] == "server_is_overloaded"


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_told_twice_it_ends_at_once(second: signal.Signals) -> None:
    """Whatever is in flight, and however long the grace would be."""
    with fake_serving("--quiet", TRIMTAB_DRAIN_DELAY="60", TRIMTAB_DRAIN_GRACE="600") as server:
        with reading(server, "#tokens:4000 #pace:0.05", count=3) as readers:
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert server.process.poll() is None
            began = time.monotonic()
            server.process.send_signal(second)
            server.process.wait(PATIENCE)
            assert time.monotonic() - began < 8
        assert all("[DONE]" not in reader.lines[-1] for reader in readers)


@pytest.mark.parametrize("is_hanging", [False, True], ids=["dead", "hanging"])
async def test_without_its_engine_the_process_fails(monkeypatch: pytest.MonkeyPatch, is_hanging: bool) -> None:
    """For a moment it tells balancers and those in flight; then it ends with an error, for an orchestrator to see. What
    its start made was taken out of the garbage collector's way before it served.
    """
    forced: list[float] = []
    monkeypatch.setattr(process, "_end_within", forced.append)
    frozen: list[int] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.get_count()[0]))
    monkeypatch.setattr(gc, "set_threshold", lambda *_: None)  # this process is not only a server
    engine = FakeEngine()
    addresses: asyncio.Queue[str] = asyncio.Queue()
    settings = Settings(
        port=0, admin_port=0, death_delay=0.5, heartbeat_interval=0.1, heartbeat_timeout=0.05, heartbeat_failures=2
    )
    serving = asyncio.create_task(
        process.serve_engine(
            engine, make_catalog(), settings, on_ready=lambda clients, _: addresses.put_nowait(clients)
        )
    )
    async with asyncio.timeout(PATIENCE), httpx.AsyncClient(base_url=await addresses.get()) as client:
        assert (await client.get("/readyz")).status_code == 200
        assert len(frozen) == 1
        engine.gate = asyncio.Event()
        asked = asyncio.create_task(client.post("/v1/chat/completions", json={"model": MODEL, "messages": say("x")}))
        await asyncio.sleep(0.05)
        engine.is_alive = is_hanging
        while (await client.get("/livez")).status_code == 200:
            await asyncio.sleep(0.02)
        assert (await client.get("/readyz")).status_code == 503
        assert (await asked).status_code == 503
        with pytest.raises(EngineDied):
            await serving
    assert forced
