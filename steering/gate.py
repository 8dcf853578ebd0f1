"""The gate: linear scores of a prompt, and the decision they lead to. The plain torch reference.

    scores = W·x + b        x: residual at the output of decoder block `layer`, at the last prompt token
    p = sigmoid(scores[0]),  category = argmax over the allowed ones of scores[1:]
    p >= refuse_above -> refuse,  p <= comply_below -> comply,  between -> abstain (P1.4's hard sign: both equal)

Thresholds are compared as log-odds, so that no rounding of the sigmoid decides. Knows nothing of models, files, HTTP or
vLLM.

Shapes: `T` prompts, `C` categories, `D` width of the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steering.errors import BundleFormatError
from steering.manifest import MAX_CATEGORIES
from steering.plan import Decision, GateOrder, log_odds


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """Linear scores at one layer and the last prompt token; standardisation and centring are folded in.

    Attributes:
        name: unique within a bundle.
        layer: 0-based index of the decoder block whose output is read, before that layer's own edit.
        categories: names, in the order of the rows after the first; none where the refusal score is all there is.
        weight: [1 + C, D] float32; row 0 is the refusal score, the others score a category each.
        bias: [1 + C] float32.
    """

    name: str
    layer: int
    categories: tuple[str, ...]
    weight: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise BundleFormatError(f"probe {self.name!r}: layer must be 0 or more, got {self.layer}")
        count = len(self.categories)
        if count > MAX_CATEGORIES or len(set(self.categories)) != count:
            raise BundleFormatError(
                f"probe {self.name!r} needs up to {MAX_CATEGORIES} different categories, got {list(self.categories)}"
            )
        if self.weight.dim() != 2 or self.weight.shape[0] != count + 1 or tuple(self.bias.shape) != (count + 1,):
            raise BundleFormatError(
                f"probe {self.name!r} of {count} categories needs weight [{count + 1}, D] and bias [{count + 1}], "
                f"got {tuple(self.weight.shape)} and {tuple(self.bias.shape)}"
            )
        for part, tensor in (("weight", self.weight), ("bias", self.bias)):
            if tensor.dtype != torch.float32:
                raise BundleFormatError(f"probe {self.name!r}: {part} has dtype {tensor.dtype}, needs torch.float32")
            if not bool(torch.isfinite(tensor).all()):
                raise BundleFormatError(f"probe {self.name!r}: {part} has numbers that are not finite")

    @property
    def width(self) -> int:
        """Width of the residual stream, D."""
        return int(self.weight.shape[1])

    def logits(self, residual: Tensor) -> Tensor:
        """Scores [..., 1 + C] float32 of residuals [..., D] of any float dtype."""
        device = residual.device
        return residual.to(torch.float32) @ self.weight.to(device).T + self.bias.to(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruling:
    """What a gate decided for one prompt.

    Attributes:
        decision: refuse, comply or abstain.
        category: index among the probe's categories of the best allowed one.
        share: of the plan's strength; 1 unless graded, 0 for an abstention.
    """

    decision: Decision
    category: int
    share: float


def rule(logits: Tensor, order: GateOrder, categories: tuple[str, ...]) -> Ruling | None:
    """The gate's decision on one prompt; None where a score is not finite, on which nothing can be decided.

    Args:
        logits: [1 + C] as `Probe.logits` gives them.
        order: thresholds and allowed categories.
        categories: the probe's, in order.
    """
    if not bool(torch.isfinite(logits).all()):
        return None
    allowed = set(categories if order.categories is None else order.categories)
    scored = [(float(logits[index + 1]), -index) for index, name in enumerate(categories) if name in allowed]
    category = -max(scored)[1]
    score = float(logits[0])
    low, high = log_odds(order.comply_below), log_odds(order.refuse_above)
    if score >= high:
        decision = Decision.REFUSE
    elif score <= low:
        decision = Decision.COMPLY
    else:
        return Ruling(decision=Decision.ABSTAIN, category=category, share=0.0)
    return Ruling(decision=decision, category=category, share=_share(score, decision, order))


def _share(score: float, decision: Decision, order: GateOrder) -> float:
    """How far the probability lies from its threshold, of how far it could: the graded strength."""
    if not order.is_graded:
        return 1.0
    probability = float(torch.sigmoid(torch.tensor(score)))
    if decision is Decision.REFUSE:
        room, way = 1.0 - order.refuse_above, probability - order.refuse_above
    else:
        room, way = order.comply_below, order.comply_below - probability
    return min(1.0, max(0.0, way / room)) if room > 0.0 else 1.0
