"""Steered: a request with a plan, as the worker knows it from its first step to its last. Knows nothing of tables."""

from __future__ import annotations

import math
from concurrent.futures import Future
from typing import Any, NamedTuple

from msgspec import Struct

from steering.engine.orders import Order
from steering.manifest import MAX_RESPONSE_TOKENS

_NO_SCORES = (math.nan,) * MAX_RESPONSE_TOKENS
"""A response probe has read nothing yet."""


class Steered(Struct, kw_only=True, eq=False):
    """A request with a plan that is known, running or preempted.

    Attributes:
        plan_id: what is told of it is told under this.
        order: what is asked of it.
        scores: what its response probe has read, by generated token; NaN where the host knows nothing yet.
        is_observed: its response probe has not read yet all that it reads.
        is_left_alone: its gate has decided to edit nothing.
        is_over: nothing is asked of it any more: nothing is edited, and what was to be observed has been.
        row: 0 while it waits after a preemption.
        is_due: its last prompt token has been in a step, whose forward pass decides or applies.
        latched: what its gate has written into its row, `Order.told` of it, once the host knows; survives preemption.
        reading: ends when the host knows it.
    """

    request_id: str
    plan_id: str
    order: Order
    prompt_length: int
    scores: tuple[float, ...] = _NO_SCORES
    is_observed: bool = False
    is_left_alone: bool = False
    is_over: bool = False
    row: int = 0
    is_due: bool = False
    latched: tuple[float, ...] | None = None
    reading: Future[Any] | None = None


class Due(NamedTuple):
    """What a step's forward pass makes known once it has run.

    Attributes:
        outcomes: requests whose last prompt token is in the step, or was in none that has run.
        responses: requests of whose first generated tokens one is in the step.
    """

    outcomes: list[Steered]
    responses: list[Steered]
