"""Edits of a topic: one direction at each of several layers, with one shared α (P2, §3.2).

    additive    h' = h + α s_l(α) v_l
    reposition  h' = h - <h - o_l, v_l> v_l + α s_l(α) v_l

α < 0 removes refusal and takes s_l^-, α > 0 induces it and takes s_l^+. Knows nothing of how directions are made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from steering.errors import FitError
from steering.fit.topic_layers import LayerScore
from steering.terms import Edit, added_direction, repositioned_direction


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerPart:
    """What an edit needs to know of one layer.

    Attributes:
        score: with the layer and its scales.
        vector: [D], unit length, towards refusal.
        offset: <o_l, v_l>, where the neutral point lies along the vector.
    """

    score: LayerScore
    vector: Tensor
    offset: float


def topic_edit(name: str, parts: Iterable[LayerPart], alpha: float, *, is_reposition: bool = False) -> Edit:
    """The edit at strength 1.

    An additive edit at strength t is the one at t·α, so that many doses share one edit. A repositioning edit is not:
    at strength t it goes t of the way to its target.

    Raises:
        FitError: no layers, or α is 0.
    """
    ordered = sorted(parts, key=lambda part: part.score.layer)
    if not ordered or alpha == 0.0:
        raise FitError(
            f"edit {name!r} needs at least one layer and an alpha that is not 0; got {len(ordered)}, {alpha}"
        )
    terms = []
    for part in ordered:
        length = alpha * (part.score.refuse_scale if alpha > 0 else part.score.comply_scale)
        if is_reposition:
            target = part.offset + length
            terms.append(repositioned_direction(layer=part.score.layer, direction=part.vector, target=target))
        else:
            terms.append(added_direction(layer=part.score.layer, direction=part.vector, coefficient=length))
    return Edit(name=name, layers=tuple(terms))
