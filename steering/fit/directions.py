"""Refusal directions of P1: class means, threshold, difference, largest coordinates, unit norm.

Pure tensor maths on residuals. Knows nothing of models, files, HTTP or vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steering.errors import OperatorError

TAU = 1e-3
TOP_K = 200
"""P1's values, for a residual of 4096."""


@dataclass(slots=True)
class ClassMean:
    """Running mean of residuals, summed in float64 so that the order and number of batches do not matter."""

    total: Tensor | None = None
    count: int = 0

    def add(self, residuals: Tensor) -> None:
        """Take in residuals [N, ...] of any float dtype."""
        batch = residuals.to(torch.float64).sum(dim=0)
        self.total = batch if self.total is None else self.total + batch
        self.count += int(residuals.shape[0])

    @property
    def mean(self) -> Tensor:
        """[...] float64.

        Raises:
            OperatorError: nothing was added.
        """
        if self.total is None or not self.count:
            raise OperatorError("a class of the fit has no prompts; check the data sets of its category")
        return self.total / self.count


def thresholded(mean: Tensor, tau: float = TAU) -> Tensor:
    """`mean` with every coordinate of absolute value below `tau` set to zero (P1.2 step 3)."""
    return torch.where(mean.abs() < tau, torch.zeros_like(mean), mean)


def largest(vector: Tensor, count: int) -> Tensor:
    """`vector` [D] with all but its `count` largest coordinates by absolute value set to zero (P1.2 step 4)."""
    if count >= vector.shape[-1]:
        return vector
    kept = vector.abs().topk(count).indices
    return torch.zeros_like(vector).index_copy(0, kept, vector[kept])


def difference(refused: Tensor, answered: Tensor, *, tau: float = TAU, top_k: int | None = None) -> Tensor:
    """The sparse difference of two class means [D] before it is normalised; its norm is the natural unit of a dose.

    Args:
        top_k: coordinates kept; None keeps P1's 200, which is all of a narrower residual.
    """
    kept = TOP_K if top_k is None else top_k
    return largest(thresholded(refused, tau) - thresholded(answered, tau), kept)


def unit(vector: Tensor) -> Tensor:
    """`vector` [D] at length 1, float32; the division is done in float64.

    Raises:
        OperatorError: the vector is zero or not finite: the two classes do not differ.
    """
    wide = vector.to(torch.float64)
    norm = torch.linalg.vector_norm(wide)
    if not bool(torch.isfinite(norm)) or norm.item() == 0.0:
        raise OperatorError("a direction has no length: the class means do not differ or are not finite")
    scaled: Tensor = wide / norm
    return scaled.to(torch.float32)


def random_direction(width: int, seed: int) -> Tensor:
    """A direction drawn evenly from the unit sphere [D] float32: the control of every steering experiment."""
    generator = torch.Generator().manual_seed(seed)
    return unit(torch.randn(width, generator=generator, dtype=torch.float64))
