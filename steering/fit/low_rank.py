"""P1's Algorithm 2: a steering vector learned in a whitened orthonormal basis of the category directions.

    W = (Σ + ε I)^{-1/2}                       ZCA whitening by the covariance of benign residuals
    W H = Q R                                  H: the category directions; Q is the steering basis
    s = U (Vᵀ z)                               U, V start as Q; all three are trained; s is one vector
    loss = -log p_steer(refusal | harmful) + λ KL(p_base ‖ p_steer)(benign)

Shapes: `C` categories, `D` width of the residual stream, `B` prompts of one batch, `V` vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from steering.errors import OperatorError
from steering.fit.activations import LoadedModel, added_in_training
from steering.fit.openings import Openings, reading, refusal_log_probability
from steering.fit.passes import Sequences, passes


class Covariance(StrEnum):
    """How the covariance of benign residuals is kept from being singular.

    `PAPER` adds ε as printed, whatever the scale of the residuals; `RELATIVE` adds ε times the mean variance;
    `LEDOIT_WOLF` shrinks towards a multiple of the identity by as much as the sample asks for.
    """

    PAPER = "paper"
    RELATIVE = "relative"
    LEDOIT_WOLF = "ledoit-wolf"


class Whitening(NamedTuple):
    """The symmetric whitening matrix [D, D] float64, what was added to the variances, and how far they were shrunk."""

    matrix: Tensor
    added: float
    shrinkage: float


def whitening(residuals: Tensor, method: Covariance, epsilon: float) -> Whitening:
    """ZCA whitening by the centred covariance of residuals [N, D]."""
    wide = residuals.to(torch.float64)
    wide = wide - wide.mean(dim=0)
    covariance = wide.T @ wide / max(1, len(wide))
    added, shrinkage = 0.0, 0.0
    if method is Covariance.LEDOIT_WOLF:
        from sklearn.covariance import ledoit_wolf_shrinkage

        shrinkage = float(ledoit_wolf_shrinkage(np.asarray(wide), assume_centered=True))
        mean = covariance.diagonal().mean()
        covariance = (1.0 - shrinkage) * covariance
        covariance.diagonal().add_(shrinkage * mean)
    else:
        added = epsilon if method is Covariance.PAPER else epsilon * float(covariance.diagonal().mean())
        covariance.diagonal().add_(added)
    values, vectors = torch.linalg.eigh(covariance)
    if float(values[0]) <= 0.0:
        raise OperatorError(
            f"the covariance of benign residuals is singular (smallest eigenvalue {float(values[0]):.3g}) and "
            f"{method} does not lift it; take --covariance ledoit-wolf or relative"
        )
    return Whitening(vectors @ torch.diag(values.rsqrt()) @ vectors.T, added, shrinkage)


def steering_basis(matrix: Tensor, directions: Tensor) -> Tensor:
    """Q [D, C] float64, orthonormal columns: reduced QR of the whitened category directions [C, D]."""
    basis: Tensor = torch.linalg.qr(matrix @ directions.to(torch.float64).T, mode="reduced").Q
    return basis


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How the vector is trained; the defaults are P1's.

    Attributes:
        rate: of AdamW.
        epochs: passes over the benign prompts; harmful ones are cycled.
        batch: prompts of either kind per step; they are of one length each.
        clip: most norm of a gradient.
        divergence: weight of the KL term.
        spread: standard deviation of z at the start; Algorithm 2 prints 1, P1's code has 0.01.
    """

    rate: float = 1e-5
    epochs: int = 5
    batch: int = 1
    clip: float = 1.0
    divergence: float = 1.0
    spread: float = 0.01


class LowRankVector(nn.Module):
    """U, V [D, C] and z [D]; the vector is U Vᵀ z."""

    def __init__(self, basis: Tensor, *, spread: float, seed: int) -> None:
        super().__init__()
        start = basis.to(torch.float32)
        generator = torch.Generator().manual_seed(seed)
        self.outer = nn.Parameter(start.clone())
        self.inner = nn.Parameter(start.clone())
        self.latent = nn.Parameter(spread * torch.randn(start.shape[0], generator=generator))

    def forward(self) -> Tensor:
        """The vector s [D]."""
        return self.outer @ (self.inner.T @ self.latent)


class Trained(NamedTuple):
    """The exported vector s [D] float32, and the mean losses of each epoch."""

    vector: Tensor
    history: list[dict[str, float]]


def train(
    loaded: LoadedModel,
    openings: Openings,
    *,
    layer: int,
    basis: Tensor,
    harmful: Sequences,
    benign: Sequences,
    training: Training,
    scale: float = 1.0,
    seed: int = 0,
    say: Callable[[str], None] = lambda _line: None,
) -> Trained:
    """Train U, V and z with the base model frozen, the vector added at the last prompt token of one block's output.

    Args:
        basis: [D, C] from `steering_basis`.
        scale: strength while training; P1's is 1.
    """
    if not harmful or not benign:
        raise OperatorError("a low-rank vector needs harmful and benign prompts to train on")
    module = LowRankVector(basis, spread=training.spread, seed=seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=training.rate)
    history = []
    cycled = itertools.cycle(_batches(loaded, harmful, training.batch, seed))
    for epoch in range(training.epochs):
        refusal_sum, divergence_sum, steps = 0.0, 0.0, 0
        for chosen in _batches(loaded, benign, training.batch, seed):
            vector = scale * module()
            refusal = -_refusal(loaded, openings, layer, vector, next(cycled))
            divergence = _divergence(loaded, layer, vector, chosen)
            loss = refusal + training.divergence * divergence
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(module.parameters(), training.clip)
            optimizer.step()
            refusal_sum += float(refusal.detach())
            divergence_sum += float(divergence.detach())
            steps += 1
        history.append({"refusal": refusal_sum / steps, "divergence": divergence_sum / steps, "steps": float(steps)})
        say(f"  epoch {epoch}: refusal {history[-1]['refusal']:.4f}, divergence {history[-1]['divergence']:.4f}")
    vector = module().detach()
    if not bool(torch.isfinite(vector).all()):
        raise OperatorError(f"training of the low-rank vector diverged; lower its rate (it was {training.rate})")
    return Trained(vector, history)


def _batches(loaded: LoadedModel, sequences: Sequences, most: int, seed: int) -> list[Sequence[Sequence[int]]]:
    """Groups of one length in an order that the seed gives."""
    groups = [[sequences[index] for index in indices] for indices, _ in passes(loaded, sequences, most, logits=2)]
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    return [groups[index] for index in order]


def _refusal(loaded: LoadedModel, openings: Openings, layer: int, vector: Tensor, prompts: Sequences) -> Tensor:
    """Mean log-probability of a refusal, with the vector added."""
    return refusal_log_probability(
        loaded, prompts, openings, lambda tail: added_in_training(loaded, layer, vector, tail=tail)
    ).mean()


def _divergence(loaded: LoadedModel, layer: int, vector: Tensor, prompts: Sequences) -> Tensor:
    """Mean KL(p_base ‖ p_steer) of the next token."""
    ids = torch.tensor([list(prompt) for prompt in prompts], device=loaded.model.device)
    with torch.no_grad():
        base = reading(loaded, ids, lambda _tail: nullcontext())(())[:, 0]
    steered = reading(loaded, ids, lambda tail: added_in_training(loaded, layer, vector, tail=tail))(())[:, 0]
    return nn.functional.kl_div(steered, base, log_target=True, reduction="batchmean")
