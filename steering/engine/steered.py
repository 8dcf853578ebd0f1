"""Steered: a request with a plan, as the worker knows it from its first step to its last. Knows nothing of tables.

Shapes: `W` columns of a row.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from steering.engine.bank import BankedGate, BankedResponse
from steering.manifest import MAX_RESPONSE_TOKENS
from steering.plan import Plan

_NO_SCORES = np.full(MAX_RESPONSE_TOKENS, np.nan, dtype=np.float32)
"""A response probe has read nothing yet; shared, so never written."""


@dataclass(slots=True, kw_only=True, eq=False)
class Steered:
    """A request with a plan that is known, running or preempted.

    Attributes:
        gate: the gate that decides; None for a plan that names its edit or only observes.
        response: the probe that reads its answer; None for none.
        scores: what that probe has read, by generated token; NaN where the host knows nothing yet.
        is_left_alone: its gate has decided to edit nothing.
        is_over: nothing is asked of it any more: nothing is edited, and what was to be observed has been.
        row: 0 while it waits after a preemption.
        is_due: its last prompt token has been in a step, whose forward pass decides or applies.
        latched: [W] its row as the gate left it, once the host knows; survives preemption.
        reading: ends when the host knows it.
    """

    request_id: str
    plan: Plan
    prompt_length: int
    gate: BankedGate | None = None
    response: BankedResponse | None = None
    scores: NDArray[np.float32] = field(default_factory=lambda: _NO_SCORES)
    is_left_alone: bool = False
    is_over: bool = False
    row: int = 0
    is_due: bool = False
    latched: NDArray[np.float32] | None = None
    reading: Future[None] | None = None


class Due(NamedTuple):
    """What a step's forward pass makes known once it has run.

    Attributes:
        outcomes: requests whose last prompt token is in the step.
        responses: requests of whose first generated tokens one is in the step.
    """

    outcomes: list[Steered]
    responses: list[Steered]
