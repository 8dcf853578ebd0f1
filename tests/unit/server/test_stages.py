"""Where a request's time goes is counted by stage, what came from the prefix cache by itself, and errors by code."""

from __future__ import annotations

import asyncio
import time

import pytest

from server.observe.stages import Stage, Stages
from steering.errors import EngineOverloaded
from tests.fakes import FakeEngine, failing, make_catalog, make_gated_bundle, read
from tests.unit.server.conftest import Make, scrape, value


def test_what_is_done_twice_is_added_up_and_what_raises_is_timed_too() -> None:
    """A stage that fails took its time all the same."""
    stages = Stages()
    with stages.timed(Stage.PARSE):
        time.sleep(0.002)
    once = stages[Stage.PARSE]
    with pytest.raises(KeyError), stages.timed(Stage.PARSE):
        raise KeyError
    assert stages[Stage.PARSE] > once >= 0.002
    assert list(stages) == [Stage.PARSE]


async def test_every_stage_of_a_request_is_counted_once(make: Make) -> None:
    """A stream has a first token, a whole answer has none; a gate is confirmed; a category pass has its own stage."""
    spoken = make(FakeEngine(scores=[read(0.95)]), make_catalog(make_gated_bundle()))
    await spoken.chat()
    await spoken.chat(stream=True, steering={"category_source": "refusal_tokens"})
    await spoken.chat(n=0)
    found = await scrape(spoken)
    counts = {stage: value(found, "steering_stage_duration_seconds_count", stage=stage.value) for stage in Stage}
    assert counts == {
        Stage.AUTH: 3,
        Stage.BODY: 3,
        Stage.PARSE: 3,
        Stage.RESOLVE: 2,
        Stage.CATEGORY: 1,
        Stage.FIRST_TOKEN: 1,
        Stage.CONFIRM: 2,
    }


async def test_errors_are_counted_by_code(make: Make) -> None:
    """Those of callers, those of the engine, and those of streams whose status was sent before."""
    spoken = make(failing(EngineOverloaded("full"), after=2))
    await spoken.chat(stream=True)
    await spoken.chat()
    await spoken.chat(steering={"profile": "evil"})
    await spoken.client.get("/evil")
    found = await scrape(spoken)
    assert value(found, "steering_errors_total", code="server_is_overloaded") == 2
    assert value(found, "steering_errors_total", code="steering_unknown_name") == 1
    assert value(found, "steering_errors_total", code="not_found") == 1
    assert value(found, "steering_errors_total") == 4


async def test_rows_wanted_are_the_answers_that_need_one(make: Make) -> None:
    """Each sample of a steered request in flight, also while it waits in the engine's queue, which the gateway does
    not see; none of one that is left alone.
    """
    gate = asyncio.Event()
    engine = FakeEngine(gate=gate)
    spoken = make(engine)
    gateway = spoken.gateway
    await gateway.observation.start(engine, gateway.service, gateway.catalog)
    asked = [asyncio.create_task(spoken.chat(n=3, steering=steering)) for steering in ({"mode": "comply"}, False)]
    while gateway.service.inflight < 2:
        await asyncio.sleep(0)
    assert value(await scrape(spoken), "steering_rows_wanted") == 3
    gate.set()
    await asyncio.gather(*asked)
    found = await scrape(spoken)
    assert value(found, "steering_rows_wanted") == 0
    assert value(found, "steering_rows_limit") == 256
