"""A streamed answer as it comes: what clients read of it holds no marker, whichever of its texts that is in."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine import Chunk
from server.progress import Progress
from server.verdicts import VerdictTable
from tests.fakes import SAFETY, WORD, make_bundle

MARKER = "[Safety]"


def read(deltas: list[dict[str, Any]], *, tokens: tuple[int, ...] = (SAFETY,)) -> dict[str, str]:
    """What a client reads of these deltas, the last of which ends the answer; the first brings the tokens."""
    progress, texts = Progress(VerdictTable(make_bundle()), 1), {"reasoning": "", "content": ""}
    for number, delta in enumerate(deltas):
        ends = "stop" if number == len(deltas) - 1 else None
        choice = {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": ends}
        chunk = Chunk(body={"choices": [choice]}, tokens=tokens if number == 0 else (WORD,))
        progress.begins(chunk)
        progress.cleaned(chunk)
        for name in texts:
            texts[name] += choice["delta"].get(name) or ""  # type: ignore[attr-defined]
    assert progress.contents == (texts["content"],)
    return texts


@pytest.mark.parametrize("name", ["reasoning", "content"])
@given(cuts=st.lists(st.integers(1, 6), max_size=12), parts=st.lists(st.sampled_from([MARKER, "[", "a ", "y]"])))
def test_a_marker_shows_in_neither_text(name: str, cuts: list[int], parts: list[str]) -> None:
    """However it is cut into pieces; all the rest is read, as it is where it comes in one."""
    whole, deltas, at = "".join(parts), [], 0
    for cut in cuts:
        deltas.append({name: whole[at : at + cut]})
        at += cut
    found = read([*deltas, {name: whole[at:]}, {}])
    assert MARKER not in found[name]
    assert found == read([{name: whole}, {}])
    assert len(found[name]) == len(whole) - len(MARKER) * whole.count(MARKER)


def test_what_is_held_back_of_reasoning_comes_before_the_answer() -> None:
    """A bracket that may begin a marker is told once the answer begins, and stays in the reasoning."""
    found = read([{"reasoning": "I think [Saf"}, {"content": "No"}, {"content": "."}])
    assert found == {"reasoning": "I think [Saf", "content": "No."}


def test_both_texts_lose_their_own_markers() -> None:
    """The token was generated once; its text may come in both."""
    found = read([{"reasoning": "[Saf"}, {"reasoning": "ety]so"}, {"content": "[Safe"}, {"content": "ty]no"}])
    assert found == {"reasoning": "so", "content": "no"}
    kept = read([{"reasoning": "[Safety]"}, {"content": "[Safety]"}], tokens=(WORD,))
    assert kept == {"reasoning": "[Safety]", "content": "[Safety]"}
