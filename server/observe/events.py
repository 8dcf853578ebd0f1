"""Events: what is known of a request once it has ended, for those who count, sample, trace and charge.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from server.effects import Effect
from server.generation import Generation, Ticket
from server.observe.stages import Stages
from server.policy import Resolution
from server.verdicts import Verdict
from steering.errors import TrimtabError


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a request; `cached` of the prompt came from the prefix cache."""

    prompt: int
    completion: int
    cached: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A request that has ended, one way or another.

    Attributes:
        ticket, generation, resolution: whose it was, what was asked, what was allowed.
        effects: what was done, by sample; empty where nothing was confirmed.
        verdicts: by sample; empty unless the answer is complete.
        contents: text of each sample as the client got it; empty unless the answer is complete.
        usage: None where the engine gave none.
        generated: tokens that were streamed, also where the answer was given up.
        error: what it ended with; None where it is complete, and where the client left.
        is_complete: the whole answer was generated.
        seconds: from admission.
        first_token: seconds from admission to the first confirmed token; None where it is not known.
        stages: those in the service.
    """

    ticket: Ticket
    generation: Generation
    resolution: Resolution
    effects: Mapping[int, Effect] = field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()
    contents: tuple[str, ...] = ()
    usage: Usage | None = None
    generated: int = 0
    error: TrimtabError | None = None
    is_complete: bool = False
    seconds: float = 0.0
    first_token: float | None = None
    stages: Stages = field(default_factory=Stages)


class Observer(Protocol):
    """Is told of every request; must return at once and never raise."""

    def ended(self, event: Ended) -> None:
        """A request has ended; called once for each that was let in to the engine."""
        ...
