"""The heartbeat: an engine that lives and gives no token is found."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import pytest

from server.engine import Call
from server.gateway import Gateway
from steering.errors import CapacityExceeded, EngineError
from tests.fakes import FakeEngine, make_catalog, make_gated_bundle
from tests.unit.server.conftest import Make, Spoken


@dataclass
class FullEngine(FakeEngine):
    """Slow, and all its room is taken by clients: what the server asks itself waits for ever.

    Attributes:
        has_room_for: requests of its own that are answered all the same.
    """

    has_room_for: int = 0

    async def _tokens(self, call: Call) -> AsyncGenerator[tuple[int, int, str], None]:
        if call.request_id.startswith("selfcheck"):
            self.has_room_for -= 1
            if self.has_room_for < 0:
                await asyncio.Event().wait()
        async for piece in super()._tokens(call):
            yield piece
            await asyncio.sleep(0.01)


async def states(spoken: Spoken) -> tuple[int, int, int]:
    """Statuses of liveness, readiness, and a request."""
    return (
        (await spoken.client.get("/livez")).status_code,
        (await spoken.client.get("/readyz")).status_code,
        (await spoken.chat()).status_code,
    )


async def test_a_beat_asks_for_a_token_unsteered_and_one_steered(make: Make) -> None:
    """Both ways through the engine, and nothing of it is counted as traffic."""
    engine = FakeEngine()
    spoken = make(engine)
    await spoken.gateway.heartbeat.beat()
    assert [None if call.plan is None else call.plan.edit for call in engine.calls] == [None, "refuse-political"]
    assert all(call.fields["max_tokens"] == 1 for call in engine.calls)
    assert spoken.gateway.heartbeat.failure is None
    assert "steering_decisions_total{" not in (await spoken.admin.get("/metrics")).text


@pytest.mark.parametrize(
    "engine",
    [
        FakeEngine(fails=EngineError("a device that is gone")),
        FakeEngine(fails=RuntimeError("a bug")),
        FakeEngine(confirms=False),
        FakeEngine(gate=asyncio.Event()),
    ],
    ids=["error", "bug", "unconfirmed", "hanging"],
)
async def test_a_beat_that_fails_ends_readiness_and_three_end_the_server(make: Make, engine: FakeEngine) -> None:
    """Balancers are told at once; requests are still taken; when nothing helps, liveness ends too."""
    spoken = make(engine, heartbeat_timeout=0.05, total_timeout=0.05)
    heartbeat = spoken.gateway.heartbeat
    await heartbeat.beat()
    assert (await spoken.client.get("/readyz")).status_code == 503
    assert (await spoken.client.get("/readyz")).json()["error"]["code"] == "not_ready"
    assert (await spoken.client.get("/livez")).status_code == 200
    assert "steering_ready 0.0" in (await spoken.admin.get("/metrics")).text
    await heartbeat.beat()
    assert not heartbeat.is_lost
    await heartbeat.beat()
    assert heartbeat.is_lost
    assert (await spoken.client.get("/livez")).status_code == 503


async def test_tokens_that_come_again_end_the_alarm(make: Make) -> None:
    """By a beat, or by a request that was steered or read by a gate; one that was not proves too little."""
    engine = FakeEngine(bundles=[make_gated_bundle()])
    spoken = make(engine, make_catalog(make_gated_bundle()), heartbeat_timeout=0.05)
    for heals in ({"mode": "comply"}, {"mode": "auto"}):
        await _fail(spoken.gateway, engine)
        assert (await spoken.chat(steering={"mode": "off"})).status_code == 200
        assert (await spoken.client.get("/readyz")).status_code == 503
        assert (await spoken.chat(steering=heals)).status_code == 200
        assert await states(spoken) == (200, 200, 200)
    await _fail(spoken.gateway, engine)
    await spoken.gateway.heartbeat.beat()
    assert await states(spoken) == (200, 200, 200)


async def test_a_full_engine_is_not_a_broken_one(make: Make) -> None:
    """No room for one more says that others are being served."""
    spoken = make(FakeEngine(fails=CapacityExceeded("full")))
    await spoken.gateway.heartbeat.beat()
    assert spoken.gateway.heartbeat.failure is None


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_an_engine_that_gives_tokens_to_others_is_not_lost(make: Make, stream: bool) -> None:
    """However many beats wait in its queue in vain, with no answer complete meanwhile; once it gives nothing to anybody
    as many beats as ever find it out.
    """
    engine = FullEngine(words=["word"] * 400)
    spoken = make(engine, heartbeat_timeout=0.15)
    heartbeat = spoken.gateway.heartbeat
    asked = asyncio.create_task(spoken.chat(stream=stream, max_tokens=400))
    while not engine.generated:
        await asyncio.sleep(0.001)
    for _ in range(4):
        await heartbeat.beat()
        assert (heartbeat.failure, heartbeat.is_lost) == (None, False)
    assert not asked.done()
    engine.gate = asyncio.Event()
    for _ in range(3):
        assert not heartbeat.is_lost
        await heartbeat.beat()
    assert heartbeat.is_lost
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)


async def test_its_own_tokens_do_not_make_an_engine_live(make: Make) -> None:
    """One that answers unsteered and hangs under an edit fails the beat, though a token has come."""
    spoken = make(FullEngine(has_room_for=1), heartbeat_timeout=0.1)
    await spoken.gateway.heartbeat.beat()
    assert spoken.gateway.heartbeat.failure is not None


async def test_traffic_spares_beats(make: Make) -> None:
    """While steered answers end within the interval there is no beat; when they stop, beats begin."""
    engine = FakeEngine()
    spoken = make(engine, heartbeat_interval=0.2)
    running = asyncio.create_task(spoken.gateway.heartbeat.run())
    try:
        for _ in range(8):
            await spoken.chat(steering={"mode": "comply"})
            await asyncio.sleep(0.05)
        assert not [call for call in engine.calls if call.request_id.startswith("selfcheck")]
        async with asyncio.timeout(10):
            while not [call for call in engine.calls if call.request_id.startswith("selfcheck")]:
                await asyncio.sleep(0.01)
    finally:
        running.cancel()


async def _fail(gateway: Gateway, engine: FakeEngine) -> None:
    engine.fails = EngineError("broke")
    await gateway.heartbeat.beat()
    engine.fails = None
    assert gateway.heartbeat.failure is not None
