"""Ledger: what the service tells of a request, kept until the edge has sent its answer and writes it down.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from server.observe.events import Ended, Usage


class Ledger:
    """Ended requests by id; an observer. Holds no more than there are requests being answered."""

    def __init__(self) -> None:
        self._events: dict[str, list[Ended]] = {}

    def __len__(self) -> int:
        return len(self._events)

    def ended(self, event: Ended) -> None:
        """Keep it, unless it came by no edge."""
        if not event.ticket.is_internal:
            self._events.setdefault(event.ticket.request_id, []).append(event)

    def take(self, request_id: str) -> Ended | None:
        """What is known of a request, once; None where it did not reach the engine."""
        events = self._events.pop(request_id, None)
        return None if events is None else _whole(events)


def _whole(events: Sequence[Ended]) -> Ended:
    """One event for all prompts of a request: that of the first to end, with the tokens and verdicts of all."""
    first = events[0]
    if len(events) == 1:
        return first
    usages = [event.usage for event in events if event.usage is not None]
    usage = Usage(
        prompt=sum(usage.prompt for usage in usages),
        completion=sum(usage.completion for usage in usages),
        cached=sum(usage.cached for usage in usages),
    )
    return dataclasses.replace(
        first,
        verdicts=tuple(verdict for event in events for verdict in event.verdicts),
        usage=usage if usages else None,
        error=next((event.error for event in events if event.error is not None), None),
        is_complete=all(event.is_complete for event in events),
        seconds=max(event.seconds for event in events),
    )
