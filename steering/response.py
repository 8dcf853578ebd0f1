"""The response probe: whether an answer refuses, read from the residuals of its first tokens. The torch reference.

    score = mean over the first generated tokens there are of ( w·x + b ),  probability = sigmoid(score)

x is the residual at the output of the probe's layer, before that layer's own edit, at a generated token; it comes into
being when the token is fed back, so an answer of n tokens has n - 1 of them. Knows nothing of models, files or vLLM.

Shapes: `n` tokens, `D` width of the residual stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steering.gate import Probe


def response_score(probe: Probe, residuals: Tensor, tokens: int) -> float | None:
    """Log-odds that the answer refuses; None where there is nothing to read, or nothing finite.

    Args:
        probe: with the refusal score alone.
        residuals: [n, D] at the first generated tokens, any float dtype.
        tokens: how many of them the probe reads at most.
    """
    scores = probe.logits(residuals[:tokens])[:, 0]
    scores = scores[torch.isfinite(scores)]
    return float(scores.mean()) if len(scores) else None
