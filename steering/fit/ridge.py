"""Ridge-regularised covariances: (Σ + λI)⁻¹ m by Cholesky or by the Woodbury identity, whichever is smaller.

Pure float64 maths on tensors. Knows nothing of prompts, layers or refusals.

Shapes: `n` rows, `D` width of the residual stream; Σ = rowsᵀ·rows, so that rows are centred and scaled already.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from steering.errors import FitError

_JITTER = 1e-12
"""Of the mean of the Gram matrix's diagonal: centred rows make it singular in one direction at least."""


class RidgeKind(StrEnum):
    """What λ is measured in.

    `ABSOLUTE` takes it as it is (P2: 1e-2). `RELATIVE` is in units of tr(Σ)/D, which means the same at every layer.
    `LEDOIT_WOLF` shrinks by scikit-learn's estimate: δ of tr(Σ)/D·I and 1 - δ of Σ, which is λ = δ/(1 - δ)·tr(Σ)/D.
    """

    ABSOLUTE = "absolute"
    RELATIVE = "relative"
    LEDOIT_WOLF = "ledoit-wolf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ridge:
    """How a covariance is kept from being singular; `value` is not used by Ledoit-Wolf."""

    kind: RidgeKind = RidgeKind.ABSOLUTE
    value: float = 1e-2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value > 0):
            raise FitError(f"lambda must be a finite number above 0, got {self.value}")


class Solved(NamedTuple):
    """(Σ + λI)⁻¹ m and how it came about.

    Attributes:
        vector: [D] float64, not normalised.
        ridge: λ as used, absolute; infinite where Ledoit-Wolf shrinks the covariance away.
        shrinkage: Ledoit-Wolf's δ; None for the other kinds.
        null_share: share of the squared length of `vector` that lies where Σ is zero; None where n >= D.
    """

    vector: Tensor
    ridge: float
    shrinkage: float | None
    null_share: float | None


def solve(rows: Tensor, target: Tensor, ridge: Ridge, *, extra: Tensor | None = None) -> Solved:
    """(Σ + λI)⁻¹ · target for Σ = rowsᵀ·rows.

    Args:
        rows: [n, D] float64, centred, each times the square root of its share of the weights. Not modified.
        target: [D] float64.
        ridge: of what λ is made; its trace and Ledoit-Wolf's δ are those of `rows` alone.
        extra: [D], adds extra·extraᵀ to Σ (P2's literal eq. 4).

    Raises:
        FitError: Σ + λI is not positive definite in float64: λ is too small for these residuals.
    """
    width = rows.shape[1]
    level = float(rows.square().sum()) / width
    kind = ridge.kind
    shrinkage: float | None = None
    if kind is RidgeKind.LEDOIT_WOLF:
        shrinkage = ledoit_wolf(rows)
        strength = shrinkage / (1.0 - shrinkage) * level if shrinkage < 1.0 else math.inf
    else:
        strength = ridge.value * (level if kind is RidgeKind.RELATIVE else 1.0)
    if not math.isfinite(strength):
        return Solved(target.clone(), strength, shrinkage, _null_share(rows, target))
    stacked = rows if extra is None else torch.cat([rows, extra.reshape(1, -1)])
    if strength <= 0.0:  # all rows equal, and λ relative to nothing
        return Solved(target.clone(), 0.0, shrinkage, _null_share(rows, target))
    if len(stacked) < width:
        gram = stacked @ stacked.T
        factor = _cholesky(gram.clone(), strength)
        inside = torch.cholesky_solve((stacked @ target).unsqueeze(1), factor).squeeze(1)
        vector = (target - stacked.T @ inside) / strength
        return Solved(vector, strength, shrinkage, _null_share(stacked, vector, gram))
    factor = _cholesky(stacked.T @ stacked, strength)
    return Solved(torch.cholesky_solve(target.unsqueeze(1), factor).squeeze(1), strength, shrinkage, None)


def ledoit_wolf(rows: Tensor) -> float:
    """Ledoit and Wolf's shrinkage of rowsᵀ·rows, by scikit-learn, from 0 to 1.

    Rows [n, D] are scaled so that their squares sum to a covariance. Where prompts weigh differently they stand for
    prompts that weigh alike, which their estimate assumes.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    scaled = rows * math.sqrt(len(rows))
    if not bool(scaled.any()):
        return 0.0
    return min(1.0, max(0.0, float(ledoit_wolf_shrinkage(scaled.numpy(), assume_centered=True))))


def _cholesky(matrix: Tensor, strength: float) -> Tensor:
    matrix.diagonal().add_(strength)
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        raise FitError(
            f"lambda {strength:g} is lost in a covariance of size {float(matrix.diagonal().mean()):g}: their sum is "
            "singular in float64; take a larger --lambda, --ridge relative or --ridge ledoit-wolf"
        )
    return factor


def _null_share(rows: Tensor, vector: Tensor, gram: Tensor | None = None) -> float | None:
    """1 - |projection of `vector` on the span of `rows`|² / |vector|²; None where the rows may span everything."""
    count, width = rows.shape
    length = float(vector.square().sum())
    if count >= width or length == 0.0:
        return None
    gram = rows @ rows.T if gram is None else gram
    level = float(gram.diagonal().mean())
    if level == 0.0:
        return 1.0
    gram.diagonal().add_(_JITTER * level)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        return None
    read = (rows @ vector).unsqueeze(1)
    inside = float((read * torch.cholesky_solve(read, factor)).sum())
    return min(1.0, max(0.0, 1.0 - inside / length))
