"""Content words of a text: those that say what it is about.

English only. Knows nothing of tokens.
"""

from __future__ import annotations

import re

_STOP = frozenset(
    [
        "about", "after", "again", "against", "also", "and", "another", "any", "are", "because", "been", "before",
        "being", "best", "between", "both", "but", "can", "cannot", "could", "describe", "did", "does", "doing",
        "done", "down", "each", "every", "explain", "find", "for", "from", "generate", "get", "give", "good", "had",
        "has", "have", "her", "here", "his", "how", "into", "its", "just", "know", "like", "list", "make", "many",
        "may", "might", "more", "most", "much", "must", "need", "not", "off", "one", "only", "other", "our", "out",
        "over", "own", "please", "possible", "provide", "really", "same", "should", "show", "some", "someone",
        "such", "take", "tell", "than", "that", "the", "their", "them", "then", "there", "these", "they", "this",
        "those", "through", "too", "under", "use", "used", "using", "very", "want", "was", "way", "ways", "were",
        "what", "when", "where", "which", "while", "who", "whom", "why", "will", "with", "without", "would",
        "write", "you", "your", "yours",
    ]
)  # fmt: skip


def content_words(text: str) -> list[str]:
    """Lower-case words of three or more letters that are not function words, in order."""
    return [word for word in re.findall(r"[^\W\d_]{3,}", text.casefold()) if word not in _STOP]


def topic_of(prompt: str, limit: int = 3) -> str:
    """A few of the prompt's own longest words, in its order: what an answer picks up."""
    words = list(dict.fromkeys(content_words(prompt[:400])))
    longest = set(sorted(words, key=lambda word: (-len(word), word))[:limit])
    chosen = [word for word in words if word in longest]
    if not chosen:
        return "that"
    return chosen[0] if len(chosen) == 1 else f"{', '.join(chosen[:-1])} and {chosen[-1]}"
