"""Several prompts of one request: read together, ended together, and never further ahead than a slow client allows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from server.access.caller import LOCAL
from server.engine import Call, Chunk
from server.generation import Ticket
from server.several import MOST_WAITING, Part, complete, open_stream
from server.wire.completions import CompletionRequest
from server.wire.parsing import parse
from tests.fakes import MODEL, FakeEngine
from tests.unit.server.conftest import Make, Spoken


def parts_of(spoken: Spoken, prompts: int) -> list[Part]:
    """So many prompts, each resolved to a plan of its own."""
    fields = {"model": MODEL, "prompt": ["x"] * prompts, "steering": {"mode": "refuse"}}
    made = parse(CompletionRequest, json.dumps(fields).encode()).to_generations()
    return [Part(each, spoken.gateway.service.resolve(each, LOCAL)) for each in made]


async def test_a_stream_that_is_closed_ends_every_prompt(make: Make) -> None:
    """A client that leaves after one piece frees the engine of all of them at once."""
    engine = FakeEngine(words=["a"] * 1000)
    spoken = make(engine)
    opened = await open_stream(spoken.gateway.service, parts_of(spoken, 3), Ticket(request_id="r"))
    assert spoken.gateway.service.inflight == 3
    await opened.rest.aclose()
    assert spoken.gateway.service.inflight == 0
    assert sorted(engine.aborted) == ["r-0", "r-1", "r-2"]
    assert len(engine.forgotten) == 3


async def test_a_stream_that_nobody_reads_is_not_read_ahead(make: Make) -> None:
    """What waits for a slow client is bounded, whatever the engine could give."""
    given = 0

    class Counting(FakeEngine):
        async def stream(self, call: Call) -> AsyncGenerator[Chunk, None]:
            nonlocal given
            async with aclosing(super().stream(call)) as chunks:
                async for chunk in chunks:
                    given += 1
                    yield chunk

    spoken = make(Counting(words=["a"] * 10_000))
    opened = await open_stream(spoken.gateway.service, parts_of(spoken, 2), Ticket(request_id="r"))
    await asyncio.sleep(0.2)
    assert given < MOST_WAITING + 10
    await opened.rest.aclose()
    assert spoken.gateway.service.inflight == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_is_cancelled_ends_every_prompt(make: Make, stream: bool) -> None:
    """A client that leaves while the engine works on its first tokens ends all of them."""
    engine = FakeEngine(gate=asyncio.Event())
    spoken = make(engine)
    service, parts = spoken.gateway.service, parts_of(spoken, 3)

    async def ask() -> None:
        await (open_stream if stream else complete)(service, parts, Ticket(request_id="r"))

    asking = asyncio.create_task(ask())
    while service.inflight < 3:
        await asyncio.sleep(0.01)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert service.inflight == 0
    assert len(engine.aborted) == 3
