"""The gate's reference: what scores, thresholds, allowed categories and graded strength mean."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steering.errors import BundleFormatError
from steering.gate import Probe, rule
from steering.plan import Decision, GateOrder, log_odds
from tests.samples import random_probe

CATEGORIES = ("safety", "political", "humanizing")


def order(low: float, high: float, **changed: object) -> GateOrder:
    """An order with these thresholds."""
    return GateOrder(profile="p", comply_below=low, refuse_above=high, **changed)  # type: ignore[arg-type]


def scores(refusal: float, *categories: float) -> torch.Tensor:
    """Logits of a refusal probability and of categories."""
    return torch.tensor([log_odds(refusal), *(categories or (1.0, 0.0, -1.0))])


@pytest.mark.parametrize(
    ("refusal", "thresholds", "expected"),
    [
        (0.7, (0.4, 0.6), Decision.REFUSE),
        (0.5, (0.4, 0.6), Decision.ABSTAIN),
        (0.3, (0.4, 0.6), Decision.COMPLY),
        (0.999999, (0.0, 1.0), Decision.ABSTAIN),
        (1e-9, (0.0, 1.0), Decision.ABSTAIN),
        (0.5, (0.5, 0.5), Decision.REFUSE),
        (0.499, (0.5, 0.5), Decision.COMPLY),
        (0.2, (1.0, 1.0), Decision.COMPLY),
        (0.2, (0.0, 0.0), Decision.REFUSE),
    ],
)
def test_thresholds_decide(refusal: float, thresholds: tuple[float, float], expected: Decision) -> None:
    """Above, in the band, below; 0 and 1 switch a side off; of equal thresholds (P1's hard sign) refuse goes first."""
    ruling = rule(scores(refusal), order(*thresholds), CATEGORIES)
    assert ruling is not None
    assert ruling.decision is expected
    assert ruling.share == float(expected is not Decision.ABSTAIN)


@given(low=st.floats(0, 1), room=st.floats(0, 1), score=st.floats(-30, 30))
def test_a_higher_score_never_decides_less_for_refusal(low: float, room: float, score: float) -> None:
    """Comply, abstain, refuse: in this order as the score grows, and the graded share stays between 0 and 1."""
    rank = {Decision.COMPLY: 0, Decision.ABSTAIN: 1, Decision.REFUSE: 2}
    given_order = order(low, low + (1 - low) * room, is_graded=True)
    found = []
    for refusal in (score, score + 1.0):
        ruling = rule(torch.tensor([refusal, 0.0, 0.0, 0.0]), given_order, CATEGORIES)
        assert ruling is not None
        assert 0.0 <= ruling.share <= 1.0
        found.append(rank[ruling.decision])
    assert found[0] <= found[1]


def test_the_best_allowed_category_is_chosen() -> None:
    """Among all, among those allowed, and the first of equals."""
    logits = scores(0.9, 0.5, 2.0, 1.0)
    for allowed, expected in ((None, 1), (("safety", "humanizing"), 2), (("safety",), 0)):
        ruling = rule(logits, order(0.4, 0.6, categories=allowed), CATEGORIES)
        assert ruling is not None
        assert ruling.category == expected
    tied = rule(scores(0.9, 1.0, 1.0, 1.0), order(0.4, 0.6), CATEGORIES)
    assert tied is not None
    assert tied.category == 0


@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(4))
def test_scores_that_are_not_finite_decide_nothing(strange: float, place: int) -> None:
    """Any of them, the refusal score or a category's, also of one that is not allowed."""
    logits = scores(0.9)
    logits[place] = strange
    assert rule(logits, order(0.4, 0.6, categories=("safety",)), CATEGORIES) is None


def test_graded_strength_grows_from_the_threshold_to_the_end() -> None:
    """Nothing at the threshold, half way at half the distance, all at certainty, on either side."""
    for refusal, expected in ((0.600001, 0.0), (0.8, 0.5), (0.399999, 0.0), (0.2, 0.5), (1 - 1e-7, 1.0)):
        ruling = rule(scores(refusal), order(0.4, 0.6, is_graded=True), CATEGORIES)
        assert ruling is not None
        assert ruling.share == pytest.approx(expected, abs=1e-5)


def test_logits_are_the_linear_scores_of_every_row() -> None:
    """W·x + b in float32, also of half-precision residuals."""
    probe = random_probe("p", layer=2, categories=CATEGORIES)
    x = torch.randn(5, probe.width, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    assert torch.allclose(probe.logits(x), x.float() @ probe.weight.T + probe.bias)
    assert probe.logits(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"categories": ("a", "a", "b")}, "up to 16 different categories"),
        ({"categories": tuple("abcdefghijklmnopq")}, "up to 16 different categories"),
        ({"categories": ()}, r"needs weight \[1, D\]"),
        ({"categories": ("a",)}, r"needs weight \[2, D\]"),
        ({"layer": -1}, "layer must be 0 or more"),
        ({"bias": torch.zeros(4, dtype=torch.float64)}, "bias has dtype"),
        ({"weight": torch.full((4, 16), math.nan)}, "weight has numbers that are not finite"),
    ],
)
def test_a_probe_checks_itself(changed: dict[str, object], message: str) -> None:
    """Shapes, dtypes, names and numbers, each by name."""
    good = random_probe("p", layer=0, categories=CATEGORIES)
    fields = {name: getattr(good, name) for name in ("name", "layer", "categories", "weight", "bias")}
    with pytest.raises(BundleFormatError, match=message):
        Probe(**{**fields, **changed})
