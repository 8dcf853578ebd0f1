"""Time limits of streams: an engine is given up for its silence, and never for its client's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest

from server.engine import Chunk
from server.limits import Limits, in_time
from steering.errors import EngineTimeout

HEAD = Chunk(body={})
TOKEN = Chunk(body={}, tokens=(1,))


class Source:
    """Gives chunks after pauses of so many seconds, and notes that it was closed."""

    def __init__(self, pauses: Sequence[float], chunks: Sequence[Chunk]) -> None:
        self.has_ended = False
        self._given = list(zip(pauses, chunks, strict=True))

    async def stream(self) -> AsyncGenerator[Chunk, None]:
        """The chunks."""
        try:
            for pause, chunk in self._given:
                await asyncio.sleep(pause)
                yield chunk
        finally:
            self.has_ended = True


async def read(source: Source, limits: Limits, *, slowly: float = 0.0) -> int:
    """Chunks that come, with so many seconds spent on each."""
    count = 0
    async for _ in in_time(source.stream(), limits, asyncio.get_running_loop().time()):
        count += 1
        await asyncio.sleep(slowly)
    return count


LIMITS = Limits(first_token=0.3, between=0.1, total=2.0)


async def test_a_stream_in_time_is_given_whole() -> None:
    """The first token may take longer than those after it, and what comes before it counts as nothing."""
    assert await read(Source([0.05, 0.2, 0.05, 0.05], [HEAD, TOKEN, TOKEN, TOKEN]), LIMITS) == 4


@pytest.mark.parametrize(
    ("pauses", "chunks"),
    [([0.4], [TOKEN]), ([0.1, 0.4], [HEAD, TOKEN]), ([0.0, 0.2], [TOKEN, TOKEN]), ([0.0, 0.0, 0.2], [TOKEN] * 3)],
)
async def test_silence_gives_the_engine_up(pauses: list[float], chunks: list[Chunk]) -> None:
    """Before the first token, and between two; the source is told, by the end of the wait."""
    source = Source(pauses, chunks)
    began = asyncio.get_running_loop().time()
    with pytest.raises(EngineTimeout, match="silent for too long"):
        await read(source, LIMITS)
    assert source.has_ended
    assert asyncio.get_running_loop().time() - began < sum(pauses) + 0.2


async def test_the_whole_may_not_take_too_long() -> None:
    """An engine that is never silent for long is given up all the same."""
    with pytest.raises(EngineTimeout):
        await read(Source([0.02] * 100, [TOKEN] * 100), Limits(first_token=0.3, between=0.1, total=0.5))


async def test_a_client_that_reads_slowly_is_no_silence_of_the_engine() -> None:
    """Between two chunks three times the limit passes, in which nobody waits for the engine."""
    assert await read(Source([0.0, 0.01, 0.01], [TOKEN] * 3), LIMITS, slowly=0.3) == 3


async def test_whoever_reads_can_be_cancelled() -> None:
    """As a client that leaves does: that is no timeout."""
    source = Source([0.0, 5.0], [TOKEN, TOKEN])
    reading = asyncio.create_task(read(source, Limits()))
    await asyncio.sleep(0.05)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert source.has_ended


async def test_nothing_looks_on_after_the_end() -> None:
    """A thousand chunks leave no timer behind, and none sets one of its own."""
    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []
    call_at = loop.call_at

    def counted(when: float, callback: object, *arguments: object, **named: object) -> asyncio.TimerHandle:
        timers.append(call_at(when, callback, *arguments, **named))  # type: ignore[arg-type]
        return timers[-1]

    loop.call_at = counted  # type: ignore[method-assign]
    try:

        async def given() -> AsyncGenerator[Chunk, None]:
            for _ in range(1000):
                yield TOKEN

        async for _ in in_time(given(), Limits(), loop.time()):
            pass
    finally:
        loop.call_at = call_at  # type: ignore[method-assign]
    assert len(timers) <= 2
    assert all(timer.cancelled() for timer in timers)
