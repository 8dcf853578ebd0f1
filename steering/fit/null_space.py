"""AlphaSteer's map (arXiv 2506.07022): pushes harmful prompts towards refusal and leaves benign residuals alone.

    P = U Uᵀ, U: eigenvectors of the smallest eigenvalues of H_b H_bᵀ, uncentred
    Δ = R H_mᵀ P (P H_m H_mᵀ P + a P)^+        a ridge map from what P leaves of a harmful residual to a refusal vector
    x' = x + strength · Δ x

Inside the span of U the pseudo-inverse is a plain inverse, which is how it is computed. Pure tensor maths.

Shapes: `N` prompts, `D` width of the residual stream, `K` directions kept.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from steering.errors import OperatorError


def gram(batches: Iterable[Tensor]) -> Tensor:
    """Sum of x xᵀ over residuals given as batches [n, D]: [D, D] float64, uncentred."""
    total: Tensor | None = None
    for batch in batches:
        wide = batch.to(torch.float64)
        part = wide.T @ wide
        total = part if total is None else total.add_(part)
    if total is None:
        raise OperatorError("a null space needs residuals of benign prompts; there are none")
    return total


def near_null_basis(benign: Tensor, share: float) -> Tensor:
    """Eigenvectors [D, K] float64 of the smallest eigenvalues of `benign` [D, D]: a share of all directions."""
    if not 0.0 < share < 1.0:
        raise OperatorError(f"the share of directions kept as null space must lie between 0 and 1, got {share}")
    count = max(1, round(share * benign.shape[0]))
    basis: Tensor = torch.linalg.eigh(benign).eigenvectors[:, :count]
    return basis


def null_space_map(harmful: Tensor, targets: Tensor, basis: Tensor, ridge: float) -> Tensor:
    """The map Δ [D, D] float64; its rank is at most that of the targets.

    Args:
        harmful: [N, D] residuals of prompts to refuse.
        targets: [N, D], what is to be added to each of them.
        basis: [D, K] from `near_null_basis`.
        ridge: a of the formula; the larger, the weaker the push.
    """
    seen = harmful.to(torch.float64) @ basis
    inner = seen.T @ seen
    inner.diagonal().add_(ridge)
    solved: Tensor = torch.linalg.solve(inner, seen.T @ targets.to(torch.float64))
    return (basis @ solved).T
