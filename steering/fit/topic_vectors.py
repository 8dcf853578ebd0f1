"""Stages `vectors`, `layers` and `analysis` of a topic fit: directions at every layer, their ranking, their looks.

Directions are made of fitting prompts; layers are ranked and scaled on calibration prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.errors import TooFewPrompts
from steering.fit.sources import Use
from steering.fit.stages import Result
from steering.fit.topic_analysis import bootstrap, cosines, spread
from steering.fit.topic_answers import Measured
from steering.fit.topic_classes import Classes, classes_of
from steering.fit.topic_directions import (
    Method,
    neutral_offset,
    null_space_warning,
    require_finite,
    topic_directions,
)
from steering.fit.topic_edits import LayerPart
from steering.fit.topic_fit import TopicFit
from steering.fit.topic_layers import LayerScore, layer_score, ranked
from steering.fit.topic_prompts import Role

JUDGED = (Role.REFUSED, Role.ANSWERED)
"""Roles whose prompts directions are made of; which class each is in, its confidence says."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Vectors:
    """Directions and neutral points of every layer, with their scores.

    Attributes:
        vectors: by method, [L, D] float64.
        offsets: [L, D] float64.
        scores: by method, one a layer, in order.
        depth: L.
        facts: the results of both stages.
    """

    vectors: Mapping[Method, Tensor]
    offsets: Tensor
    scores: Mapping[Method, tuple[LayerScore, ...]]
    depth: int
    facts: tuple[Result, Result]

    def parts(self, method: Method, layers: Iterable[int]) -> list[LayerPart]:
        """What edits of these layers are made of."""
        return [
            LayerPart(
                score=self.scores[method][layer],
                vector=self.vectors[method][layer],
                offset=float(self.offsets[layer] @ self.vectors[method][layer]),
            )
            for layer in layers
        ]

    def ranking(self, method: Method, *, at_least: int = 0) -> list[LayerScore]:
        """Layers by falling score, none before `at_least`."""
        return [one for one in ranked(self.scores[method], self.depth) if one.layer >= at_least]


def make_vectors(fit: TopicFit, measured: Measured) -> Vectors:
    """Run or read both stages."""
    settings = fit.settings
    made = fit.stage(
        "vectors",
        lambda: _vectors(fit, measured),
        of=("methods", "ridge", "is_literal", "band", "least"),
        after=measured.facts,
    )
    if made["warning"]:
        fit.say(f"warning: {made['warning']}")
    tensors = fit.tensors("vectors")
    vectors = {method: tensors[method.value] for method in settings.methods}
    offsets = tensors["offset"]
    scored = fit.stage(
        "layers", lambda: _layers(fit, measured, vectors, offsets), of=("methods", "is_centred"), after=[made]
    )
    scores = {
        method: tuple(LayerScore.from_json(facts) for facts in scored["layers"][method.value])
        for method in settings.methods
    }
    return Vectors(vectors=vectors, offsets=offsets, scores=scores, depth=fit.depth, facts=(made, scored))


def analyse(fit: TopicFit, measured: Measured, vectors: Vectors, layers: Iterable[int]) -> Result:
    """Spread, cosines and stability (P2, §6).

    Args:
        layers: those whose stability is looked at; making a vector anew takes a solve a round.
    """
    chosen = sorted(set(layers))
    return fit.stage(
        "analysis",
        lambda: _analysis(fit, measured, vectors, chosen),
        of=("bootstrap", "is_literal", "band", "least"),
        after=vectors.facts,
        given={"layers": chosen},
    )


def fitting_classes(fit: TopicFit, measured: Measured) -> tuple[list[int], Classes]:
    """Rows of the prompts that directions are made of, and their classes."""
    rows = measured.rows(JUDGED, [Use.FIT])
    return rows, classes_of(measured.confidence[rows], band=fit.settings.band, least=fit.settings.least)


def _vectors(fit: TopicFit, measured: Measured) -> Result:
    settings = fit.settings
    rows, classes = fitting_classes(fit, measured)
    neutral = measured.rows([Role.NEUTRAL], Use, is_judged=False)
    names = [measured.names[row] for row in rows]
    stacked: dict[Method, list[Tensor]] = {method: [] for method in settings.methods}
    offsets, norms, facts = [], [], []
    from_prompts = 0
    for layer in range(fit.depth):
        everything = measured.residuals.layer(layer)
        residuals = everything[rows]
        require_finite(residuals, layer, names)
        offset = neutral_offset(residuals, classes, everything[neutral] if neutral else None)
        found = topic_directions(
            residuals,
            classes,
            offset=offset,
            methods=settings.methods,
            ridge=settings.ridge,
            is_literal=settings.is_literal,
        )
        for method, direction in found.items():
            stacked[method].append(direction.vector)
        offsets.append(offset.vector)
        from_prompts = offset.prompts
        norms.append(float(torch.linalg.vector_norm(residuals.to(torch.float64), dim=1).mean()))
        facts.append(
            {
                method.value: {"ridge": _finite(one.ridge), "shrinkage": one.shrinkage, "null_share": one.null_share}
                for method, one in found.items()
                if one.ridge is not None
            }
        )
    shares = [one["null_share"] for by_method in facts for one in by_method.values()]
    has_covariance = any(facts)
    return {
        "classes": classes.counts(),
        "neutral_prompts": from_prompts,
        "residual_norm": norms,
        "ridges": facts,
        "warning": null_space_warning(len(classes.answered), fit.width, shares) if has_covariance else None,
        "tensors": {
            **{method.value: torch.stack(made) for method, made in stacked.items()},
            "offset": torch.stack(offsets),
        },
    }


def _finite(value: float | None) -> float | None:
    """JSON has no infinity; shrinkage says then that nothing is left of the covariance."""
    return value if value is not None and math.isfinite(value) else None


def _layers(fit: TopicFit, measured: Measured, vectors: Mapping[Method, Tensor], offsets: Tensor) -> Result:
    rows = measured.rows(JUDGED, [Use.CALIBRATE])
    confidence = measured.confidence[rows]
    sides = {"refused": int((confidence > 0).sum()), "answered": int((confidence < 0).sum())}
    if not all(sides.values()):
        raise TooFewPrompts(
            f"layers are ranked on calibration prompts of both kinds, here are {sides}; give more prompts"
        )
    told: dict[str, list[dict[str, Any]]] = {method.value: [] for method in vectors}
    for layer in range(fit.depth):
        residuals = measured.residuals.layer(layer)[rows].to(torch.float64)
        if fit.settings.is_centred:
            residuals = residuals - offsets[layer]
        for method, stacked in vectors.items():
            told[method.value].append(layer_score(layer, residuals @ stacked[layer], confidence).to_json())
    return {
        "layers": told,
        "prompts": sides,
        "ranking": {
            method: [one.layer for one in ranked([LayerScore.from_json(facts) for facts in by_layer], fit.depth)]
            for method, by_layer in told.items()
        },
    }


def _analysis(fit: TopicFit, measured: Measured, vectors: Vectors, layers: list[int]) -> Result:
    settings = fit.settings
    methods = tuple(settings.methods)
    rows, classes = fitting_classes(fit, measured)
    neutral = measured.rows([Role.NEUTRAL], Use, is_judged=False)
    ridges = vectors.facts[0]["ridges"]
    stability = {}
    for layer in layers if settings.bootstrap else ():
        everything = measured.residuals.layer(layer)
        stability[str(layer)] = bootstrap(
            everything[rows],
            classes,
            {method: vectors.vectors[method][layer] for method in methods},
            rounds=settings.bootstrap,
            seed=settings.seed + layer,
            ridges={method: ridges[layer].get(method.value, {}).get("ridge") for method in methods},
            is_literal=settings.is_literal,
            neutral=everything[neutral] if neutral else None,
        )
    return {
        "spread": {
            method.value: [spread(vectors.vectors[method][layer]) for layer in range(fit.depth)] for method in methods
        },
        "even": 10 / fit.width,
        "methods": {
            "names": [method.value for method in methods],
            "by_layer": [cosines([vectors.vectors[method][layer] for method in methods]) for layer in range(fit.depth)],
        },
        "layers": {method.value: cosines(list(vectors.vectors[method])) for method in methods},
        "stability": stability,
    }
