"""Stages: how long a request takes over each part of its way to an answer.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import time
from enum import StrEnum


class Stage(StrEnum):
    """A part of the way, by which the gateway's own time can be told from the engine's.

    `CATEGORY` is the pass that asks refusal tokens, `FIRST_TOKEN` the wait for the engine's first in a stream,
    `CONFIRM` that for its word on what it edited.
    """

    AUTH = "auth"
    BODY = "body"
    PARSE = "parse"
    RESOLVE = "resolve"
    CATEGORY = "category"
    FIRST_TOKEN = "first_token"  # noqa: S105 - of text
    CONFIRM = "confirm"


class Stages(dict[Stage, float]):
    """Seconds by stage, of those there were; what is done several times is added up."""

    def timed(self, stage: Stage) -> _Timed:
        """Time what is done within; also where it raises."""
        return _Timed(self, stage)


class _Timed:
    """A context manager; every request enters several, and one made of a generator takes three times as long."""

    __slots__ = ("_began", "_stage", "_stages")

    def __init__(self, stages: Stages, stage: Stage) -> None:
        self._stages, self._stage = stages, stage

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_error: object) -> None:
        self._stages[self._stage] = self._stages.get(self._stage, 0.0) + time.perf_counter() - self._began
