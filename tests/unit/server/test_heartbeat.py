"""The heartbeat: an engine that lives and gives no token is found."""

from __future__ import annotations

import asyncio

import pytest

from server.gateway import Gateway
from steering.errors import CapacityExceeded, EngineError
from tests.fakes import FakeEngine, make_catalog, make_gated_bundle
from tests.unit.server.conftest import Make, Spoken


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
