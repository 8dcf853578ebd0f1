"""What the routes that generate have in common: from a body to a confirmed answer, streamed or not.

An endpoint differs in how its body is parsed and in the shape of its answer.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, NamedTuple, Protocol

from fastapi import Request
from starlette.responses import Response

from server.answers import DECISION_HEADER, EventStream, JsonAnswer
from server.body import read_json_body, unless_disconnected
from server.gateway import gateway_of
from server.generation import Generation, Ticket
from server.service import OpenStream


class Asked(NamedTuple):
    """A parsed body: what is to be generated, whether piece by piece, and how the answer is to look."""

    generation: Generation
    is_stream: bool
    shape: Shape


class Shape(Protocol):
    """How answers of an endpoint look; the service's are OpenAI's chat completions."""

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


class Event(NamedTuple):
    """A server-sent event; `name` is None for those that have only data."""

    name: str | None
    data: dict[str, Any]


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


async def answer(request: Request, parse: Callable[[bytes], Asked]) -> Response:
    """Read, check, let in and answer a request.

    Args:
        request: with its body unread.
        parse: of the endpoint.
    """
    gateway = gateway_of(request)
    facts = request.scope["trimtab"]
    caller = gateway.admit(request)
    body = await read_json_body(
        request.headers,
        request.receive,
        limit=gateway.settings.max_body_bytes,
        wait=gateway.settings.body_timeout,
    )
    asked = parse(body)
    resolution = gateway.service.resolve(asked.generation, caller)
    facts.profile, facts.decision = resolution.profile.name, resolution.mode.value
    gateway.check_ready()
    ticket = Ticket(request_id=facts.request_id, caller=caller, endpoint=request.scope["path"], trace=trace_of(request))
    if asked.is_stream:
        opening = gateway.service.open_stream(asked.generation, resolution, ticket)
        opened = await unless_disconnected(request.receive, opening)
        facts.decision, facts.is_steered = opened.effect.decision, opened.effect.applied
        return EventStream(
            asked.shape.events(opened),
            decision=opened.effect.decision,
            ends_with_done=asked.shape.ends_with_done,
            on_disconnect=gateway.metrics.disconnects.inc,
        )
    whole = await unless_disconnected(request.receive, gateway.service.complete(asked.generation, resolution, ticket))
    facts.decision, facts.is_steered = whole.effect.decision, whole.effect.applied
    return JsonAnswer(asked.shape.whole(whole.body), headers={DECISION_HEADER: whole.effect.decision})


def trace_of(request: Request) -> dict[str, str]:
    """The headers of W3C's trace context that came with a request."""
    return {name: request.headers[name] for name in ("traceparent", "tracestate") if name in request.headers}
