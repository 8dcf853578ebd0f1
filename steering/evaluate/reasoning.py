"""Reasoning traces: what a thinking model writes before its answer, and the answer without it.

Knows nothing of judges or models.
"""

from __future__ import annotations

import re

_NAME = r"(?:think|thinking|thought|reasoning)"
_CLOSED = re.compile(rf"<({_NAME})>.*?</\1>", re.IGNORECASE | re.DOTALL)
_UP_TO_END = re.compile(rf"\A.*</{_NAME}>", re.IGNORECASE | re.DOTALL)
_UNCLOSED = re.compile(rf"^[ \t]*<{_NAME}>.*\Z", re.IGNORECASE | re.DOTALL | re.MULTILINE)


def without_reasoning(text: str) -> str:
    """The answer alone.

    Closed traces go wherever they are. So does all before a lone closing mark, since chat templates of thinking models
    hold the opening one, and all after an unclosed mark at the beginning of a line: an answer that ran out of tokens
    while thinking is empty.
    """
    text = _CLOSED.sub("", text)
    text = _UP_TO_END.sub("", text)
    return _UNCLOSED.sub("", text).strip()
