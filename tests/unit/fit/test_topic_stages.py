"""The stages of a topic fit: kept once finished, taken up where they stopped, stopped with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from steering.errors import CaptureError, OperatorError, TooFewPrompts
from steering.evaluate.judge import Evidence, Judged, KeywordJudge, Verdict
from steering.fit.topics import TopicStage
from tests.unit.fit.conftest import MakeFit
from tests.unit.fit.planted import HARM, PLAIN, TOPIC, Planted
from tests.unit.fit.planted_fits import COUNT


def test_a_finished_stage_is_not_run_again_and_a_changed_one_is(make_fit: MakeFit) -> None:
    """A second run starts no engine; another judge keeps answers and residuals, and judges anew."""
    make_fit().run()
    again = make_fit()
    assert again.run() is not None
    assert again.started == []
    assert not any(line.endswith(": running") for line in again.said)
    other = make_fit(judge=KeywordJudge())
    other.run(TopicStage.FINDER)
    assert any(line.startswith("answers: kept") for line in other.said)
    assert "judged: running" in other.said
    assert other.started == ["steer"]


def test_answers_go_on_after_the_last_part(make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that are on disk are not asked again, and the residuals are those of all prompts."""
    monkeypatch.setattr("steering.fit.topic_answers.PART", 50)
    whole = make_fit(work="whole")
    whole.run(TopicStage.VECTORS)
    cut = make_fit(work="cut")
    cut.run(TopicStage.ANSWERS)
    parts = sorted((cut.fit.work / "answers").glob("*.json"))
    assert len(parts) > 3
    parts[-1].unlink()
    (cut.fit.work / "answers.json").unlink()
    again = make_fit(work="cut")
    again.run(TopicStage.VECTORS)
    assert [line for line in again.said if line.startswith("  answers: ")] == [
        f"  answers: {3 * COUNT} of {3 * COUNT} prompts"
    ]
    for key, value in whole.fit.tensors("vectors").items():
        assert torch.equal(value, again.fit.tensors("vectors")[key])


@dataclass
class Failing:
    """A judge whose endpoint is down after some verdicts."""

    left: int
    name: str = "llm"

    def judge(self, pairs: Any, on_progress: Any = None, *, evidence: Sequence[Evidence] | None = None) -> list[Judged]:
        """Raises once `left` runs out."""
        del on_progress, evidence
        self.left -= len(pairs)
        if self.left < 0:
            raise OperatorError("the judge's endpoint does not answer")
        return KeywordJudge().judge(pairs)


def test_a_judge_that_is_down_leaves_finished_stages(make_fit: MakeFit) -> None:
    """The error passes through; answers are kept, and a judge that is back goes on from there."""
    down = make_fit(judge=Failing(left=COUNT))
    with pytest.raises(OperatorError, match="endpoint does not answer"):
        down.run()
    assert (down.fit.work / "answers.json").is_file()
    assert not (down.fit.work / "judged.json").exists()
    back = make_fit(judge=Failing(left=10**9))
    assert back.run() is not None
    assert any(line.startswith("answers: kept") for line in back.said)


@dataclass
class Undecided:
    """A judge that says nothing."""

    name: str = "llm"

    def judge(self, pairs: Any, on_progress: Any = None, *, evidence: Sequence[Evidence] | None = None) -> list[Judged]:
        """Unparsable, always."""
        del on_progress, evidence
        return [Judged(verdict=Verdict.UNPARSABLE)] * len(pairs)


def test_a_judge_without_verdicts_gives_no_vectors(make_fit: MakeFit) -> None:
    """Unparsable verdicts count for neither side, so that there is nothing to make a direction of."""
    fitted = make_fit(judge=Undecided())
    with pytest.raises(TooFewPrompts):
        fitted.run()
    assert fitted.stage("judged")["unjudged"] == 3 * COUNT


def test_a_model_that_refuses_nothing_is_an_error_with_advice(make_fit: MakeFit) -> None:
    """One-sided answers stop the fit after they are judged, and say what to add."""
    with pytest.raises(TooFewPrompts, match="--refused"):
        make_fit(planted=Planted(refuses={TOPIC: -1.5, HARM: -1.5, PLAIN: -1.5})).run()


def test_residuals_that_are_no_numbers_stop_the_fit(make_fit: MakeFit) -> None:
    """NaN from the model is named by layer; it never becomes a vector."""
    with pytest.raises(CaptureError, match="layer 2 are not finite"):
        make_fit(planted=Planted(not_finite="strike number 3")).run()
