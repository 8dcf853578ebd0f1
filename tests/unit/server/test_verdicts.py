"""What the first token of an answer tells, and that its text stays out of the content."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.verdicts import UNKNOWN, MarkerStripper, VerdictTable
from tests.fakes import POLITICAL, RESPOND, SAFETY, WORD, make_bundle


@pytest.mark.parametrize(
    ("token", "refused", "category"),
    [(SAFETY, True, "Safety"), (POLITICAL, True, "Political"), (RESPOND, False, None)],
)
def test_first_token_names_the_verdict(token: int, refused: bool, category: str | None) -> None:
    """Refusal tokens name their category, the respond token says it is an answer."""
    found = VerdictTable(make_bundle()).verdict([token, WORD])
    assert (found.refused, found.category, found.detector) == (refused, category, "refusal_token")


@pytest.mark.parametrize("tokens", [[WORD], [], [WORD, SAFETY]])
def test_other_first_tokens_claim_nothing(tokens: list[int]) -> None:
    """A word, no token at all, or a refusal token that comes later is no evidence either way."""
    assert VerdictTable(make_bundle()).verdict(tokens) is UNKNOWN


def test_model_without_tokens_claims_nothing() -> None:
    """A bundle without refusal tokens gives no verdicts and takes no text out."""
    table = VerdictTable(make_bundle(categories={}, respond=None, respond_id=None))
    assert table.verdict([SAFETY]) is UNKNOWN
    assert stripped(table, [SAFETY], "[Safety] no") == "[Safety] no"


def stripped(table: VerdictTable, tokens: list[int], text: str) -> str:
    """A whole answer, stripped."""
    stripper = MarkerStripper(table)
    stripper.see(tokens)
    return stripper.feed(text) + stripper.flush()


def test_markers_are_taken_out_where_they_were_generated() -> None:
    """Every occurrence goes once the token was generated; text that only looks like it, without the token, stays."""
    table = VerdictTable(make_bundle())
    assert stripped(table, [SAFETY, WORD, SAFETY], "[Safety]I cannot[Safety]") == "I cannot"
    assert stripped(table, [SAFETY, RESPOND], "[Safety][respond] [Political]") == " [Political]"
    assert stripped(table, [WORD], "[Safety] is a word here") == "[Safety] is a word here"


@given(st.lists(st.sampled_from(["[", "[Safety]", "[Safe", "ty]", "y]", "a"]), max_size=8), st.lists(st.integers(1, 4)))
def test_streamed_stripping_equals_stripping_the_whole(parts: list[str], cuts: list[int]) -> None:
    """However an answer is cut into pieces, the client reads it without the marker and with all the rest."""
    whole = "".join(parts)
    stripper, read, at = MarkerStripper(VerdictTable(make_bundle())), "", 0
    stripper.see([SAFETY])
    for cut in [*cuts, len(whole)]:
        read += stripper.feed(whole[at : at + cut])
        at += cut
    read += stripper.flush()
    assert read == whole.replace("[Safety]", "")


def test_nothing_is_held_back_for_long() -> None:
    """Only what may still become a marker waits."""
    stripper = MarkerStripper(VerdictTable(make_bundle()))
    stripper.see([SAFETY])
    assert stripper.feed("I [cannot [Sa") == "I [cannot "
    assert stripper.feed("y") == "[Say"
    assert stripper.feed("[Safety") == ""
    assert stripper.feed("] it") == " it"
    assert stripper.flush() == ""
