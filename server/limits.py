"""Limits: how much at once, and how long at most; and what gives up on an engine that takes longer.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from server.engine import Chunk
from steering.errors import EngineOverloaded, EngineTimeout, InvalidSpec

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much at once, and how long at most; times in seconds.

    Attributes:
        inflight: answers being generated at once, `n` of each request; more are refused with 503.
        answer_tokens: of an answer whose request names no number.
        outcome: from the first token of a sample to the engine's confirmation of its edit.
        first_token: from admission to the first token of a stream.
        between: between two chunks of a stream.
        total: from admission to the end.
    """

    inflight: int = 1024
    answer_tokens: int = 4096
    outcome: float = 5.0
    first_token: float = 120.0
    between: float = 60.0
    total: float = 600.0


class Places:
    """How many answers are being generated, held against how many may be; a request takes `n` places at once.

    Args:
        most: places.
        on_change: told how many are taken.
    """

    def __init__(self, most: int, on_change: Callable[[int], None]) -> None:
        self._most = most
        self._on_change = on_change
        self._taken = 0

    def check(self, answers: int) -> None:
        """Refuse what no waiting helps.

        Raises:
            InvalidSpec: there are not as many places.
        """
        if answers > self._most:
            raise InvalidSpec(
                f"this asks for {answers} answers (prompts times n); this server gives {self._most} answers at once",
                parameter="n",
            )

    def take(self, samples: int) -> None:
        """Take the places of one prompt.

        Raises:
            InvalidSpec: there are not as many, however long it is waited.
            EngineOverloaded: too few are free.
        """
        self.check(samples)
        if self._taken + samples > self._most:
            raise EngineOverloaded(
                f"this server generates {self._most} answers at once, each of the n of a request counted; try again"
            )
        self._taken += samples
        self._on_change(self._taken)

    def leave(self, samples: int) -> None:
        """Give them back."""
        self._taken -= samples
        self._on_change(self._taken)


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
    deadline, has_begun = _Deadline(min(began + limits.first_token, end)), False
    try:
        while True:
            try:
                chunk = await deadline.awaited(source)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise EngineTimeout("the engine was silent for too long; the request was given up") from None
            yield chunk
            has_begun = has_begun or bool(chunk.tokens)
            if has_begun:
                deadline.move(min(clock() + limits.between, end))
    finally:
        deadline.close()


class _Deadline:
    """A time by which something has to have come. `asyncio.timeout` sets a timer for every chunk; here there is one,
    which looks when it was due how far away the deadline is by now, since hardly any is ever reached.

    Args:
        when: by the event loop's clock.
    """

    LOOK = 0.05
    """Seconds until the next look where the deadline has passed and nobody waits: the client reads slowly."""

    def __init__(self, when: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Task[Any] | None = None
        self._is_over = False
        self._when = self._looks_at = when
        self._timer = self._loop.call_at(when, self._look)

    async def awaited(self, source: AsyncGenerator[Chunk, None]) -> Chunk:
        """The next chunk.

        Raises:
            StopAsyncIteration: there is none.
            TimeoutError: the deadline passed while it was waited for.
        """
        task = self._waiting = asyncio.current_task()
        try:
            return await anext(source)
        except asyncio.CancelledError:
            if not self._is_over or task is None or task.uncancel():  # somebody else has cancelled it, too
                raise
            raise TimeoutError from None
        finally:
            self._waiting = None

    def move(self, when: float) -> None:
        """Another deadline, from now on."""
        self._when = when
        if when < self._looks_at:
            self._timer.cancel()
            self._look_at(when)

    def close(self) -> None:
        """Look no more."""
        self._timer.cancel()

    def _look_at(self, when: float) -> None:
        self._looks_at = when
        self._timer = self._loop.call_at(when, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        if self._waiting is not None and now >= self._when:
            self._is_over = True
            self._waiting.cancel()
            return
        self._look_at(max(self._when, now + self.LOOK))
