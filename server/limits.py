"""Limits: how much at once, and how long at most; and what gives up on an engine that takes longer.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass
from typing import TypeVar

from server.engine import Chunk
from steering.errors import EngineTimeout

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much at once, and how long at most; times in seconds.

    Attributes:
        inflight: requests being answered at once; more are refused with 503.
        outcome: from the first token of a sample to the engine's confirmation of its edit.
        first_token: from admission to the first token of a stream.
        between: between two chunks of a stream.
        total: from admission to the end.
        verdict: from the last token of an answer to what the response probe read of it; then it is unknown.
    """

    inflight: int = 1024
    outcome: float = 5.0
    first_token: float = 120.0
    between: float = 60.0
    total: float = 600.0
    verdict: float = 0.05


async def within(limit: float, work: Awaitable[T], what: str) -> T:
    """What `work` gives, unless it takes longer than `limit` seconds; `what` is what was waited for."""
    try:
        async with asyncio.timeout(limit):
            return await work
    except TimeoutError:
        raise EngineTimeout(f"the engine did not give {what} within {limit:g} s; the request was given up") from None


async def in_time(source: AsyncGenerator[Chunk, None], limits: Limits, began: float) -> AsyncGenerator[Chunk, None]:
    """`source`, given up when it is silent for too long or goes on for too long."""
    clock = asyncio.get_running_loop().time
    end = began + limits.total
    deadline, has_begun = began + limits.first_token, False
    while True:
        try:
            async with asyncio.timeout_at(min(deadline, end)):
                chunk = await anext(source)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise EngineTimeout("the engine was silent for too long; the request was given up") from None
        yield chunk
        has_begun = has_begun or bool(chunk.tokens)
        if has_begun:
            deadline = clock() + limits.between
