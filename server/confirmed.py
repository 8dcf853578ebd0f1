"""Confirmed answers: whole, or as a stream whose first piece is confirmed.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from server.effects import Effect
from server.verdicts import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer: a `chat.completion` object with its `steering`, what was done to its first sample, and what each
    of its choices turned out to be.
    """

    body: dict[str, Any]
    effect: Effect
    verdicts: Sequence[Verdict] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenStream:
    """A streamed answer whose first piece is confirmed.

    Attributes:
        effect: what was done to the first sample.
        first: the first `chat.completion.chunk`.
        rest: those after it; to be closed by whoever reads it.
    """

    effect: Effect
    first: dict[str, Any]
    rest: AsyncGenerator[dict[str, Any], None]
