"""Refusal directions of P2 at one layer: MD, WMD, RMD and WRMD from residuals and refusal confidences.

    MD    v ∝ μ_P - μ_N                                                        eq. 1
    WMD   v ∝ unit(μ_P^w - o) - unit(μ_N^w - o)                                Cyberey & Evans (arXiv 2504.17130)
    RMD   v ∝ (Σ_N + λI)⁻¹ (μ_P - μ_N)                                         eq. 2
    WRMD  v ∝ (Σ_N^w + λI)⁻¹ (μ_P^w - μ_N^w)                                   eqs. 3-5

P are refused, N answered prompts, w = |c|, and o is the mean residual of neutral prompts. The offset cancels from every
difference of means, so that it matters for WMD, for repositioning edits, and for eq. 4 as printed: there a centred mean
is subtracted from a residual that is not, which makes the matrix Σ_N^w + o·oᵀ. All of it in float64.

Pure maths on tensors. Knows nothing of models, files or judges.

Shapes: `N` prompts, `D` width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from steering.errors import ActivationsNotFinite, FitError
from steering.fit.ridge import Ridge, solve
from steering.fit.topic_classes import Classes

_NAMED = 5
"""Prompts that an error names."""
_ROUNDING = 1e-12
_SAME = "{method}: refused and answered prompts have the same mean residual, so there is no direction"


class Method(StrEnum):
    """How a direction is made; see the module."""

    MD = "md"
    WMD = "wmd"
    RMD = "rmd"
    WRMD = "wrmd"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Direction:
    """One method's direction at one layer.

    Attributes:
        vector: [D] float64, unit length; towards refusal.
        ridge: λ as used, absolute; None for methods without a covariance.
        shrinkage: Ledoit-Wolf's; None where it was not asked for.
        null_share: share of the squared length that lies in the null space of the sample covariance; None where the
            covariance can have full rank, and for methods without one.
    """

    method: Method
    vector: Tensor
    ridge: float | None = None
    shrinkage: float | None = None
    null_share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Offset:
    """The neutral point o of a layer.

    Attributes:
        vector: [D] float64.
        prompts: neutral prompts it is the mean of; 0 where there were none and it lies midway between the weighted
            means of both classes.
    """

    vector: Tensor
    prompts: int


def neutral_offset(residuals: Tensor, classes: Classes, neutral: Tensor | None = None) -> Offset:
    """The mean residual of neutral prompts.

    Args:
        residuals: [N, D] of the judged prompts.
        classes: theirs.
        neutral: [M, D], residuals of prompts given as neutral; they count beside those within the band.
    """
    parts = [residuals[classes.neutral].to(torch.float64)]
    if neutral is not None:
        parts.append(neutral.to(torch.float64))
    rows = torch.cat(parts)
    if len(rows):
        return Offset(vector=rows.mean(dim=0), prompts=len(rows))
    wide = residuals.to(torch.float64)
    refused = _mean(wide[classes.refused], classes.weights[classes.refused])
    answered = _mean(wide[classes.answered], classes.weights[classes.answered])
    return Offset(vector=(refused + answered) / 2, prompts=0)


def topic_directions(
    residuals: Tensor,
    classes: Classes,
    *,
    offset: Offset | None = None,
    methods: Iterable[Method] = Method,
    ridge: Ridge | None = None,
    is_literal: bool = False,
) -> dict[Method, Direction]:
    """Each method's direction at one layer.

    Args:
        residuals: [N, D], any float dtype, finite (`require_finite`). Not modified.
        classes: the prompts' classes; indices may repeat, as in a bootstrap.
        offset: the neutral point; by default that of these prompts.
        ridge: λ of RMD and WRMD; P2's absolute 1e-2 by default.
        is_literal: eq. 4 as printed, with o·oᵀ in WRMD's covariance.

    Raises:
        FitError: the class means do not differ, or λ is too small; see `steering.fit.ridge.solve`.
    """
    ridge = ridge or Ridge()
    refused = residuals[classes.refused].to(torch.float64)
    answered = residuals[classes.answered].to(torch.float64)
    weights = classes.weights
    refused_weights, answered_weights = weights[classes.refused], weights[classes.answered]
    point = (offset or neutral_offset(residuals, classes)).vector
    found: dict[Method, Direction] = {}
    for method in methods:
        is_weighted = method in (Method.WMD, Method.WRMD)
        above = _mean(refused, refused_weights) if is_weighted else refused.mean(dim=0)
        below = _mean(answered, answered_weights) if is_weighted else answered.mean(dim=0)
        if method is Method.WMD:
            above, below = _unit(above - point, method), _unit(below - point, method)
        vector = above - below
        # Means of equal rows differ by rounding, which is no direction.
        if float(torch.linalg.vector_norm(vector)) <= _ROUNDING * float(torch.linalg.vector_norm(above)):
            raise FitError(_SAME.format(method=method))
        if method in (Method.RMD, Method.WRMD):
            shares = answered_weights if is_weighted else torch.ones_like(answered_weights)
            rows = (answered - below) * (shares / shares.sum()).sqrt().unsqueeze(1)
            extra = point if is_literal and method is Method.WRMD else None
            solved = solve(rows, vector, ridge, extra=extra)
            found[method] = Direction(
                method=method,
                vector=_unit(solved.vector, method),
                ridge=solved.ridge,
                shrinkage=solved.shrinkage,
                null_share=solved.null_share,
            )
        else:
            found[method] = Direction(method=method, vector=_unit(vector, method))
    return found


def require_finite(residuals: Tensor, layer: int, names: Sequence[str]) -> None:
    """Raises ActivationsNotFinite, naming layer and prompts, where residuals [N, D] hold NaN or infinity."""
    bad = torch.nonzero(~torch.isfinite(residuals).all(dim=1)).flatten().tolist()
    if not bad:
        return
    named = ", ".join(repr(names[row]) for row in bad[:_NAMED]) + (", ..." if len(bad) > _NAMED else "")
    raise ActivationsNotFinite(
        f"layer {layer}: residuals of {len(bad)} of {len(names)} prompts hold NaN or infinity ({named}); half "
        "precision overflows in some models: capture in bfloat16 or float32 (--engine dtype), or leave these out"
    )


def null_space_warning(rows: int, width: int, shares: Iterable[float | None]) -> str | None:
    """What it means that there are fewer answered prompts than coordinates; None where there are not."""
    if rows >= width:
        return None
    known = [share for share in shares if share is not None]
    lies = f" ({100 * min(known):.2f} to {100 * max(known):.2f} % of its squared length)" if known else ""
    return (
        f"{rows} answered prompts are fewer than the {width} coordinates of the residual: their covariance is "
        f"singular, and with a small absolute lambda RMD and WRMD lie almost wholly in its null space{lies}, along "
        "which answered prompts do not vary at all in this sample; prefer --ridge relative or --ridge ledoit-wolf, or "
        "give more answered prompts"
    )


def _mean(rows: Tensor, weights: Tensor) -> Tensor:
    return (rows * weights.unsqueeze(1)).sum(dim=0) / weights.sum()


def _unit(vector: Tensor, method: Method) -> Tensor:
    length = torch.linalg.vector_norm(vector)
    if not bool(torch.isfinite(length)) or float(length) == 0.0:
        raise FitError(_SAME.format(method=method))
    scaled: Tensor = vector / length
    return scaled
