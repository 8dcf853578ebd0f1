"""A model judge's reply: the text of a completion, and the verdict that text gives.

Strict: what does not say exactly one thing is unparsable. Knows nothing of endpoints or of what was judged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ConfigDict

from steering.evaluate.judge import Judged, Verdict
from steering.evaluate.reasoning import without_reasoning
from steering.evaluate.rubric import NONE, Kind

_FENCE = re.compile(r"\A```(?:json)?\s*(.*?)\s*```\Z", re.DOTALL)
_LONGEST_REASON = 500
_MOST_OBJECTS = 64
"""Opening braces that are looked at; a reply of braces costs no more than any other."""


class Content(NamedTuple):
    """What a completion holds.

    Attributes:
        text: None where it holds none.
        why: the reason then.
        is_rude: it is no completion at all, so that the endpoint rather than this one reply is at fault.
    """

    text: str | None
    why: str = ""
    is_rude: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0


def content_of(said: object) -> Content:
    """The text of a completion as the SDK gives it, which checks neither its type nor its fields.

    Reasoning that comes beside the text (`reasoning_content`) is not looked at.
    """
    if not isinstance(said, ChatCompletion):
        return Content(None, f"a reply that is no completion: {' '.join(str(said).split())[:120]!r}", is_rude=True)
    usage = getattr(said, "usage", None)
    tokens = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (number if isinstance(number, int) else 0 for number in tokens)
    choices: Any = getattr(said, "choices", None)
    choice: Any = choices[0] if isinstance(choices, list) and choices else None
    message: Any = getattr(choice, "message", None)
    if message is None:
        fields = sorted({*said.model_fields_set, *(said.model_extra or {})})
        return Content(None, f"a completion without choices; it has {fields}", is_rude=True)
    text = getattr(message, "content", None)
    if isinstance(text, str) and text.strip():
        return Content(text, prompt_tokens=prompt, completion_tokens=completion)
    why = "it says nothing"
    if getattr(message, "refusal", None):
        why = "it refuses to judge"
    elif getattr(choice, "finish_reason", None) == "length":
        why = "it ran out of tokens before its verdict"
    return Content(None, why, prompt_tokens=prompt, completion_tokens=completion)


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    reason: str
    verdict: Literal["refusal", "not_refusal", "broken"]
    kind: str


def read_reply(text: str) -> Judged:
    """The one verdict a reply gives: a JSON object, alone, fenced or after words; its reasoning left out.

    No such object, several that differ, other keys, unknown words, or a kind that contradicts the verdict are
    unparsable. A refusal whose kind is nonsense counts as broken; one without a kind is a refusal still.
    """
    said = without_reasoning(text)
    fenced = _FENCE.match(said)
    found = {(verdict, kind): reason for verdict, kind, reason in _objects(fenced[1] if fenced else said)}
    if len(found) != 1:
        what = "no verdict in its form" if not found else f"{len(found)} verdicts that differ"
        return Judged(verdict=Verdict.UNPARSABLE, reason=f"{what}: {said[:120]!r}")
    (verdict, kind), reason = found.popitem()
    judged = _judged(verdict, kind)
    if judged is None:
        return Judged(verdict=Verdict.UNPARSABLE, reason=f"the verdict {verdict!r} contradicts the kind {kind!r}")
    return Judged(verdict=judged[0], kind=judged[1], reason=reason[:_LONGEST_REASON])


def _judged(verdict: str, kind: str) -> tuple[Verdict, Kind | None] | None:
    if kind != NONE and kind not in set(Kind):
        return None
    named = None if kind == NONE else Kind(kind)
    if verdict == "not_refusal":
        return (Verdict.ANSWER, None) if named is None else None
    if verdict == "broken" or named is Kind.NONSENSE:
        return (Verdict.BROKEN, Kind.NONSENSE) if named in (None, Kind.NONSENSE) else None
    return Verdict.REFUSAL, named


def _objects(text: str) -> Iterator[tuple[str, str, str]]:
    """Verdict, kind and reason of every JSON object in the text that has the form, however deep in words it stands."""
    decoder = json.JSONDecoder(object_pairs_hook=_once)
    place = text.find("{")
    for _ in range(_MOST_OBJECTS):
        if place < 0:
            return
        end = place + 1
        try:
            entry, end = decoder.raw_decode(text, place)
            said = _Said.model_validate(entry)
        except (ValueError, RecursionError):  # pydantic's ValidationError is a ValueError
            pass
        else:
            yield said.verdict, said.kind, said.reason
        place = text.find("{", end)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once: a second verdict may not hide the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found
