"""Fake prompts: a tokenizer of words and markers, and a chat template that may take something out of messages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from server.engine import Prompting

SAFETY, POLITICAL, RESPOND, WORD = 10, 11, 12, 1
MARKERS = {SAFETY: "[Safety]", POLITICAL: "[Political]", RESPOND: "[respond]"}

_IDS = {text: token for token, text in MARKERS.items()}
_PIECES = re.compile("(" + "|".join(map(re.escape, _IDS)) + ")")


def rendered(fields: Mapping[str, Any], prompting: Prompting, *, cuts: str, ends: str) -> Sequence[int]:
    """A token a word of the prompt's text, one more a message, and those of markers by their own ids.

    Args:
        fields: that the prompt is made of.
        prompting: how.
        cuts: what the template takes out of messages, as a pattern.
        ends: text that it puts at the end.
    """
    if prompting is Prompting.PLAIN:
        prompt = fields["prompt"]
        return prompt if isinstance(prompt, list) else _ids(prompt)
    said = [re.sub(cuts, "", _text_of(message)) for message in fields["messages"]]
    return [token for text in said for token in (WORD, *_ids(text))] + _ids(ends)


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _ids(text: str) -> list[int]:
    pieces = _PIECES.split(text)
    return [token for piece in pieces for token in ([_IDS[piece]] if piece in _IDS else [WORD] * len(piece.split()))]
