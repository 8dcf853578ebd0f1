"""Stages `probe` and `head`: the layer that tells best, the refusal score, its operating points, and the categories.

Fitted on fitting prompts; every number, threshold and scaling comes from calibration prompts. Knows nothing of edits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from steering.fit.categories import PLAIN
from steering.fit.control import Fit
from steering.fit.probes import (
    Array,
    Linear,
    Mask,
    Point,
    at_false_positive_rate,
    balanced,
    bias_missing,
    calibration,
    confusion,
    fit_categories,
    fit_platt,
    fit_refusal,
    histogram,
    probability,
    roc,
    scaled_out_of_fold,
    youden,
)
from steering.fit.prompts import GROUP_KINDS, Kind, Prompts, prompt_weights
from steering.fit.vectors import Activations
from steering.gate import Probe

PROBE = "refusal"
ROC_POINTS = 200
"""Points of the ROC curve that a report keeps at most."""


class Calibrating(NamedTuple):
    """Calibration prompts that a probe is judged on: rows, labels and weights; see `judged`."""

    rows: NDArray[np.int64]
    is_refused: Mask
    weights: Array
    contested: Mask


def judged(prompts: Prompts, plain_weight: float) -> Calibrating:
    """Every group of `GROUP_KINDS`; on a side each group weighs the same, those of plain prompts by their factor.

    `contested` leaves plain prompts out: telling them from harmful ones is easy and says little of a probe.
    """
    groups = prompts.groups
    rows = np.flatnonzero(np.isin(groups, list(GROUP_KINDS)))
    is_refused = np.array([GROUP_KINDS[group] == Kind.REFUSE for group in groups[rows]], dtype=bool)
    plain = [group for group, kind in GROUP_KINDS.items() if kind == Kind.PLAIN]
    weights = balanced(groups[rows], is_refused, dict.fromkeys(plain, plain_weight))
    return Calibrating(rows, is_refused, weights, ~np.isin(groups[rows], plain))


def probe_stage(
    fit: Fit,
    residuals: Activations,
    fitting: Prompts,
    calibrating: Prompts,
    deepest: int,
    after: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The probe at the layer, up to `deepest`, whose area under the ROC curve of contested prompts is largest."""

    def make() -> dict[str, Any]:
        weights = prompt_weights(fit, fitting)
        judges = judged(calibrating, fit.settings.weights.get("plain", 1.0))
        layers = [fit.settings.layer] if fit.settings.layer is not None else list(range(deepest + 1))
        found: dict[int, Linear] = {}
        sweep = []
        for layer in layers:
            found[layer] = fit_refusal(
                residuals.fitting.layer(layer), fitting.is_refused, weights, penalty=fit.settings.penalty
            )
            scores = found[layer].scores(residuals.calibrating.layer(layer)[judges.rows])[:, 0]
            area = roc_auc_score(
                judges.is_refused[judges.contested],
                scores[judges.contested],
                sample_weight=judges.weights[judges.contested],
            )
            whole = roc_auc_score(judges.is_refused, scores, sample_weight=judges.weights)
            sweep.append({"layer": layer, "contested": float(area), "all": float(whole)})
            fit.say(f"  layer {layer}: area under the ROC curve {area:.4f}, with plain prompts {whole:.4f}")
        # To three places; among equals the earlier layer, which leaves more layers to edits.
        best = max(sweep, key=lambda row: (round(row["contested"], 3), -row["layer"]))
        layer = int(best["layer"])
        scores = found[layer].scores(residuals.calibrating.layer(layer))[:, 0]
        linear, scaling = _scaled(found[layer], scores[judges.rows], judges)
        if fit.settings.threshold is not None:
            # A fixed threshold is one on the probe as it was fitted.
            linear, scaling = found[layer], {**scaling, "is_applied": False}
        shares = probability(linear.scores(residuals.calibrating.layer(layer))[:, 0])
        facts = _facts(fit, shares[judges.rows], judges)
        histograms = {
            str(group): {
                "n": int((calibrating.groups == group).sum()),
                "counts": histogram(shares[calibrating.groups == group]),
            }
            for group in np.unique(calibrating.groups)
        }
        return {
            "layer": layer,
            "layers": sweep,
            "scaling": scaling,
            **facts,
            "histograms": histograms,
            "imbalance": {
                "prompts": {"refuse": int(fitting.is_refused.sum()), "answer": int((~fitting.is_refused).sum())},
                "how": "weights in the loss: either side weighs half; on a side every source weighs the same, times "
                "a factor",
                "factors": dict(fit.settings.weights),
            },
            "tensors": {
                "weight": torch.from_numpy(linear.weight),
                "bias": torch.from_numpy(linear.bias),
                "calibration_probability": torch.from_numpy(shares),
            },
        }

    return fit.stage("probe", make, of=("layer", "penalty", "weights", "false_positive_rate", "threshold"), after=after)


def head_stage(
    fit: Fit,
    residuals: Activations,
    fitting: Prompts,
    calibrating: Prompts,
    layer: int,
    after: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The multinomial head at the probe's layer: which category's edit a prompt would get.

    It sees prompts to refuse, those that look so, and plain ones; rare categories weigh more, by one over the root of
    their size, and so do sources by their factor in the settings. The plain class then has its bias raised until it
    misses few plain calibration prompts: what it misses may be edited, and what an edit does to a plain prompt is harm.
    """

    def make() -> dict[str, Any]:
        names = fit.head_categories
        rows, labels = _labelled(fitting, names)
        sizes = np.bincount(labels, minlength=len(names))
        factors = np.array([fit.settings.head_weights.get(source, 1.0) for source in fitting.sources[rows]])
        weights = factors / np.sqrt(np.maximum(sizes[labels], 1))
        weights *= len(weights) / weights.sum()
        head = fit_categories(
            residuals.fitting.layer(layer)[rows], labels, weights, len(names), penalty=fit.settings.head_penalty
        )
        told: dict[str, Any] | None = None
        if fit.settings.tells_plain:
            scores = head.scores(residuals.calibrating.layer(layer))
            head, told = _telling_plain(head, scores, calibrating.groups, fit.settings.plain_missed)
        scores = head.scores(residuals.calibrating.layer(layer))
        chosen = scores.argmax(axis=1)
        judged_rows, wanted = _labelled(calibrating, names)
        table = confusion(chosen[judged_rows], wanted, len(names))
        right = int(np.trace(np.array(table)))
        return {
            "layer": layer,
            "categories": list(names),
            "prompts": {name: int(size) for name, size in zip(names, sizes, strict=True)},
            "confusion": table,
            "accuracy": right / max(1, len(wanted)),
            "balanced_accuracy": float(
                np.mean([row[place] / sum(row) for place, row in enumerate(table) if sum(row)] or [0.0])
            ),
            "n": len(wanted),
            "plain": told,
            "tensors": {
                "weight": torch.from_numpy(head.weight),
                "bias": torch.from_numpy(head.bias),
                "calibration_category": torch.from_numpy(chosen.astype(np.int64)),
            },
        }

    return fit.stage("head", make, of=("head_penalty", "head_weights", "tells_plain", "plain_missed"), after=after)


def probe_of(fit: Fit, layer: int) -> Probe:
    """Probe and head as one set of scores: what the bundle holds."""
    refusal, head = fit.tensors("probe"), fit.tensors("head")
    return Probe(
        name=PROBE,
        layer=layer,
        categories=fit.head_categories,
        weight=torch.cat([refusal["weight"], head["weight"]]).to(torch.float32),
        bias=torch.cat([refusal["bias"], head["bias"]]).to(torch.float32),
    )


def read(probe: Probe, residuals: Tensor, first: int | None = None) -> tuple[Array, NDArray[np.int64]]:
    """Refusal probability [N] and category index [N] of residuals [N, D] at the probe's layer.

    Args:
        first: the category is chosen among the first so many; all where not given.
    """
    logits = probe.logits(residuals).to(torch.float64)
    head = logits[:, 1 : None if first is None else 1 + first]
    return np.asarray(torch.sigmoid(logits[:, 0]).numpy()), np.asarray(head.argmax(dim=-1).numpy())


def _labelled(prompts: Prompts, names: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Prompts of these categories, and which; a plain prompt has none of its own."""
    told = [PLAIN if prompt.kind is Kind.PLAIN else prompt.category for prompt in prompts.items]
    found = [(index, names.index(name)) for index, name in enumerate(told) if name in names]
    rows, labels = zip(*found, strict=True) if found else ((), ())
    return np.array(rows, dtype=np.int64), np.array(labels, dtype=np.int64)


def _telling_plain(head: Linear, scores: Array, groups: NDArray[np.str_], most: float) -> tuple[Linear, dict[str, Any]]:
    """The head with the bias of its last class, the plain one, raised as little as its misses allow; and what it tells.

    Args:
        scores: [N, C] of calibration prompts.
        most: share of the plain prompts of a group that may be told as another category.
    """
    margins = scores[:, -1] - scores[:, :-1].max(axis=1)
    plain = [group for group, kind in GROUP_KINDS.items() if kind == Kind.PLAIN and (groups == group).any()]
    raised = max([0.0, *(bias_missing(margins[groups == group], most) for group in plain)])
    bias = head.bias.copy()
    bias[-1] += raised
    facts = {
        "missed_at_most": most,
        "bias_raised": raised,
        "groups": {
            str(group): {
                "n": int((groups == group).sum()),
                "told before": float((margins[groups == group] > 0.0).mean()),
                "told": float((margins[groups == group] + raised > 0.0).mean()),
            }
            for group in np.unique(groups)
        },
    }
    return Linear(head.weight, bias), facts


def _scaled(linear: Linear, scores: Array, judges: Calibrating) -> tuple[Linear, dict[str, Any]]:
    """Platt scaling folded in, where it lowers the Brier score of prompts that it was not fitted on."""
    plain = calibration(probability(scores), judges.is_refused, judges.weights)
    crossed = calibration(
        scaled_out_of_fold(scores, judges.is_refused, judges.weights), judges.is_refused, judges.weights
    )
    platt = fit_platt(scores, judges.is_refused, judges.weights)
    is_better = crossed["brier"] < plain["brier"]
    facts = {
        "is_applied": is_better,
        "slope": platt.slope,
        "offset": platt.offset,
        "before": {key: plain[key] for key in ("brier", "expected_calibration_error")},
        "after, out of fold": {key: crossed[key] for key in ("brier", "expected_calibration_error")},
    }
    return (platt.applied(linear) if is_better else linear), facts


def _facts(fit: Fit, shares: Array, judges: Calibrating) -> dict[str, Any]:
    points, area = roc(shares, judges.is_refused, judges.weights)
    rate = fit.settings.false_positive_rate
    positives, negatives = int(judges.is_refused.sum()), int((~judges.is_refused).sum())
    operating = [
        _operating("youden", youden(points), positives, negatives),
        _operating(f"fpr-{100 * rate:g}", at_false_positive_rate(points, rate), positives, negatives),
    ]
    threshold = fit.settings.threshold
    if threshold is not None:
        fixed = min(points, key=lambda point: (point.threshold < threshold, point.threshold))
        operating.append(_operating("fixed", fixed._replace(threshold=threshold), positives, negatives))
    step = max(1, -(-len(points) // ROC_POINTS))
    return {
        "area": area,
        "operating_points": operating,
        "roc": [list(point) for point in [*points[:-1:step], points[-1]]],
        "calibration": calibration(shares, judges.is_refused, judges.weights),
    }


def _operating(name: str, point: Point, positives: int, negatives: int) -> dict[str, Any]:
    return {"name": name, **point._asdict(), "positives": positives, "negatives": negatives}
