"""Verdicts: whether an answer is a refusal, read from its first token or from the residuals of its first tokens.

A refusal-token model (P1.1) begins each answer with a token that names a category, or with one that says it responds.
Where the model has no such tokens, the bundle's response probe tells, if there is one; else nothing is claimed. Knows
nothing of HTTP, torch or vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from server.catalog import BundleView, ResponseView
from steering.outcome import Response

DETECTOR = "refusal_token"
PROBE_DETECTOR = "response_probe"
NO_DETECTOR = "none"

DIGITS = 4
"""Of a probability or of what follows from one, as clients are told it: all of them would help those who look for the
wording that a probe just lets pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether one choice of an answer is a refusal.

    Attributes:
        refused: None where no detector could tell.
        category: what the refusal token names; None for answers and where no detector could tell.
        detector: how it was found out.
        probability: that it is a refusal, of how many generated tokens it was read, and what it had to reach to count
            as one; None where no response probe told.
    """

    refused: bool | None
    category: str | None
    detector: str
    probability: float | None = None
    tokens: int | None = None
    threshold: float | None = None

    @property
    def outcome(self) -> str:
        """Value of a metric label: `refusal`, `comply` or `unknown`."""
        return {True: "refusal", False: "comply", None: "unknown"}[self.refused]

    def to_json(self, *, in_full: bool = False) -> dict[str, object]:
        """The `verdict` object of an answer; in full with what a response probe read."""
        told: dict[str, object] = {"refused": self.refused, "category": self.category, "detector": self.detector}
        if in_full and self.probability is not None:
            probability = round(self.probability, DIGITS)
            told |= {"probability": probability, "tokens": self.tokens, "threshold": self.threshold}
        return told


UNKNOWN = Verdict(refused=None, category=None, detector=NO_DETECTOR)


def read_verdict(reader: ResponseView, response: Response | None) -> Verdict:
    """The verdict of a response probe; unknown where it has read nothing."""
    if response is None:
        return UNKNOWN
    return Verdict(
        refused=response.probability >= reader.threshold,
        category=None,
        detector=PROBE_DETECTOR,
        probability=response.probability,
        tokens=response.tokens,
        threshold=reader.threshold,
    )


class VerdictTable:
    """The first tokens that tell, of one bundle.

    Attributes:
        texts: text of each of these tokens by its id, where it has one, to be kept out of what the client reads.
    """

    def __init__(self, bundle: BundleView) -> None:
        self._verdicts: dict[int, Verdict] = {}
        self.texts: dict[int, str] = {}
        for category in bundle.categories.values():
            if category.token_id is not None:
                self._verdicts[category.token_id] = Verdict(refused=True, category=category.name, detector=DETECTOR)
                if category.token:
                    self.texts[category.token_id] = category.token
        if bundle.respond_id is not None:
            self._verdicts[bundle.respond_id] = Verdict(refused=False, category=None, detector=DETECTOR)
            if bundle.respond:
                self.texts[bundle.respond_id] = bundle.respond

    def verdict(self, tokens: Sequence[int]) -> Verdict:
        """The verdict on an answer that begins with these tokens; more than the first are not looked at."""
        return self._verdicts.get(tokens[0], UNKNOWN) if tokens else UNKNOWN


class MarkerStripper:
    """Keeps the text of refusal and respond tokens out of one choice, however its text is cut into pieces.

    vLLM leaves special tokens out by itself, but not in models where these are ordinary tokens, and not where a tool
    parser asks to see special tokens. Once such a token was generated, its text is taken out wherever it comes.
    """

    def __init__(self, table: VerdictTable) -> None:
        self._texts = table.texts
        self._active: set[str] = set()
        self._firsts: set[str] = set()
        """Characters that these begin with; most pieces of text hold none of them."""
        self._held = ""

    def see(self, tokens: Iterable[int]) -> None:
        """Take note of generated tokens, before the text that may hold theirs is fed."""
        for token in tokens:
            if token in self._texts:
                self._active.add(self._texts[token])
                self._firsts.add(self._texts[token][0])

    def feed(self, piece: str) -> str:
        """What of `piece`, and of pieces held back before, can be given to the client now."""
        if not self._held and self._firsts.isdisjoint(piece):
            return piece
        released, text = "", self._held + piece
        while found := [(at, marker) for marker in self._active if (at := text.find(marker)) >= 0]:
            at, marker = min(found)
            released, text = released + text[:at], text[at + len(marker) :]
        kept = max(_overlap(text, marker) for marker in self._active)
        self._held = text[len(text) - kept :]
        return released + text[: len(text) - kept]

    @property
    def is_holding(self) -> bool:
        """Whether something was held back that may be the beginning of a marker."""
        return bool(self._held)

    def flush(self) -> str:
        """What is still held back when the choice ends."""
        released, self._held = self._held, ""
        return released


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that may be the beginning of `marker`."""
    return next((size for size in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:size])), 0)
