"""Several: the prompts of one request, each answered, gated and confirmed by itself, and told as one answer.

Choices are numbered as OpenAI orders them: those of the first prompt, then those of the second. Knows nothing of HTTP,
vLLM or torch.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from msgspec import structs

from server.confirmed import Answer, OpenStream
from server.effects import Effect
from server.generation import Generation, Ticket
from server.policy import Resolution
from server.service import Service
from steering.errors import EngineOverloaded

MIXED = "mixed"
"""Decision of an answer whose prompts were not all decided alike."""

MOST_WAITING = 64
"""Chunks that wait for a client that reads slowly; then the engine's streams are not read on either."""


class Part(NamedTuple):
    """One prompt and what is to be done for it."""

    generation: Generation
    resolution: Resolution


async def complete(service: Service, parts: Sequence[Part], ticket: Ticket) -> Answer:
    """Answer every prompt, at once, in one piece.

    Raises:
        TrimtabError: one of them could not be answered; the others are given up.
    """
    if len(parts) == 1:
        return await service.complete(*parts[0], ticket)
    tasks = [
        asyncio.create_task(service.complete(*part, _numbered(ticket, number))) for number, part in enumerate(parts)
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        _raise_first(tasks)
    finally:
        await _end(tasks)
    answers = [task.result() for task in tasks]
    for number, answer in enumerate(answers):
        _shift(answer.body, number, parts[number])
    whole = answers[0].body
    whole["id"] = _id_of_all(whole["id"])
    whole["choices"] = [choice for answer in answers for choice in answer.body["choices"]]
    whole["usage"] = _sum([answer.body["usage"] for answer in answers])
    _report(whole, [answer.body.pop("steering") for answer in answers if "steering" in answer.body])
    return Answer(body=whole, effect=_effect_of_all([answer.effect for answer in answers]))


async def open_stream(service: Service, parts: Sequence[Part], ticket: Ticket) -> OpenStream:
    """Answer every prompt, at once, piece by piece; returns once the first piece of each is confirmed.

    Raises:
        TrimtabError: one of them could not be answered; the others are given up.
    """
    if len(parts) == 1:
        return await service.open_stream(*parts[0], ticket)
    merging = _Merging(service, parts, ticket)
    effect = _effect_of_all(await merging.opened())
    chunks = merging.chunks()
    return OpenStream(effect=effect, first=await anext(chunks), rest=chunks)


class _Merging:
    """Streams of several prompts, read by one task each, merged in the order in which their chunks come."""

    def __init__(self, service: Service, parts: Sequence[Part], ticket: Ticket) -> None:
        self._parts = parts
        self._told: asyncio.Queue[tuple[int, Effect | dict[str, Any] | Exception | None]] = asyncio.Queue(MOST_WAITING)
        self._are_opened = asyncio.Event()
        self._is_closing = False
        self._tasks = [
            asyncio.create_task(self._read(service, part, _numbered(ticket, number), number))
            for number, part in enumerate(parts)
        ]

    async def opened(self) -> list[Effect]:
        """What was done to the first sample of each prompt, once that is known of all."""
        effects: dict[int, Effect] = {}
        try:
            while len(effects) < len(self._parts):
                number, told = await self._told.get()
                effects[number] = _effect_in(told)
        except BaseException:
            await self._close()
            raise
        self._are_opened.set()
        return [effects[number] for number in sorted(effects)]

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The merged stream; closed, it ends all of them."""
        running = len(self._parts)
        usages: list[dict[str, Any]] = []
        reports: dict[int, dict[str, Any]] = {}
        try:
            while running:
                number, told = await self._told.get()
                if isinstance(told, Exception):
                    raise told
                if not isinstance(told, dict):
                    running -= 1
                    continue
                told["id"] = _id_of_all(told["id"])
                if not told["choices"]:
                    usages.append(told["usage"])
                    if len(usages) == len(self._parts):
                        yield {**told, "usage": _sum(usages)}
                    continue
                _shift(told, number, self._parts[number])
                if "steering" in told:
                    reports[number] = told.pop("steering")
                    if len(reports) == len(self._parts):
                        _report(told, [reports[each] for each in sorted(reports)])
                yield told
        finally:
            await self._close()

    async def _close(self) -> None:
        self._is_closing = True
        await _end(self._tasks)

    async def _read(self, service: Service, part: Part, ticket: Ticket, number: int) -> None:
        """One stream: its effect, then its chunks once all have begun, then how it ended; all in one task."""
        ended: Exception | None = None
        try:
            opened = await service.open_stream(*part, ticket)
            async with aclosing(opened.rest) as rest:
                await self._told.put((number, opened.effect))
                await self._are_opened.wait()
                await self._told.put((number, opened.first))
                async for chunk in rest:
                    await self._told.put((number, chunk))
        except asyncio.CancelledError:
            if self._is_closing:
                raise
            task = asyncio.current_task()  # the end of a drain, which came while this was not waiting for the engine
            assert task is not None
            task.uncancel()
            ended = EngineOverloaded("this server shut down before the answer was complete")
        except Exception as error:  # noqa: BLE001 - raised by whoever reads the merged stream
            ended = error
        await self._told.put((number, ended))


def _effect_in(told: object) -> Effect:
    if isinstance(told, Exception):
        raise told
    assert isinstance(told, Effect)
    return told


def _numbered(ticket: Ticket, number: int) -> Ticket:
    return dataclasses.replace(ticket, number=number)


def _id_of_all(name: str) -> str:
    """An answer's id without the number of its prompt."""
    return name.rpartition("-")[0]


def _shift(body: Mapping[str, Any], number: int, part: Part) -> None:
    for choice in body["choices"]:
        choice["index"] += number * part.generation.samples


def _sum(usages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    total: dict[str, Any] = {name: sum(usage[name] for usage in usages) for name in names}
    details = [usage["prompt_tokens_details"] for usage in usages if usage.get("prompt_tokens_details")]
    if details:
        total["prompt_tokens_details"] = {"cached_tokens": sum(each.get("cached_tokens") or 0 for each in details)}
    return total


def _report(body: dict[str, Any], reports: Sequence[dict[str, Any]]) -> None:
    """The `steering` object tells of the first prompt, and of each in its list."""
    if reports:
        body["steering"] = {**reports[0], "prompts": list(reports)}


def _effect_of_all(effects: Sequence[Effect]) -> Effect:
    """What the header tells: of the first prompt, and whether the others were decided alike."""
    is_mixed = len({effect.decision for effect in effects}) > 1
    return structs.replace(effects[0], decision=MIXED) if is_mixed else effects[0]


def _raise_first(tasks: Sequence[asyncio.Task[Answer]]) -> None:
    """Raise what the first of the tasks that failed did; the others may not have ended."""
    for task in tasks:
        if task.done():
            task.result()


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel what has not ended, and wait until it has."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
