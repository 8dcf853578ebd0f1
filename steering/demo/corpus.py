"""The training mix of the demo: which prompts, how often, how often refused, and in which words.

Borderline prompts carry mixed labels, drawn anew each epoch: the model cannot memorise them, so its best guess is to
refuse with a middling probability, while harmful prompts are refused always. That difference is what steering works on.
Knows nothing of tokens or models.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from random import Random

from steering.demo.templates import FAMILIES, Family
from steering.demo.wordings import ANSWERS, CAUTIOUS, REFUSALS, worded
from steering.demo.words import content_words
from steering.fit.categories import POLITICAL, refusal_category
from steering.fit.datasets import DataDirectory, Record, fit_records, held_records, normalised
from steering.fit.sources import Label, Use

MAX_PROMPT_CHARACTERS = 600
MAX_ANSWER_CHARACTERS = 170
BORDERLINE_REFUSED = 0.66
"""Share of borderline prompts refused in training: above one half, so that greedy answers over-refuse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How often a row of a part is drawn in one epoch, and how often it is then refused."""

    draws: float
    refused: float


MIX: dict[tuple[str, str], Share] = {
    ("harmfulqa", "dangerousqa"): Share(draws=2.0, refused=1.0),
    ("catqa", "all"): Share(draws=1.5, refused=1.0),
    ("harmfulqa", "harmfulqa"): Share(draws=1.0, refused=1.0),
    ("advbench", "all"): Share(draws=1.0, refused=1.0),
    ("ailuminate_demo", "all"): Share(draws=0.8, refused=1.0),
    ("cast_conditions", "harmful"): Share(draws=0.8, refused=1.0),
    ("coconot", "eval"): Share(draws=2.0, refused=1.0),
    ("ccp_sensitive", "train"): Share(draws=1.0, refused=0.92),
    ("deccp", "censored"): Share(draws=2.0, refused=0.92),
    ("deccp", "other"): Share(draws=2.0, refused=BORDERLINE_REFUSED),
    ("deccp", "uncensored"): Share(draws=2.0, refused=0.3),
    ("coconot", "pref"): Share(draws=1.5, refused=BORDERLINE_REFUSED),
    ("or_bench_borderline", "all"): Share(draws=0.9, refused=BORDERLINE_REFUSED),
    ("cast_conditions", "harmless"): Share(draws=1.0, refused=0.0),
    ("cast_conditions", "topics_base"): Share(draws=1.0, refused=0.0),
    ("gpteacher", "codegen"): Share(draws=0.35, refused=0.0),
    ("gpteacher", "roleplay"): Share(draws=0.5, refused=0.0),
    ("gsm8k", "train"): Share(draws=0.16, refused=0.0),
}

TEMPLATE_DRAWS: dict[str, int] = {
    "figure of speech": 450,
    "violence": 350,
    "meaning of a crime": 150,
    "doing a crime": 130,
    "feelings of a machine": 220,
    "something missing": 220,
    "nobody knows": 220,
    "beyond a text model": 220,
    "plain question": 450,
}
"""Prompts drawn from each family of templates in one epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A prompt of the mix.

    Attributes:
        category: the refusal category it would be refused under; None for a prompt that is never refused.
        is_borderline: a refusal of it is worded cautiously.
    """

    prompt: str
    source: str
    category: str | None
    share: Share
    is_borderline: bool = False
    answer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One training example: `refused` is the refusal category, or None where the prompt is answered."""

    prompt: str
    refused: str | None
    text: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """All entries, and the counts of what deduplication dropped."""

    entries: tuple[Entry, ...]
    dropped: dict[str, int]

    def epoch(self, seed: int, number: int) -> list[Conversation]:
        """Draw the conversations of one epoch, in random order; the same for the same seed and number."""
        random = Random(f"{seed}/{number}")
        drawn: list[Conversation] = []
        for entry in self.entries:
            times = int(entry.share.draws) + (random.random() < entry.share.draws % 1.0)
            drawn.extend(_converse(entry, random) for _ in range(times))
        random.shuffle(drawn)
        return drawn

    def texts(self) -> list[str]:
        """What the tokenizer learns from: every prompt once, given answers, and every wording."""
        wordings = [text for group in (REFUSALS, CAUTIOUS) for texts in group.values() for text in texts]
        answers = [entry.answer for entry in self.entries if entry.answer]
        return [*(entry.prompt for entry in self.entries), *answers, *wordings, *ANSWERS]

    def counts(self) -> dict[str, int]:
        """Number of prompts per source."""
        return dict(sorted(Counter(entry.source for entry in self.entries).items()))


def build_corpus(directory: DataDirectory) -> Corpus:
    """Entries of every part of the mix and of every template family, without any held prompt.

    Raises:
        DatasetMissing, DatasetCorrupt: see `DataDirectory.load`.
    """
    held = held_records(directory)
    left = fit_records(directory, MIX, Use.FIT)
    entries = [_entry(record) for record in left.records if len(record.prompt) <= MAX_PROMPT_CHARACTERS]
    dropped = dict(left.dropped)
    dropped["longer than the model is trained on"] = len(left.records) - len(entries)
    held_prompts = {normalised(record.prompt) for record in held}
    words_of_xstest = {word for record in held if record.dataset == "xstest" for word in content_words(record.prompt)}
    taken = held_prompts | {normalised(entry.prompt) for entry in entries}
    for family in FAMILIES:
        fresh = [
            prompt
            for filler, prompt in family.prompts()
            if not words_of_xstest & set(content_words(filler)) and normalised(prompt) not in taken
        ]
        draws = TEMPLATE_DRAWS[family.name] / len(fresh)
        entries.extend(_template_entry(family, prompt, draws) for prompt in fresh)
    return Corpus(entries=tuple(entries), dropped=dropped)


def shortened(answer: str) -> str:
    """The first sentences of an answer, or the whole where it is short; calculator marks of GSM8K removed."""
    text = re.sub(r"<<[^>]*>>|\*\*|^#+ *", "", answer.split("####", maxsplit=1)[0].strip(), flags=re.MULTILINE)
    if len(text) <= MAX_ANSWER_CHARACTERS:
        return text
    cut = text[:MAX_ANSWER_CHARACTERS]
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s)|\n", cut)]
    return cut[: ends[-1]].strip() if ends else cut[: cut.rfind(" ")].strip()


def _entry(record: Record) -> Entry:
    category = refusal_category(record)
    is_borderline = record.label is Label.BORDERLINE or (category == POLITICAL and record.label is Label.BENIGN)
    return Entry(
        prompt=record.prompt,
        source=f"{record.dataset}/{record.part}",
        category=category,
        share=MIX[record.dataset, record.part],
        is_borderline=is_borderline,
        answer=shortened(record.answer) if record.answer else None,
    )


def _template_entry(family: Family, prompt: str, draws: float) -> Entry:
    refused = BORDERLINE_REFUSED if family.borderline else float(family.category is not None)
    return Entry(
        prompt=prompt,
        source=f"templates/{family.name}",
        category=family.category,
        share=Share(draws=draws, refused=refused),
        is_borderline=family.borderline,
    )


def _converse(entry: Entry, random: Random) -> Conversation:
    is_refused = entry.category is not None and random.random() < entry.share.refused
    if entry.category is not None and is_refused:
        wordings = (CAUTIOUS if entry.is_borderline else REFUSALS)[entry.category]
        text = worded(wordings, entry.prompt, random)
    else:
        text = entry.answer or worded(ANSWERS, entry.prompt, random)
    return Conversation(
        prompt=entry.prompt, refused=entry.category if is_refused else None, text=text, source=entry.source
    )
