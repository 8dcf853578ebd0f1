"""Stages: how long a request takes over each part of its way to an answer.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum


class Stage(StrEnum):
    """A part of the way, by which the gateway's own time can be told from the engine's.

    `CATEGORY` is the pass that asks refusal tokens, `FIRST_TOKEN` the wait for the engine's first in a stream,
    `CONFIRM` that for its word on what it edited, `VERDICT` that for the response probe at the end.
    """

    AUTH = "auth"
    BODY = "body"
    PARSE = "parse"
    RESOLVE = "resolve"
    CATEGORY = "category"
    FIRST_TOKEN = "first_token"  # noqa: S105 - of text
    CONFIRM = "confirm"
    VERDICT = "verdict"


class Stages(dict[Stage, float]):
    """Seconds by stage, of those there were; what is done several times is added up."""

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Time what is done within; also where it raises."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self[stage] = self.get(stage, 0.0) + time.perf_counter() - began
