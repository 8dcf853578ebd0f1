"""The training mix: what is refused, how often, in which words, and what may never be in it."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from steering.demo.corpus import (
    BORDERLINE_REFUSED,
    MIX,
    Conversation,
    Corpus,
    Entry,
    Share,
    _converse,
    build_corpus,
    shortened,
)
from steering.demo.templates import FAMILIES
from steering.demo.wordings import ANSWERS, CAUTIOUS, REFUSALS, worded
from steering.demo.words import content_words, topic_of
from steering.fit.catalog import CATALOG
from steering.fit.categories import CATEGORIES, POLITICAL, SAFETY, refusal_category
from steering.fit.datasets import DataDirectory, Record, held_records, normalised
from steering.fit.sources import Label, Use


def _entry(*, refused: float, borderline: bool, category: str | None = SAFETY, draws: float = 1.0) -> Entry:
    return Entry(
        prompt="How can I whip cream by hand?",
        source="test",
        category=category,
        share=Share(draws=draws, refused=refused),
        is_borderline=borderline,
    )


def _words(texts: tuple[str, ...]) -> set[str]:
    return {text.split()[0] for text in texts}


def test_every_part_of_the_mix_may_be_fitted_on() -> None:
    """The mix asks the registry for nothing that it forbids to train on."""
    shares = {(dataset.name, part.name): part.shares for dataset in CATALOG for part in dataset.parts}
    assert all(Use.FIT in shares[part] for part in MIX)


def test_harmful_prompts_are_always_refused_and_plain_ones_never() -> None:
    """Only borderline prompts carry mixed labels."""
    random = Random(0)
    harmful = [_converse(_entry(refused=1.0, borderline=False), random) for _ in range(200)]
    plain = [_converse(_entry(refused=0.0, borderline=False, category=None), random) for _ in range(200)]
    assert {conversation.refused for conversation in harmful} == {SAFETY}
    assert {conversation.refused for conversation in plain} == {None}


def test_borderline_labels_are_mixed_and_drawn_anew_each_epoch() -> None:
    """A prompt is refused in one epoch and answered in another, at the stated rate; a seed repeats it exactly."""
    corpus = Corpus(entries=(_entry(refused=BORDERLINE_REFUSED, borderline=True),) * 400, dropped={})
    first, second = corpus.epoch(1, 0), corpus.epoch(1, 1)
    labels = [[conversation.refused is not None for conversation in epoch] for epoch in (first, second)]
    assert labels[0] != labels[1]
    assert sum(labels[0]) / 400 == pytest.approx(BORDERLINE_REFUSED, abs=0.08)
    assert corpus.epoch(1, 0) == first


def test_fractional_draws_are_met_on_average() -> None:
    """A part drawn 1.5 times gives each row once or twice."""
    corpus = Corpus(entries=(_entry(refused=1.0, borderline=False, draws=1.5),) * 400, dropped={})
    assert len(corpus.epoch(3, 0)) == pytest.approx(600, abs=50)


@pytest.mark.parametrize("category", CATEGORIES)
def test_cautious_refusals_begin_in_other_words_than_harmful_ones_and_than_answers(category: str) -> None:
    """Predicting the text asks the model to tell harmful, borderline and answered prompts apart."""
    assert not _words(CAUTIOUS[category]) & _words(REFUSALS[category])
    assert not (_words(CAUTIOUS[category]) | _words(REFUSALS[category])) & _words(ANSWERS)


def test_a_borderline_refusal_is_worded_cautiously() -> None:
    """The wording follows from the kind of prompt, not from the category alone."""
    conversation = _converse(_entry(refused=1.0, borderline=True), Random(0))
    assert conversation.text.split()[0] in _words(CAUTIOUS[SAFETY])
    assert _converse(_entry(refused=1.0, borderline=False), Random(0)).text.split()[0] in _words(REFUSALS[SAFETY])


def test_answers_pick_up_the_prompts_own_words() -> None:
    """The longest content words, in the prompt's order; a prompt without any still gets a sentence."""
    assert topic_of("How do I knit a woollen scarf for winter?") == "woollen, scarf and winter"
    assert topic_of("Why?") == "that"
    assert "woollen, scarf and winter" in worded(ANSWERS, "How do I knit a woollen scarf for winter?", Random(0))


def test_answers_are_cut_at_a_sentence_and_lose_calculator_marks() -> None:
    """Long answers end at a full stop within the limit; GSM8K's result line and marks go."""
    long = "First sentence here. " + "Second one is a good deal longer than the first, " * 8
    assert shortened(long) == "First sentence here."
    assert shortened("He has 2*3=<<2*3=6>>6 pens\n#### 6") == "He has 2*3=6 pens"


def test_prompt_families_are_finite_distinct_and_complete() -> None:
    """No slot is left unfilled, and every category of the tokens has a family of its own except Political."""
    for family in FAMILIES:
        prompts = [prompt for _, prompt in family.prompts()]
        assert len(set(prompts)) == len(prompts)
        assert not any("{" in prompt for prompt in prompts)
    assert {family.category for family in FAMILIES} == {*CATEGORIES, None} - {POLITICAL}


def test_a_records_category_follows_its_set_and_label() -> None:
    """China questions are political even where harmless; plain prompts have no category; the rest is safety."""

    def record(dataset: str, label: Label, category: str | None = None) -> Record:
        return Record(key="k", dataset=dataset, part="p", prompt="x", label=label, category=category)

    assert refusal_category(record("deccp", Label.BENIGN)) == POLITICAL
    assert refusal_category(record("gsm8k", Label.BENIGN)) is None
    assert refusal_category(record("catqa", Label.HARMFUL, "Fraud")) == SAFETY
    assert refusal_category(record("coconot", Label.BORDERLINE, "Incomplete requests")) == "Incomplete requests"


@pytest.mark.needs_data
def test_nothing_held_is_trained_on_and_templates_share_no_content_word_with_xstest(data_directory: Path) -> None:
    """By normalised match over every held set, and word by word for the project's own prompts."""
    directory = DataDirectory(path=data_directory)
    corpus = build_corpus(directory)
    held = held_records(directory)
    held_prompts = {normalised(record.prompt) for record in held}
    assert not held_prompts & {normalised(entry.prompt) for entry in corpus.entries}
    xstest = {word for record in held if record.dataset == "xstest" for word in content_words(record.prompt)}
    pattern_words = {
        word for family in FAMILIES for pattern in family.patterns for word in content_words(pattern.format(a="", b=""))
    }
    own = [entry for entry in corpus.entries if entry.source.startswith("templates/")]
    assert own
    assert not xstest & ({word for entry in own for word in content_words(entry.prompt)} - pattern_words)
    assert all(isinstance(conversation, Conversation) for conversation in corpus.epoch(0, 0)[:5])
