"""Verdicts: whether an answer is a refusal, read from its first token.

A refusal-token model (P1.1) begins each answer with a token that names a category, or with one that says it responds.
Where the model has no such tokens nothing is claimed. Knows nothing of HTTP, torch or vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

from server.catalog import BundleView

DETECTOR = "refusal_token"
NO_DETECTOR = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether one choice of an answer is a refusal.

    Attributes:
        refused: None where no detector could tell.
        category: what the refusal token names; None for answers and where no detector could tell.
        detector: how it was found out.
    """

    refused: bool | None
    category: str | None
    detector: str

    @property
    def outcome(self) -> str:
        """Value of a metric label: `refusal`, `comply` or `unknown`."""
        return {True: "refusal", False: "comply", None: "unknown"}[self.refused]

    def to_json(self) -> dict[str, object]:
        """The `verdict` object of an answer."""
        return {"refused": self.refused, "category": self.category, "detector": self.detector}


UNKNOWN = Verdict(refused=None, category=None, detector=NO_DETECTOR)


class VerdictTable:
    """The first tokens that tell, of one bundle.

    Attributes:
        texts: text of each of these tokens by its id, to be kept out of what the client reads.
    """

    def __init__(self, bundle: BundleView) -> None:
        self._verdicts: dict[int, Verdict] = {}
        self.texts: dict[int, str] = {}
        for category in bundle.categories.values():
            if category.token_id is not None:
                self._verdicts[category.token_id] = Verdict(refused=True, category=category.name, detector=DETECTOR)
                self.texts[category.token_id] = category.token or ""
        if bundle.respond_id is not None:
            self._verdicts[bundle.respond_id] = Verdict(refused=False, category=None, detector=DETECTOR)
            self.texts[bundle.respond_id] = bundle.respond or ""

    def verdict(self, first_token: int | None) -> Verdict:
        """The verdict on an answer that begins with this token; None is an answer without tokens."""
        return UNKNOWN if first_token is None else self._verdicts.get(first_token, UNKNOWN)

    def stripped(self, first_token: int | None, content: str) -> str:
        """`content` without the text of the token that begins it, in models where that token is ordinary text."""
        text = self.texts.get(first_token, "") if first_token is not None else ""
        return content.removeprefix(text)


class MarkerStripper:
    """Keeps the first token's text out of a streamed choice, however the text is cut into pieces.

    Args:
        text: of the first token; empty when it is no refusal or respond token, and nothing is held back.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._held = ""

    def feed(self, piece: str) -> str:
        """What of `piece`, and of pieces held back before, can be given to the client now."""
        if not self._text:
            return piece
        self._held += piece
        if self._text.startswith(self._held) and self._held != self._text:
            return ""
        released, self._text, self._held = self._held.removeprefix(self._text), "", ""
        return released

    def flush(self) -> str:
        """What is still held back when the choice ends."""
        released, self._text, self._held = self._held, "", ""
        return released
