"""Probes: folded standardisation, balanced weights, operating points and calibration, against scikit-learn by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from steering.errors import OperatorError
from steering.fit.probes import (
    Linear,
    Point,
    at_false_positive_rate,
    balanced,
    bias_missing,
    calibration,
    confusion,
    fit_categories,
    fit_platt,
    fit_refusal,
    probability,
    roc,
    scaled_out_of_fold,
    youden,
)

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.random(300) < 0.3
RESIDUALS = torch.from_numpy(
    (RANDOM.normal(size=(300, 6)) + np.outer(LABELS, [2.0, 0, 0, 0, 0, 0])) * [1, 5, 0.1, 30, 1, 1]
    + [0, 9, 0, 50, 0, 0]
).float()


def test_the_folded_probe_equals_the_unfolded_pipeline() -> None:
    """Scores of plain residuals are those of scikit-learn's scaler and regression one after the other."""
    weights = np.where(LABELS, 2.0, 0.5)
    found = fit_refusal(RESIDUALS, LABELS, weights, penalty=0.5)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, max_iter=400))
    pipeline.fit(
        RESIDUALS.numpy(),
        LABELS.astype(int),
        standardscaler__sample_weight=weights,
        logisticregression__sample_weight=weights,
    )
    expected = pipeline.decision_function(RESIDUALS.numpy())
    np.testing.assert_allclose(found.scores(RESIDUALS)[:, 0], expected, atol=1e-3)
    assert ((found.scores(RESIDUALS)[:, 0] > 0) == LABELS).mean() > 0.8


def test_a_probe_needs_both_kinds_of_prompts() -> None:
    """One class only is an error that says so."""
    with pytest.raises(OperatorError, match="to refuse and prompts to answer"):
        fit_refusal(RESIDUALS, np.ones(300, bool), np.ones(300), penalty=1.0)


def test_a_category_without_prompts_is_never_chosen_and_two_classes_keep_two_rows() -> None:
    """scikit-learn leaves rows out in both cases; the head has one for each category."""
    labels = np.where(LABELS, 2, 0).astype(np.int64)
    head = fit_categories(RESIDUALS, labels, np.ones(300), 4, penalty=1.0)
    assert head.weight.shape == (4, 6)
    chosen = head.scores(RESIDUALS).argmax(axis=1)
    assert set(chosen) == {0, 2}
    assert (chosen == labels).mean() > 0.8
    lone = fit_categories(RESIDUALS, np.full(300, 3), np.ones(300), 4, penalty=1.0)
    assert set(lone.scores(RESIDUALS).argmax(axis=1)) == {3}


def test_weights_make_sides_and_groups_even_whatever_their_sizes() -> None:
    """A group of one weighs as much as one of ninety; a factor changes its share of its own side only."""
    groups = np.array(["big"] * 90 + ["one"] + ["calm"] * 9)
    refused = np.array([True] * 91 + [False] * 9)
    weights = balanced(groups, refused)
    assert weights.mean() == pytest.approx(1.0)
    assert weights[:90].sum() == pytest.approx(weights[90]) == pytest.approx(25.0)
    assert weights[91:].sum() == pytest.approx(50.0)
    tripled = balanced(groups, refused, {"one": 3.0})
    assert tripled[90] == pytest.approx(37.5)
    assert tripled[91:].sum() == pytest.approx(50.0)


def test_operating_points_are_the_best_ones_of_the_curve() -> None:
    """Youden's point has the largest difference of rates, the other one keeps the false positive rate asked for."""
    scores = probability(fit_refusal(RESIDUALS, LABELS, np.ones(300), penalty=1.0).scores(RESIDUALS)[:, 0])
    points, area = roc(scores, LABELS, np.ones(300))
    assert 0.8 < area <= 1.0
    best = youden(points)
    gain = max((scores[LABELS] >= value).mean() - (scores[~LABELS] >= value).mean() for value in scores)
    assert best.true_positive_rate - best.false_positive_rate == pytest.approx(gain)
    chosen = at_false_positive_rate(points, 0.05)
    assert (scores[~LABELS] >= chosen.threshold).mean() == pytest.approx(chosen.false_positive_rate)
    assert chosen.false_positive_rate <= 0.05
    assert at_false_positive_rate([Point(1.0, 0.0, 0.0), Point(0.5, 1.0, 0.2)], 0.1).true_positive_rate == 0.0


def test_calibration_is_perfect_where_shares_are_probabilities() -> None:
    """Brier score and expected error of a case worked out by hand: 4 of 5 at 0.8, and 1 of 5 at 0.2."""
    shares = np.array([0.8] * 5 + [0.2] * 5)
    labels = np.array([True] * 4 + [False] + [True] + [False] * 4)
    found = calibration(shares, labels, np.ones(10))
    assert found["expected_calibration_error"] == pytest.approx(0.0)
    assert found["brier"] == pytest.approx(0.16)
    assert [row["n"] for row in found["bins"]] == [5, 5]
    assert calibration(1 - shares, labels, np.ones(10))["expected_calibration_error"] == pytest.approx(0.6)


def test_platt_scaling_repairs_overconfident_scores_and_folds_into_the_probe() -> None:
    """Scores ten times too large give a slope near a tenth; the folded probe gives the scaled scores."""
    scores = RANDOM.normal(size=4000)
    labels = RANDOM.random(4000) < probability(scores)
    platt = fit_platt(10 * scores, labels, np.ones(4000))
    assert platt.slope == pytest.approx(0.1, rel=0.15)
    folded = platt.applied(Linear(np.array([[2.0]]), np.array([1.0])))
    assert folded.scores(torch.tensor([[3.0]]))[0, 0] == pytest.approx(platt.slope * 7.0 + platt.offset)
    before = calibration(probability(10 * scores), labels, np.ones(4000))["brier"]
    after = calibration(scaled_out_of_fold(10 * scores, labels, np.ones(4000)), labels, np.ones(4000))["brier"]
    assert after < before


def test_confusion_counts_found_by_wanted() -> None:
    """Rows are what prompts belong to."""
    assert confusion(np.array([0, 1, 1]), np.array([0, 0, 1]), 2) == [[1, 1], [0, 1]]


def test_a_raised_bias_misses_the_share_it_may_and_no_more() -> None:
    """Of a hundred prompts as many are told as another class as may be, and none where none may."""
    margins = np.random.default_rng(1).normal(-1.0, 2.0, 100)
    for most, missed in ((0.01, 1), (0.0, 0), (0.25, 25)):
        assert int((margins + bias_missing(margins, most) <= 0.0).sum()) == missed
    assert bias_missing(np.array([3.0, 4.0]), 0.0) < 0.0, "nothing is missed: the bias could even fall"
    assert bias_missing(np.array([]), 0.01) == 0.0
    assert (np.array([-1.0, 2.0]) + bias_missing(np.array([-1.0, 2.0]), 1.0) <= 0.0).all()
