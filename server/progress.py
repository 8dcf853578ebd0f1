"""Progress: what is known of a streamed answer so far, choice by choice.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from typing import Any

from server.effects import Effect
from server.engine import Chunk
from server.verdicts import UNKNOWN, MarkerStripper, Verdict, VerdictTable

CONTENT, REASONING = "content", "reasoning"
SPOKEN = (CONTENT, REASONING)
"""Texts of a choice that clients read."""


class Progress:
    """What is known so far.

    Args:
        table: tells verdicts and markers.
        samples: choices there will be.

    Attributes:
        effects: of choices that have begun.
        texts: pieces of each choice's text as the client gets them.
    """

    def __init__(self, table: VerdictTable, samples: int) -> None:
        self._table = table
        self._strippers: dict[int, dict[str, MarkerStripper]] = {}
        self._verdicts = [UNKNOWN] * samples
        self._finished: set[int] = set()
        self.effects: dict[int, Effect] = {}
        self.texts: list[list[str]] = [[] for _ in range(samples)]

    @property
    def begun(self) -> int:
        """Choices that have begun."""
        return len(self._strippers)

    @property
    def is_finished(self) -> bool:
        """Whether every choice has ended."""
        return len(self._finished) == len(self._verdicts)

    @property
    def verdicts(self) -> list[Verdict]:
        """What the first token of each choice told."""
        return self._verdicts

    @property
    def contents(self) -> tuple[str, ...]:
        """The text of each choice."""
        return tuple("".join(pieces) for pieces in self.texts)

    def begins(self, chunk: Chunk) -> bool:
        """Take note of the chunk; True when it is its choice's first with tokens, or its last without any."""
        choice = chunk.body["choices"][0]
        index = choice["index"]
        if index in self._strippers or not (chunk.tokens or choice.get("finish_reason")):
            return False
        self._verdicts[index] = self._table.verdict(chunk.tokens)
        self._strippers[index] = {name: MarkerStripper(self._table) for name in SPOKEN}
        return True

    def cleaned(self, chunk: Chunk) -> bool:
        """Take markers out of the chunk's text; False when nothing is left to tell the client."""
        choice = chunk.body["choices"][0]
        index, delta = choice["index"], choice["delta"]
        is_last = bool(choice.get("finish_reason"))
        if is_last:
            self._finished.add(index)
        strippers = self._strippers.get(index)
        if strippers is not None:
            for stripper in strippers.values():
                stripper.see(chunk.tokens)
            # Reasoning is over once the answer begins: what was held back of it comes before.
            if REASONING in delta or strippers[REASONING].is_holding:
                _strip(delta, REASONING, strippers[REASONING], is_over=is_last or bool(delta.get(CONTENT)))
            text = _strip(delta, CONTENT, strippers[CONTENT], is_over=is_last)
            if text:
                self.texts[index].append(text)
        return is_last or bool(delta) or choice.get("logprobs") is not None


def _strip(delta: dict[str, Any], name: str, stripper: MarkerStripper, *, is_over: bool) -> str:
    """Take markers out of one text of a chunk, and out of the chunk what is left of none; the text that is."""
    text = stripper.feed(delta.get(name) or "") + (stripper.flush() if is_over else "")
    if text:
        delta[name] = text
    elif not is_over:
        delta.pop(name, None)
    elif delta.get(name):
        delta[name] = ""
    return text
