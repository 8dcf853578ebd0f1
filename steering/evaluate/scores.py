"""A probe's scores on held prompts: histograms, ROC, calibration. Pure numbers.

Knows nothing of servers, suites' names or of how reports look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BINS = 20
CALIBRATION_BINS = 10


def histogram(scores: Sequence[float], bins: int = BINS) -> list[int]:
    """Counts of probabilities in equal bins of 0…1."""
    counts = [0] * bins
    for score in scores:
        counts[min(bins - 1, int(score * bins))] += 1
    return counts


def roc(positives: Sequence[float], negatives: Sequence[float]) -> dict[str, Any]:
    """Points (threshold, false and true positive rate) where they change, and the area under them.

    The area is the chance that a prompt to refuse scores above one to answer, ties counting half.
    """
    if not positives or not negatives:
        return {"points": [], "auc": None, "positives": len(positives), "negatives": len(negatives)}
    ordered = sorted([(score, True) for score in positives] + [(score, False) for score in negatives], reverse=True)
    points = [[1.0, 0.0, 0.0]]
    hits = alarms = 0
    area = 0.0
    index = 0
    while index < len(ordered):
        score, was = ordered[index][0], (hits, alarms)
        while index < len(ordered) and ordered[index][0] == score:
            hits, alarms = hits + ordered[index][1], alarms + (not ordered[index][1])
            index += 1
        area += (alarms - was[1]) * (hits + was[0]) / 2
        points.append([round(score, 6), round(alarms / len(negatives), 5), round(hits / len(positives), 5)])
    return {
        "points": points,
        "auc": round(area / (len(positives) * len(negatives)), 4),
        "positives": len(positives),
        "negatives": len(negatives),
    }


def calibration(positives: Sequence[float], negatives: Sequence[float], bins: int = CALIBRATION_BINS) -> dict[str, Any]:
    """Mean probability against share to be refused, by bins; Brier score and expected calibration error.

    Shares depend on how many prompts of either kind there are; here they are those of the suites.
    """
    known = [(score, 1) for score in positives] + [(score, 0) for score in negatives]
    if not known:
        return {"bins": [], "brier": None, "ece": None}
    told, error = [], 0.0
    for place in range(bins):
        inside = [(score, is_one) for score, is_one in known if min(bins - 1, int(score * bins)) == place]
        if not inside:
            continue
        mean = sum(score for score, _ in inside) / len(inside)
        share = sum(is_one for _, is_one in inside) / len(inside)
        error += len(inside) * abs(mean - share) / len(known)
        told.append({"mean": round(mean, 4), "share": round(share, 4), "n": len(inside)})
    brier = sum((score - is_one) ** 2 for score, is_one in known) / len(known)
    return {"bins": told, "brier": round(brier, 4), "ece": round(error, 4)}


def likeliest(probabilities: Mapping[str, float]) -> str:
    """The name with the largest probability; the first of several, as in the engine."""
    return max(probabilities, key=lambda name: probabilities[name])
