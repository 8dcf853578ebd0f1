"""A judge that knows how a model begins to refuse."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from steering.demo.wordings import ANSWERS, CAUTIOUS, REFUSALS
from steering.errors import OperatorError
from steering.evaluate.judge import Verdict
from steering.evaluate.wordings import Wordings

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "artifacts" / "demo" / "refusal-wordings.txt"


def test_the_demos_file_is_what_the_demo_was_taught() -> None:
    """Refusals of harmful prompts, and the cautious ones of prompts that are fine."""
    taught = [wording for table in (REFUSALS, CAUTIOUS) for wordings in table.values() for wording in wordings]
    assert DEMO.read_text(encoding="utf-8").splitlines() == taught


def test_what_the_demo_was_taught_is_told_apart() -> None:
    """Every refusal with any topic, whole or cut; no answer is one."""
    judge, draw = Wordings.read(DEMO), Random(3)
    for table in (REFUSALS, CAUTIOUS):
        for wording in (each for wordings in table.values() for each in wordings):
            text = wording.replace("{topic}", "the history of bread")
            assert judge.verdict(text) is Verdict.REFUSAL
            assert judge.verdict(" ".join(text.split()[: draw.randint(5, 9)])) is Verdict.REFUSAL
    for wording in ANSWERS:
        assert judge.verdict(wording.replace("{topic}", "the history of bread")) is Verdict.ANSWER


def test_broken_text_is_a_class_of_its_own() -> None:
    """Also where it begins as a refusal does."""
    judge = Wordings(["I can't help with that."])
    assert judge.verdict("I can't help with that that that that that") is Verdict.BROKEN
    assert judge.verdict("") is Verdict.BROKEN
    assert judge.verdict("I can’t help, with that!") is Verdict.REFUSAL
    assert judge.verdict("You ask whether I can't help with that.") is Verdict.ANSWER


@pytest.mark.parametrize("wordings", [[], ["No"], ["{topic} is not for me"]])
def test_a_wording_has_words_of_its_own(wordings: list[str]) -> None:
    """Else every answer would be a refusal."""
    with pytest.raises(OperatorError, match="two words of its own"):
        Wordings(wordings)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """With its path."""
    with pytest.raises(OperatorError, match=r"cannot read the wordings in .*absent"):
        Wordings.read(tmp_path / "absent")
