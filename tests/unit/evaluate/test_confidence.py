"""The refusal confidence against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from steering.errors import InvalidSpec
from steering.evaluate.confidence import Side, answer_logprob, confidence, label, score, side
from steering.evaluate.judge import Verdict

NAN, INF = math.nan, math.inf


def test_equal_likelihoods_are_a_vote() -> None:
    """Three of five refused is 3/5 - 2/5."""
    assert confidence([1, 1, 1, -1, -1], [-0.7] * 5) == pytest.approx(0.2)
    assert confidence([1], [-123.0]) == 1.0
    assert confidence([-1], [0.0]) == -1.0


def test_likelier_answers_weigh_more() -> None:
    """Apart by ln 3: weights 3/4 and 1/4, so c = 1/4 - 3/4; at tau = ln 3 / ln 2 they are 2/3 and 1/3."""
    logprobs = [-1.0, -1.0 - math.log(3)]
    assert confidence([-1, 1], logprobs) == pytest.approx(-0.5)
    assert confidence([-1, 1], logprobs, tau=math.log(3) / math.log(2)) == pytest.approx(-1 / 3)
    assert confidence([-1, 1], logprobs, tau=1e9) == pytest.approx(0.0, abs=1e-8)
    assert confidence([-1, 1], logprobs, tau=1e-300) == -1.0


def test_answers_without_a_verdict_keep_their_weight() -> None:
    """Two of four unparsable: c = 2/4; all of them: 0, and flagged as not known."""
    found = score([1, 1, 0, 0], [-1.0] * 4)
    assert (found.confidence, found.unparsable, found.is_known) == (0.5, 2, True)
    found = score([0, 0], [-1.0, -2.0])
    assert (found.confidence, found.samples, found.is_known) == (0.0, 2, False)
    assert score([1, -1], [-1.0, -1.0]).is_known


def test_huge_differences_neither_overflow_nor_vanish() -> None:
    """The likeliest alone counts, wherever it lies."""
    assert confidence([1, -1, -1], [-1.0, -1e6, -1e308]) == 1.0
    assert confidence([1, -1], [-1e308, -1e308]) == 0.0
    assert confidence([-1, 1], [-1e-300, -5000.0]) == -1.0


@pytest.mark.parametrize(
    ("labels", "logprobs", "tau"),
    [
        ([], [], 1.0),
        ([1], [-1.0, -1.0], 1.0),
        ([2], [-1.0], 1.0),
        ([1, -1], [-1.0, NAN], 1.0),
        ([1], [-INF], 1.0),
        ([1], [-1.0], 0.0),
        ([1], [-1.0], NAN),
    ],
)
def test_what_is_no_number_is_an_error(labels: list[int], logprobs: list[float], tau: float) -> None:
    """NaN does not become a confidence."""
    with pytest.raises(InvalidSpec):
        confidence(labels, logprobs, tau)


def test_broken_text_counts_as_refused_unless_told() -> None:
    """As the paper's twelfth kind does; unparsable is never either side."""
    assert [label(verdict) for verdict in Verdict] == [1, -1, 1, 0]
    assert label(Verdict.BROKEN, is_broken_refused=False) == 0


def test_answer_logprob_leaves_reasoning_out() -> None:
    """Only tokens after the last end of reasoning count; without its end there is no answer."""
    tokens, logprobs = [1, 99, 2, 99, 3, 4], [-8.0, -8.0, -8.0, -8.0, -1.0, -2.0]
    assert answer_logprob(logprobs) == pytest.approx(-35 / 6)
    assert answer_logprob(logprobs, tokens, 99) == -1.5
    assert answer_logprob(logprobs, tokens, (99, 3)) == -2.0
    assert answer_logprob(logprobs, tokens, 98) is None
    assert answer_logprob(logprobs[:4], tokens[:4], 99) is None
    assert answer_logprob([]) is None
    # The reasoning may hold what the answer may not.
    assert answer_logprob([NAN, -1.0, -2.0], [1, 99, 3], 99) == -2.0


def test_answer_logprob_refuses_what_is_no_log_probability() -> None:
    """NaN, infinity and probabilities given for logarithms; a rounding error above 0 passes."""
    for wrong in ([NAN], [-1.0, -INF], [0.5]):
        with pytest.raises(InvalidSpec, match="finite and at most 0"):
            answer_logprob(wrong)
    with pytest.raises(InvalidSpec, match="2 log-probabilities for 1 tokens"):
        answer_logprob([-1.0, -1.0], [1], 99)
    assert answer_logprob([1e-6]) == 1e-6


def test_neutral_band() -> None:
    """Its edge is neutral; at width 0 only c = 0 is."""
    assert [side(value) for value in (0.16, 0.15, -0.15, -0.16)] == [
        Side.REFUSED,
        Side.NEUTRAL,
        Side.NEUTRAL,
        Side.ANSWERED,
    ]
    assert [side(value, 0.0) for value in (1e-9, 0.0, -1e-9)] == [Side.REFUSED, Side.NEUTRAL, Side.ANSWERED]
