"""Faults of the machine: the clock jumps, names cannot be resolved, nothing can be written; answers do not change.

In this process, over ASGI, where the machine can be taken away from under it.
"""

from __future__ import annotations

import datetime as dt
import logging
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import time_machine

from server.app import create_app, create_gateway
from server.settings import Settings
from tests.fake_server import ScriptedEngine
from tests.fakes import make_catalog, make_gated_bundle
from tests.faults.wire import CHAT, chat, frames


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway in this process."""
    gateway = create_gateway(ScriptedEngine(), make_catalog(make_gated_bundle()), Settings())
    gateway.is_armed = True
    transport = httpx.ASGITransport(app=create_app(gateway))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as found:
        yield found


@pytest.mark.parametrize("step", [-86_400, 86_400, 10 * 365 * 86_400])
async def test_clock_step(client: httpx.AsyncClient, step: int) -> None:
    """A day back, a day on, ten years on: durations are measured on a clock that nobody sets."""
    now = dt.datetime.now(dt.UTC)
    with time_machine.travel(now, tick=True) as traveller:
        before = await client.post(CHAT, json=chat("hi", stream=True))
        traveller.move_to(now + dt.timedelta(seconds=step))
        after = await client.post(CHAT, json=chat("#pace:0.01 #tokens:5", stream=True))
    assert frames(before)[-1] == frames(after)[-1] == "[DONE]"


async def test_names_cannot_be_resolved(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request needs a name service."""

    def gone(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
        monkeypatch.setattr(socket, name, gone)
    assert (await client.post(CHAT, json=chat("hi"))).status_code == 200


async def test_log_cannot_be_written(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk behind standard error costs log lines and no answer."""

    class Full:
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())  # where logging itself complains
    log, handler = logging.getLogger("trimtab"), logging.StreamHandler(Full())
    monkeypatch.setattr(log, "level", logging.INFO)
    log.addHandler(handler)
    try:
        assert (await client.post(CHAT, json=chat("hi"))).status_code == 200
        assert (await client.post(CHAT, json=chat("#fail"))).status_code == 500
    finally:
        log.removeHandler(handler)
