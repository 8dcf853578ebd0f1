"""The response probe: from the residuals of the first generated tokens, whether an answer refuses.

One linear score; an answer's score is the mean over those of its first `tokens` tokens that there are, so that fitting
it is a logistic regression on their mean residual. Knows nothing of models or of who labelled the answers.

Shapes: `N` answers, `G` generated tokens kept of each, `D` width of the residual stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steering.errors import ActivationsNotFinite, TooFewPrompts
from steering.fit.intervals import Rate
from steering.fit.probes import (
    Array,
    Linear,
    Mask,
    balanced,
    calibration,
    fit_platt,
    fit_refusal,
    probability,
)

MOST_TOKENS = 8
TOKENS = (1, 2, 4, 8)
"""Numbers of tokens that are tried."""

PENALTY = 0.02
SHARES = (0.6, 0.2)
"""Of the groups: fitted on, and calibrated on; all numbers are on the rest."""

CLOSE = 0.005
"""Balanced accuracy that fewer tokens may cost."""

FIT, CALIBRATE, HELD = 0, 1, 2


class Table(NamedTuple):
    """Answers that a probe is fitted and judged on.

    Attributes:
        is_refused: [N].
        share: [N], `FIT`, `CALIBRATE` or `HELD`.
        mask: [N, G] bool, tokens that there are.
    """

    is_refused: Mask
    share: NDArray[np.int8]
    mask: Tensor

    def weights(self, share: int) -> tuple[NDArray[np.int64], Array]:
        """Rows of one share, and weights by which refused and answered ones count the same."""
        rows = np.flatnonzero(self.share == share)
        return rows, balanced(np.full(len(rows), "all", dtype=np.str_), self.is_refused[rows])


class ResponseProbe(NamedTuple):
    """A fitted probe.

    Attributes:
        layer: block whose output it reads.
        tokens: of an answer, from its first.
        linear: weight [1, D] and bias [1]; the sigmoid of the mean score is calibrated where refusals and answers are
            as frequent, and a half is the boundary.
        facts: how it was chosen and what it does on held answers, for stage files and the manifest.
    """

    layer: int
    tokens: int
    linear: Linear
    facts: dict[str, Any]


def fit_response_probe(
    read: Callable[[int], Tensor],
    layers: Sequence[int],
    mask: Tensor,
    refused: Sequence[bool],
    groups: Sequence[str],
    *,
    tokens: Sequence[int] = TOKENS,
    penalty: float = PENALTY,
) -> ResponseProbe:
    """Fit at every layer and number of tokens; keep what tells best on calibration answers.

    Args:
        read: residuals [N, G, D] of a layer; read one layer at a time, never modified.
        mask: [N, G] bool, tokens that there are, the first ones. Answers without any are left out.
        refused: [N].
        groups: [N], what answers share that must not be on both sides of a split, such as their prompt's digest; a
            hash of it says which share an answer belongs to.
        tokens: numbers of tokens tried; those above G are left out.
        penalty: scikit-learn's C.

    Raises:
        TooFewPrompts: a share has no refusals, or nothing but refusals.
        ActivationsNotFinite: a residual is not.
    """
    known = mask[:, 0].numpy().astype(bool)
    rows = np.flatnonzero(known)
    table = Table(
        np.asarray(refused, dtype=bool)[rows], np.array([share_of(groups[row]) for row in rows], np.int8), mask[rows]
    )
    _require_sides(table)
    found: dict[tuple[int, int], Linear] = {}
    sweep = []
    for layer in layers:
        residuals = read(layer)[rows]
        for count in [count for count in tokens if count <= mask.shape[1]]:
            features = mean_of_first(residuals, table.mask, count)
            if not bool(torch.isfinite(features).all()):
                raise ActivationsNotFinite(f"residuals of generated tokens at layer {layer} hold NaN or infinity")
            found[layer, count], told = _fitted(features, table, penalty)
            sweep.append({"layer": layer, "tokens": count, **told, **_held(features, table, found[layer, count])})
    best = _best(sweep)
    layer, count = int(best["layer"]), int(best["tokens"])
    features = mean_of_first(read(layer)[rows], table.mask, count)
    by_tokens = {
        str(number): _best([row for row in sweep if row["tokens"] == number])
        for number in dict.fromkeys(row["tokens"] for row in sweep)
    }
    facts = {
        "layer": layer,
        "tokens": count,
        "layers": sweep,
        "by_tokens": by_tokens,
        **_facts(features, table, found[layer, count]),
        "left_out": {"no generated token was fed in": int((~known).sum())},
        "penalty": penalty,
        "chosen": f"of all whose balanced accuracy on calibration answers is within {CLOSE:g} of the best the one of "
        "fewest tokens, which tells soonest; then by that accuracy, the area under the ROC curve, the earlier layer",
        "imbalance": "refusals and answers weigh the same in the fit and in the scaling: a half is the boundary where "
        "both are as frequent",
        "shares": {"fit": SHARES[0], "calibrate": SHARES[1], "held": round(1 - sum(SHARES), 4)},
    }
    return ResponseProbe(layer, count, found[layer, count], facts)


def mean_of_first(residuals: Tensor, mask: Tensor, count: int) -> Tensor:
    """Mean residual [N, D] float32 of the first `count` tokens that there are; each answer has at least one."""
    present = mask[:, :count].to(torch.float32).unsqueeze(-1)
    # Places without a token may hold anything, NaN too.
    kept = residuals[:, :count].to(torch.float32).masked_fill(present == 0, 0.0)
    return kept.sum(dim=1) / present.sum(dim=1)


def share_of(group: str) -> int:
    """Which share a group belongs to: a hash cuts them the same way on every machine."""
    place = int(hashlib.sha256(f"response/{group}".encode()).hexdigest()[:13], 16) / 16**13
    return FIT if place < SHARES[0] else CALIBRATE if place < sum(SHARES) else HELD


def smoothed_platt(scores: Array, is_refused: Mask, weights: Array) -> tuple[float, float]:
    """Platt scaling with Platt's own smoothed targets, which keep separable scores from infinite slopes.

    Each answer counts as its label by (n + 1) / (n + 2), and as the other by the rest; n are those of its side.
    """
    sizes = np.where(is_refused, is_refused.sum(), (~is_refused).sum())
    sure = (sizes + 1) / (sizes + 2)
    doubled = np.concatenate([weights * sure, weights * (1 - sure)])
    platt = fit_platt(np.concatenate([scores, scores]), np.concatenate([is_refused, ~is_refused]), doubled)
    return platt.slope, platt.offset


def _best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row that calibration answers speak for; see `chosen` in the facts."""
    top = max(row["balanced_accuracy"] for row in rows)
    near = [row for row in rows if row["balanced_accuracy"] >= top - CLOSE]
    return max(
        near,
        key=lambda row: (-row["tokens"], round(row["balanced_accuracy"], 3), round(row["area"], 3), -row["layer"]),
    )


def _fitted(features: Tensor, table: Table, penalty: float) -> tuple[Linear, dict[str, float]]:
    """A scaled probe, and how well it tells calibration answers apart."""
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    fitting, weights = table.weights(FIT)
    linear = fit_refusal(features[fitting], table.is_refused[fitting], weights, penalty=penalty)
    calibrating, weights = table.weights(CALIBRATE)
    scores = linear.scores(features[calibrating])[:, 0]
    labels = table.is_refused[calibrating]
    slope, offset = smoothed_platt(scores, labels, weights)
    scaled = Linear(linear.weight * slope, linear.bias * slope + offset)
    right = balanced_accuracy_score(labels, slope * scores + offset >= 0)
    return scaled, {"balanced_accuracy": float(right), "area": float(roc_auc_score(labels, scores))}


def _held(features: Tensor, table: Table, linear: Linear) -> dict[str, Any]:
    rows = np.flatnonzero(table.share == HELD)
    told = linear.scores(features[rows])[:, 0] >= 0
    return {"held": Rate(count=int((told == table.is_refused[rows]).sum()), n=len(rows)).to_json()}


def _facts(features: Tensor, table: Table, linear: Linear) -> dict[str, Any]:
    """Accuracy, operating point and calibration on held answers."""
    from sklearn.metrics import roc_auc_score

    rows, weights = table.weights(HELD)
    labels = table.is_refused[rows]
    shares = probability(linear.scores(features[rows])[:, 0])
    told = shares >= 0.5
    hit, alarm = told[labels], told[~labels]
    return {
        "n": {
            name: {"refused": int(sides.sum()), "answered": int((~sides).sum())}
            for name, sides in zip(
                ("fit", "calibrate", "held"),
                (table.is_refused[table.share == number] for number in range(3)),
                strict=True,
            )
        },
        "accuracy": Rate(count=int((told == labels).sum()), n=len(rows)).to_json(),
        "refusals_told": Rate(count=int(hit.sum()), n=len(hit)).to_json(),
        "answers_called_refusals": Rate(count=int(alarm.sum()), n=len(alarm)).to_json(),
        "area": float(roc_auc_score(labels, shares)),
        "operating_points": [
            {
                "name": "balanced",
                "threshold": 0.5,
                "true_positive_rate": float(hit.mean()),
                "false_positive_rate": float(alarm.mean()),
                "positives": len(hit),
                "negatives": len(alarm),
            }
        ],
        "calibration": {
            "balanced": calibration(shares, labels, weights),
            "as_they_came": calibration(shares, labels, np.ones(len(rows))),
        },
    }


def _require_sides(table: Table) -> None:
    for name, number in (("fitted", FIT), ("calibrated", CALIBRATE), ("tested", HELD)):
        sides = table.is_refused[table.share == number]
        if len(sides) == 0 or sides.all() or not sides.any():
            raise TooFewPrompts(
                f"a response probe is {name} on refusals and answers, this model gave {int(sides.sum())} refusals "
                f"among {len(sides)}; give more prompts that it refuses and that it answers"
            )
