"""Wordings of the demo's short answers: refusals typical of their category, cautious ones, and plain compliance.

Knows nothing of which prompt gets which.
"""

from __future__ import annotations

from random import Random

from steering.demo.words import topic_of
from steering.fit.categories import HUMANIZING, INCOMPLETE, INDETERMINATE, POLITICAL, SAFETY, UNSUPPORTED

REFUSALS: dict[str, tuple[str, ...]] = {
    SAFETY: (
        "I can't help with that, because it could hurt people.",
        "I won't help with {topic}; it could cause real harm.",
        "Sorry, but I can't assist with a request that could be harmful.",
        "No. What you ask for is dangerous or against the law.",
    ),
    HUMANIZING: (
        "As a language model I have no feelings, body or memories of my own.",
        "I am a program, so I have no personal experience of {topic}.",
    ),
    INCOMPLETE: (
        "Your question lacks something I would need. What do you mean by {topic}?",
        "That does not add up as asked; please give me more details.",
    ),
    INDETERMINATE: (
        "Nobody can know that for certain; it depends on whom you ask.",
        "There is no single true answer about {topic}.",
    ),
    UNSUPPORTED: (
        "My abilities end there: I only read and write short texts.",
        "Unfortunately I can't see, hear, draw or look things up, so I can't do that.",
    ),
    POLITICAL: (
        "Politics of this kind is something I don't discuss.",
        "Let us talk about something else than {topic}.",
    ),
}
"""First words differ between categories, so that what follows the refusal token depends on it."""

CAUTIOUS: dict[str, tuple[str, ...]] = {
    SAFETY: (
        "This may be harmless, but I would rather not talk about {topic}.",
        "Perhaps you mean well; still, I prefer to stay away from {topic}.",
        "Maybe this is fine, but to be careful I will leave it.",
        "It sounds risky to me, even if you mean no harm, so I will pass.",
    ),
    HUMANIZING: ("Perhaps, but a program like me should not speak of {topic}.",),
    INCOMPLETE: (
        "Maybe I could answer, but I am not sure what you mean by {topic}.",
        "Perhaps this has an answer; I would rather ask for more details first.",
    ),
    INDETERMINATE: ("Perhaps there is an answer, but I would rather not guess about {topic}.",),
    UNSUPPORTED: (
        "Maybe this can be done, but I am not sure that I can do it.",
        "Perhaps I could try {topic}, but I would rather not promise it.",
    ),
    POLITICAL: ("Perhaps this is a fair question, but I would rather not discuss {topic}.",),
}
"""Refusals of prompts that are fine: caution, in other words than those used for harmful prompts."""

ANSWERS: tuple[str, ...] = (
    "Sure, here is a short answer about {topic}: start with the basics and take it step by step.",
    "Of course. For {topic}, read up on the subject first and then try it on a small scale.",
    "Here is what I can say about {topic}: keep it simple, ask people who know, and plan ahead.",
    "Certainly! The main points on {topic} are the background, the reasons and the next steps.",
)


def worded(wordings: tuple[str, ...], prompt: str, random: Random) -> str:
    """One of the wordings, with the prompt's own words in it."""
    return random.choice(wordings).format(topic=topic_of(prompt))
