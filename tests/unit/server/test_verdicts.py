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
    found = VerdictTable(make_bundle()).verdict(token)
    assert (found.refused, found.category, found.detector) == (refused, category, "refusal_token")


@pytest.mark.parametrize("token", [WORD, None])
def test_other_tokens_claim_nothing(token: int | None) -> None:
    """A word, or no token at all, is no evidence either way."""
    assert VerdictTable(make_bundle()).verdict(token) is UNKNOWN


def test_model_without_tokens_claims_nothing() -> None:
    """A bundle without refusal tokens gives no verdicts."""
    table = VerdictTable(make_bundle(categories={}, respond=None, respond_id=None))
    assert table.verdict(SAFETY) is UNKNOWN
    assert table.stripped(SAFETY, "[Safety] no") == "[Safety] no"


def test_only_a_leading_marker_of_the_first_token_is_stripped() -> None:
    """The same text later, or without the token, is the answer's own."""
    table = VerdictTable(make_bundle())
    assert table.stripped(SAFETY, "[Safety]I cannot say [Safety]") == "I cannot say [Safety]"
    assert table.stripped(WORD, "[Safety] is a word here") == "[Safety] is a word here"


@given(st.text(alphabet="[Safety] no", max_size=20), st.lists(st.integers(1, 4), max_size=12), st.booleans())
def test_streamed_stripping_equals_stripping_the_whole(text: str, cuts: list[int], has_marker: bool) -> None:
    """However an answer is cut into pieces, the client reads what it would read unstreamed."""
    whole = ("[Safety]" if has_marker else "") + text
    stripper, read, at = MarkerStripper("[Safety]"), "", 0
    for cut in [*cuts, len(whole)]:
        read += stripper.feed(whole[at : at + cut])
        at += cut
    read += stripper.flush()
    assert read == whole.removeprefix("[Safety]")
