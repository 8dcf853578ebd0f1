"""Which layers a topic's edit goes to: how well projections follow the refusal confidence, and their scales (P2, §3.3).

    p_l(x) = <h_l(x) - o_l, v_l>, or <h_l(x), v_l> as printed
    s_l^+ = |Q.95(p_l | c > 0) / Q.95(c | c > 0)|,   s_l^- = |Q.05(p_l | c < 0) / Q.05(c | c < 0)|
    score_l = r_l - RMSE_l

r is Pearson's between p and c. The RMSE is over prompts whose projection has another sign than their confidence, of
p/s^± against c: in units of confidence, because residuals of different layers differ in length by orders of magnitude.
Pure maths on tensors.

Shapes: `N` validation prompts, on which no direction was made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DROPPED = 0.05
"""Share of layers, the deepest ones, that are never edited; rounded up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScore:
    """How good one method's direction is at one layer.

    Attributes:
        correlation: Pearson's r of projections and confidences; nan where either is constant.
        rmse: of projections of the wrong sign, in units of confidence; 0 without any.
        mismatches: prompts with such a projection, of `n` with a confidence that is not 0.
        refuse_scale, comply_scale: s^+ and s^-, the length of an addition at α = ±1.
    """

    layer: int
    correlation: float
    rmse: float
    mismatches: int
    n: int
    refuse_scale: float
    comply_scale: float

    @property
    def score(self) -> float:
        """R - RMSE; nan where there is no r."""
        return self.correlation - self.rmse

    def to_json(self) -> dict[str, Any]:
        """Rounded to six places; None for nan."""

        def told(value: float) -> float | None:
            return round(value, 6) if math.isfinite(value) else None

        return {
            "layer": self.layer,
            "correlation": told(self.correlation),
            "rmse": told(self.rmse),
            "score": told(self.score),
            "mismatches": self.mismatches,
            "n": self.n,
            "refuse_scale": self.refuse_scale,
            "comply_scale": self.comply_scale,
        }

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> LayerScore:
        """Read what `to_json` gave."""
        fields: dict[str, Any] = {name: math.nan if value is None else value for name, value in facts.items()}
        del fields["score"]
        return cls(**fields)


def layer_score(layer: int, projections: Tensor, confidence: Tensor) -> LayerScore:
    """Judge a direction by the projections [N] and confidences [N] of validation prompts."""
    wide, wanted = projections.to(torch.float64), confidence.to(torch.float64)
    up, down = scales(wide, wanted)
    told = torch.where(wide >= 0, wide / up, wide / down)
    wrong = (wide * wanted) < 0
    errors = (told - wanted)[wrong]
    return LayerScore(
        layer=layer,
        correlation=_pearson(wide, wanted),
        rmse=float(errors.square().mean().sqrt()) if len(errors) else 0.0,
        mismatches=int(wrong.sum()),
        n=int((wanted != 0).sum()),
        refuse_scale=up,
        comply_scale=down,
    )


def scales(projections: Tensor, confidence: Tensor) -> tuple[float, float]:
    """(s^+, s^-) of projections [N] and confidences [N]; 1 for a side that is empty or whose quotient is no number."""
    found = []
    for side, quantile in ((confidence > 0, 0.95), (confidence < 0, 0.05)):
        if not bool(side.any()):
            found.append(1.0)
            continue
        length = torch.quantile(projections[side], quantile) / torch.quantile(confidence[side], quantile)
        value = abs(float(length))
        found.append(value if math.isfinite(value) and value > 0.0 else 1.0)
    return found[0], found[1]


def ranked(scores: Sequence[LayerScore], depth: int, *, dropped: float = DROPPED) -> list[LayerScore]:
    """Layers by falling score, without the deepest ones and those without a correlation.

    Args:
        depth: of the model.
        dropped: share of its layers that is left out from the top, rounded up.
    """
    last = depth - math.ceil(dropped * depth)
    kept = [one for one in scores if one.layer < last and math.isfinite(one.score)]
    return sorted(kept, key=lambda one: (-one.score, one.layer))


def _pearson(left: Tensor, right: Tensor) -> float:
    if len(left) < 2:
        return math.nan
    first, second = left - left.mean(), right - right.mean()
    scale = float(first.square().sum().sqrt() * second.square().sum().sqrt())
    return float((first * second).sum()) / scale if scale > 0.0 else math.nan
