"""AlphaSteer's map (arXiv 2506.07022): pushes harmful prompts towards refusal and leaves benign residuals alone.

    P = U Uᵀ, U: eigenvectors of the smallest eigenvalues of H_b H_bᵀ, uncentred
    Δ = R H_mᵀ P (P H_m H_mᵀ P + a P)^+        a ridge map from what P leaves of a harmful residual to a refusal vector
    x' = x + strength · Δ x

Inside the span of U the pseudo-inverse is a plain inverse, which is how it is computed. Pure tensor maths.

Shapes: `N` prompts, `C` targets, `D` width of the residual stream, `K` directions kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

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


class Factors(NamedTuple):
    """Δ as Σ_r gain_r · write_r read_rᵀ in float64; reads [R, D] and writes [R, D] are orthonormal."""

    read: Tensor
    write: Tensor
    gain: Tensor


def null_space_map(harmful: Tensor, kinds: Sequence[int], targets: Tensor, basis: Tensor, ridge: float) -> Factors:
    """The map Δ by its singular value decomposition; its rank is at most that of the targets.

    Everything is as thin as the targets are few: neither Δ nor a target per prompt is ever made.

    Args:
        harmful: [N, D] residuals of prompts to refuse.
        kinds: [N], which of the targets is to be added to each of them.
        targets: [C, D].
        basis: [D, K] from `near_null_basis`.
        ridge: a of the formula; the larger, the weaker the push.
    """
    seen = harmful.to(torch.float64) @ basis
    inner = seen.T @ seen
    inner.diagonal().add_(ridge)
    sums = torch.zeros(len(targets), seen.shape[1], dtype=torch.float64)
    sums.index_add_(0, torch.as_tensor(kinds), seen)
    read, read_part = torch.linalg.qr(basis @ torch.linalg.solve(inner, sums.T))
    write, write_part = torch.linalg.qr(targets.to(torch.float64).T)
    left, gain, right = torch.linalg.svd(write_part @ read_part.T)
    return Factors(right @ read.T, (write @ left).T, gain)
