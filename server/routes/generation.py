"""What the routes that generate have in common: from a body to a confirmed answer, streamed or not.

An endpoint differs in how its body is parsed and in the shape of its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import NamedTuple

from fastapi import Request
from starlette.responses import Response

from server.answers import DECISION_HEADER, EventStream, JsonAnswer, Opened
from server.body import read_json_body, unless_disconnected
from server.gateway import gateway_of
from server.generation import Generation, Ticket
from server.observe.metrics import Phase
from server.observe.stages import Stage
from server.several import Part, complete, open_stream
from server.wire.shape import Shape
from steering.errors import CallerError


class Asked(NamedTuple):
    """A parsed body.

    Attributes:
        generations: what is to be generated; several for the prompts of one completions request.
        is_stream: piece by piece.
        shape: how the answer is to look.
        names: what this endpoint calls the fields that the engine may find at fault.
    """

    generations: Sequence[Generation]
    is_stream: bool
    shape: Shape
    names: Mapping[str, str] = MappingProxyType({})


async def answer(request: Request, parse: Callable[[bytes], Asked]) -> Response:
    """Read, check, let in and answer a request.

    Args:
        request: with its body unread.
        parse: of the endpoint.
    """
    gateway = gateway_of(request)
    facts = request.scope["trimtab"]
    with facts.stages.timed(Stage.AUTH):
        caller = gateway.admit(request)
    with facts.stages.timed(Stage.BODY):
        body = await read_json_body(
            request.headers,
            request.receive,
            limit=gateway.settings.max_body_bytes,
            wait=gateway.settings.body_timeout,
        )
    with facts.stages.timed(Stage.PARSE):
        asked = parse(body)
    with facts.stages.timed(Stage.RESOLVE), _in_words_of(asked):
        parts = [Part(each, gateway.service.resolve(each, caller)) for each in asked.generations]
        gateway.service.check_room(sum(each.samples for each in asked.generations))
    first = parts[0].resolution
    facts.profile, facts.decision = first.profile.name, first.mode.value
    gateway.check_ready()
    ticket = Ticket(request_id=facts.request_id, caller=caller, endpoint=request.scope["path"], trace=facts.trace)
    if asked.is_stream:

        async def opening() -> Opened:
            with _in_words_of(asked):
                opened = await open_stream(gateway.service, parts, ticket)
            facts.decision, facts.is_steered = opened.effect.header, opened.effect.applied
            return Opened(asked.shape.events(opened), opened.effect.header)

        return EventStream(
            opening(),
            ends_with_done=asked.shape.ends_with_done,
            keep_alive=gateway.settings.keep_alive_interval,
            on_disconnect=lambda: gateway.metrics.left(Phase.STREAMING),
        )
    with _in_words_of(asked):
        whole = await unless_disconnected(request.receive, complete(gateway.service, parts, ticket))
    facts.decision, facts.is_steered = whole.effect.header, whole.effect.applied
    return JsonAnswer(asked.shape.whole(whole.body), headers={DECISION_HEADER: whole.effect.header})


@contextmanager
def _in_words_of(asked: Asked) -> Iterator[None]:
    """Service and engine speak of a chat's fields; what they find at fault is told by the endpoint's own names."""
    try:
        yield
    except CallerError as error:
        error.parameter = asked.names.get(error.parameter or "", error.parameter)
        raise
