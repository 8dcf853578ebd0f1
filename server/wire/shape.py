"""Shapes: how the answers of an endpoint look. The service's own are OpenAI's chat completions.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, NamedTuple, Protocol

from server.confirmed import OpenStream


class Event(NamedTuple):
    """A server-sent event; `name` is None for those that have only data."""

    name: str | None
    data: dict[str, Any]


class Shape(Protocol):
    """How answers of an endpoint look."""

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        """An answer in one piece, made of a `chat.completion` object, which it may change."""
        ...

    def events(self, opened: OpenStream) -> AsyncGenerator[Event, None]:
        """The events of a streamed answer, made of `chat.completion.chunk` objects; closed, it closes `opened.rest`."""
        ...

    @property
    def ends_with_done(self) -> bool:
        """Whether `data: [DONE]` ends the stream."""
        ...


class ChatShape:
    """Answers as the service gives them."""

    ends_with_done = True

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        """The object itself."""
        return body

    async def events(self, opened: OpenStream) -> AsyncGenerator[Event, None]:
        """Each chunk is an event."""
        async with aclosing(opened.rest) as rest:
            yield Event(None, opened.first)
            async for chunk in rest:
                yield Event(None, chunk)


class CompletionShape:
    """Answers as `text_completion` objects."""

    ends_with_done = True

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        """The object with texts in the place of messages; an echoed prompt goes before each."""
        for choice in body["choices"]:
            message = choice.pop("message")
            choice["text"] = message.get("prompt", "") + (message["content"] or "")
        body["object"] = "text_completion"
        return body

    async def events(self, opened: OpenStream) -> AsyncGenerator[Event, None]:
        """Each chunk is an event; an echoed prompt waits for the first text of its choice, and its logprobs."""
        echoed: dict[int, str] = {}
        async with aclosing(opened.rest) as rest:
            for made in self._made(opened.first, echoed):
                yield made
            async for chunk in rest:
                for made in self._made(chunk, echoed):
                    yield made

    def _made(self, chunk: dict[str, Any], echoed: dict[int, str]) -> list[Event]:
        for choice in chunk["choices"]:
            delta = choice.pop("delta")
            if (prompt := delta.get("prompt")) is not None:
                echoed[choice["index"]] = prompt
                return []
            choice["text"] = echoed.pop(choice["index"], "") + (delta.get("content") or "")
        chunk["object"] = "text_completion"
        return [Event(None, chunk)]
