"""What directions are like: spread over coordinates, cosines, and how far they depend on which prompts were drawn.

Pure maths on tensors (P2, §6).

Shapes: `N` prompts, `D` width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steering.fit.ridge import Ridge
from steering.fit.topic_classes import Classes
from steering.fit.topic_directions import Method, neutral_offset, topic_directions

LARGEST = 10
"""Coordinates whose share of a vector's magnitude P2 tells (1.9 % at layer 42 of Qwen3-Next-80B)."""

_SHRUNK_AWAY = 1e30
"""λ beside which no covariance counts."""


def spread(vector: Tensor) -> dict[str, float]:
    """How a vector [D] is spread over its coordinates.

    Returns:
        `largest`: share of the sum of magnitudes in the ten largest coordinates; an even vector has 10/D.
        `participation`: (Σv²)² / Σv⁴ / D, which is 1 for an even vector, 1/D for one coordinate, about 1/3 for noise.
    """
    sizes = vector.to(torch.float64).abs()
    squares = sizes.square()
    count = min(LARGEST, len(sizes))
    return {
        "largest": float(sizes.topk(count).values.sum() / sizes.sum()),
        "participation": float(squares.sum().square() / squares.square().sum() / len(sizes)),
    }


def cosines(vectors: Sequence[Tensor]) -> list[list[float]]:
    """Cosines between every two vectors [D], rounded to four places."""
    rows = torch.stack([vector.to(torch.float64) for vector in vectors])
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return [[round(float(value), 4) for value in row] for row in rows @ rows.T]


def bootstrap(
    residuals: Tensor,
    classes: Classes,
    found: Mapping[Method, Tensor],
    *,
    rounds: int,
    seed: int,
    ridges: Mapping[Method, float | None],
    is_literal: bool,
    neutral: Tensor | None = None,
) -> dict[str, dict[str, Any]]:
    """Cosines of each method's vector with those made of prompts drawn with replacement from either class.

    Args:
        residuals: [N, D] of one layer.
        found: the vectors made of all prompts, by method.
        rounds: times that prompts are drawn.
        ridges: λ of each vector, absolute, which is kept: an estimate of its own in each round would take longer than
            all else. None where there is none, or where the covariance was shrunk away.
        neutral: [M, D], prompts given as neutral.

    Returns:
        By method: mean, smallest and 5 % quantile of the cosines, and the number of rounds and prompts.
    """
    generator = torch.Generator().manual_seed(seed)
    heard: dict[Method, list[float]] = {method: [] for method in found}
    for _ in range(rounds):
        drawn = classes.resampled(generator)
        offset = neutral_offset(residuals, drawn, neutral)
        for method, vector in found.items():
            ridge = Ridge(value=ridges.get(method) or _SHRUNK_AWAY)
            made = topic_directions(
                residuals, drawn, offset=offset, methods=[method], ridge=ridge, is_literal=is_literal
            )
            heard[method].append(float(made[method].vector @ vector.to(torch.float64)))
    counts = classes.counts()
    return {
        method.value: {
            "mean": sum(values) / len(values),
            "lowest": min(values),
            "low": float(torch.quantile(torch.tensor(values, dtype=torch.float64), 0.05)),
            "rounds": rounds,
            "n": {name: counts[name] for name in ("refused", "answered")},
        }
        for method, values in heard.items()
        if values
    }
