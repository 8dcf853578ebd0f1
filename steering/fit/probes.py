"""Probes: logistic regressions on residuals, with their standardisation folded in, and how good they are.

Pure maths on arrays; scikit-learn does the fitting. Knows nothing of models, files or data sets.

Shapes: `N` prompts, `C` categories, `D` width of the residual stream.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steering.errors import OperatorError

EDGE = 0.01
"""By how much a score must be on the right side of another where no other prompt says: far more than float32 loses."""

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Linear(NamedTuple):
    """Scores `x @ weight.T + bias` of plain residuals: [K, D] and [K], float64."""

    weight: Array
    bias: Array

    def scores(self, residuals: Tensor) -> Array:
        """[N, K] float64 of residuals [N, D]."""
        weight, bias = torch.from_numpy(self.weight), torch.from_numpy(self.bias)
        rows = [part.to(torch.float64) @ weight.T + bias for part in residuals.split(2048)]
        return np.asarray(torch.cat(rows).numpy()) if rows else np.empty((0, len(self.bias)))


def fit_refusal(residuals: Tensor, is_refused: Mask, weights: Array, *, penalty: float) -> Linear:
    """One score [1, D]: log-odds that a prompt is to be refused.

    Args:
        residuals: [N, D] float32. Not modified.
        is_refused: [N].
        weights: [N], of each prompt in the loss.
        penalty: scikit-learn's C, the inverse of the L2 penalty.
    """
    if is_refused.all() or not is_refused.any():
        raise OperatorError("a probe needs prompts to refuse and prompts to answer; check the data sets of the fit")
    return _fit(residuals, is_refused.astype(np.int64), weights, penalty)


def fit_categories(
    residuals: Tensor, category: NDArray[np.int64], weights: Array, count: int, *, penalty: float
) -> Linear:
    """A multinomial head [C, D]; a category without prompts gets no weight and the lowest bias, so it is never chosen.

    Args:
        category: [N] indices below `count`.
    """
    present = np.unique(category)
    if len(present) < 2:
        weight, bias = np.zeros((count, residuals.shape[1])), np.full(count, -1e4)
        bias[present] = 0.0
        return Linear(weight, bias)
    found = _fit(residuals, category, weights, penalty)
    if len(present) == 2:  # scikit-learn keeps one row for two classes
        found = Linear(np.concatenate([-found.weight, found.weight]) / 2, np.concatenate([-found.bias, found.bias]) / 2)
    weight, bias = np.zeros((count, residuals.shape[1])), np.full(count, -1e4)
    weight[present], bias[present] = found.weight, found.bias
    return Linear(weight, bias)


def _fit(residuals: Tensor, labels: NDArray[np.int64], weights: Array, penalty: float) -> Linear:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    scaled = scaler.fit_transform(residuals.numpy(), sample_weight=weights)
    model = LogisticRegression(C=penalty, max_iter=400).fit(scaled, labels, sample_weight=weights)
    return folded(scaler.mean_, scaler.scale_, model.coef_, model.intercept_)


def folded(mean: Array, scale: Array, coefficients: Array, intercept: Array) -> Linear:
    """Scores of plain residuals that equal those of standardised ones: w / scale and b - w·mean / scale.

    P1's code subtracts the training mean while fitting and forgets it while steering; one pair (w, b) cannot.
    """
    weight = np.asarray(coefficients, dtype=np.float64) / np.asarray(scale, dtype=np.float64)
    return Linear(weight, np.asarray(intercept, dtype=np.float64) - weight @ np.asarray(mean, dtype=np.float64))


def balanced(groups: NDArray[np.str_], is_refused: Mask, factors: dict[str, float] | None = None) -> Array:
    """Weights [N] with mean 1: both sides weigh the same, and on each side every group does, whatever its size.

    Args:
        groups: [N], such as the data set a prompt comes from.
        factors: multiplies the weight of a group; 1 where it is not named.
    """
    weights = np.zeros(len(groups))
    for side in (True, False):
        rows = is_refused == side
        for group in np.unique(groups[rows]):
            members = rows & (groups == group)
            weights[members] = (factors or {}).get(str(group), 1.0) / members.sum()
        if rows.any():
            weights[rows] *= 0.5 * len(groups) / weights[rows].sum()
    return weights


def probability(scores: Array) -> Array:
    """Sigmoid, without overflow."""
    from scipy.special import expit

    return np.asarray(expit(scores))


class Point(NamedTuple):
    """A threshold on a probability, and the shares it flags of prompts to refuse and to answer."""

    threshold: float
    true_positive_rate: float
    false_positive_rate: float


def roc(probabilities: Array, is_refused: Mask, weights: Array) -> tuple[list[Point], float]:
    """The ROC curve's points, thresholds falling, and the area under it."""
    from sklearn.metrics import auc, roc_curve

    false, true, thresholds = roc_curve(is_refused, probabilities, sample_weight=weights, drop_intermediate=True)
    points = [
        Point(min(1.0, float(threshold)), float(hit), float(alarm))
        for threshold, hit, alarm in zip(thresholds, true, false, strict=True)
    ]
    return points, float(auc(false, true))


def youden(points: list[Point]) -> Point:
    """The point of largest true minus false positive rate: P1's choice."""
    return max(points, key=lambda point: (point.true_positive_rate - point.false_positive_rate, point.threshold))


def at_false_positive_rate(points: list[Point], most: float) -> Point:
    """The point that flags most prompts to refuse while flagging at most a share `most` of those to answer."""
    allowed = [point for point in points if point.false_positive_rate <= most]
    return max(allowed, key=lambda point: (point.true_positive_rate, point.threshold))


def calibration(probabilities: Array, is_refused: Mask, weights: Array, bins: int = 10) -> dict[str, Any]:
    """How far probabilities are from shares: Brier score, expected calibration error and the bins behind it."""
    edges = np.minimum((probabilities * bins).astype(int), bins - 1)
    total = weights.sum()
    rows, error = [], 0.0
    for number in range(bins):
        members = edges == number
        weight = float(weights[members].sum())
        if not weight:
            continue
        mean = float((weights[members] * probabilities[members]).sum() / weight)
        share = float((weights[members] * is_refused[members]).sum() / weight)
        error += weight / total * abs(mean - share)
        rows.append({"probability": mean, "share": share, "weight": weight / total, "n": int(members.sum())})
    brier = float((weights * (probabilities - is_refused) ** 2).sum() / total)
    return {"brier": brier, "expected_calibration_error": float(error), "bins": rows}


class Platt(NamedTuple):
    """A score s becomes `slope · s + offset` (Platt scaling); the order of scores is kept."""

    slope: float
    offset: float

    def applied(self, linear: Linear) -> Linear:
        """The same scaling folded into weights and bias."""
        return Linear(linear.weight * self.slope, linear.bias * self.slope + self.offset)


def fit_platt(scores: Array, is_refused: Mask, weights: Array) -> Platt:
    """Platt scaling by an unpenalised logistic regression on the score; none where the slope would not be positive."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1e6, max_iter=400).fit(scores.reshape(-1, 1), is_refused, sample_weight=weights)
    slope = float(model.coef_[0, 0])
    return Platt(slope, float(model.intercept_[0])) if slope > 0 else Platt(1.0, 0.0)


def scaled_out_of_fold(scores: Array, is_refused: Mask, weights: Array, folds: int = 5) -> Array:
    """Probabilities after Platt scaling by other prompts than the one it scales: by these it is judged."""
    result = np.empty(len(scores))
    for fold in range(folds):
        held = np.arange(len(scores)) % folds == fold
        if is_refused[~held].all() or not is_refused[~held].any():
            return probability(scores)
        platt = fit_platt(scores[~held], is_refused[~held], weights[~held])
        result[held] = probability(platt.slope * scores[held] + platt.offset)
    return result


def bias_missing(margins: Array, most: float) -> float:
    """What a class's bias must gain so that at most a share `most` of its own prompts is told as another class.

    Halfway between the last margin that may be missed and the first that may not; negative where fewer are missed.

    Args:
        margins: [N], the class's score of each prompt less the best of the others.
    """
    if not len(margins):
        return 0.0
    ordered = np.sort(margins)
    allowed = int(most * len(ordered) + 1e-9)
    if allowed >= len(ordered):
        return -float(ordered[-1])
    below = ordered[allowed - 1] if allowed else ordered[0] - 2 * EDGE
    return -float(below + ordered[allowed]) / 2


def confusion(found: NDArray[np.int64], wanted: NDArray[np.int64], count: int) -> list[list[int]]:
    """Counts [C, C]: rows are the categories that prompts belong to, columns those that were found."""
    table = np.zeros((count, count), dtype=int)
    np.add.at(table, (wanted, found), 1)
    return [[int(value) for value in row] for row in table]


def histogram(probabilities: Array, bins: int = 20) -> list[int]:
    """Counts of probabilities in equal bins from 0 to 1."""
    return [int(count) for count in np.histogram(probabilities, bins=bins, range=(0.0, 1.0))[0]]
