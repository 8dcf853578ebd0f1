"""Stages `gate` and `induce_gate`: the probes by which a topic's profiles decide for each prompt.

The removal gate's score is the log-odds that a refusal should stand, because the prompt is harmful or not on the topic;
the induction gate's is that of a prompt to be refused being on the topic. Each reads the first layer that tells its
prompts about as well as the best does, so that most layers are left for edits, which cannot begin before their gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from steering.fit.probes import Array, Mask, balanced, calibration, fit_platt, fit_refusal, probability, roc, youden
from steering.fit.sources import Use
from steering.fit.stages import Result
from steering.fit.topic_answers import Measured
from steering.fit.topic_fit import TopicFit
from steering.fit.topic_prompts import Role
from steering.fit.topic_vectors import Vectors
from steering.gate import Probe

REMOVAL, INDUCTION = "topic", "induced-topic"
"""Names of the probes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopicGate:
    """A fitted probe; `facts` is what its stage gave."""

    probe: Probe
    facts: Result

    @property
    def layer(self) -> int:
        """Where it decides."""
        return self.probe.layer

    def probabilities(self, measured: Measured, rows: Sequence[int]) -> Array:
        """[N] of these rows."""
        logits = self.probe.logits(measured.residuals.layer(self.layer)[list(rows)])
        return probability(logits[:, 0].to(torch.float64).numpy())


def removal_gate(fit: TopicFit, measured: Measured, vectors: Vectors) -> TopicGate | str:
    """The gate of removal, or why there is none."""
    if not fit.settings.has_gate:
        return "no gate was asked for"
    stand, topic = [Role.SAFETY, Role.ANSWERED], [Role.REFUSED]
    if not measured.rows([Role.SAFETY], [Use.FIT]) or not measured.rows([Role.SAFETY], [Use.CALIBRATE]):
        return "without --safety there is nothing that says which refusals are to stand"
    return _gate(fit, measured, vectors, "gate", REMOVAL, stand, topic)


def induction_gate(fit: TopicFit, measured: Measured, vectors: Vectors) -> TopicGate | str:
    """The gate of induction, or why there is none."""
    if not fit.settings.has_gate:
        return "no gate was asked for"
    found = [len(measured.rows([Role.INDUCED], [use])) for use in (Use.FIT, Use.CALIBRATE)]
    if min(found) < fit.settings.least:
        return (
            f"--induced gives {found[0]} prompts to fit and {found[1]} to calibrate on, {fit.settings.least} are needed"
        )
    return _gate(fit, measured, vectors, "induce_gate", INDUCTION, [Role.INDUCED], [Role.ANSWERED])


def _gate(
    fit: TopicFit,
    measured: Measured,
    vectors: Vectors,
    stage: str,
    name: str,
    above: Sequence[Role],
    below: Sequence[Role],
) -> TopicGate:
    found = fit.stage(
        stage,
        lambda: _fitted(fit, measured, vectors, above, below),
        of=("penalty", "probe_tolerance", "band"),
        after=[*measured.facts, *vectors.facts],
    )
    tensors = fit.tensors(stage)
    probe = Probe(
        name=name,
        layer=int(found["layer"]),
        categories=(fit.settings.category,),
        # One category needs no telling: its score is always the highest.
        weight=torch.cat([tensors["weight"], torch.zeros_like(tensors["weight"])]),
        bias=torch.cat([tensors["bias"], torch.zeros_like(tensors["bias"])]),
    )
    return TopicGate(probe=probe, facts=found)


def _rows(fit: TopicFit, measured: Measured, roles: Sequence[Role], use: Use) -> list[int]:
    """Answered prompts that the model does not answer belong to neither side."""
    band = fit.settings.band
    return [
        row
        for row in measured.rows(roles, [use], is_judged=False)
        if measured.items[row].role is not Role.ANSWERED or float(measured.confidence[row]) < -band
    ]


def _fitted(
    fit: TopicFit, measured: Measured, vectors: Vectors, above: Sequence[Role], below: Sequence[Role]
) -> Result:
    settings = fit.settings
    sides: dict[Use, tuple[list[int], Mask, NDArray[np.str_]]] = {}
    for use in (Use.FIT, Use.CALIBRATE):
        first, second = _rows(fit, measured, above, use), _rows(fit, measured, below, use)
        rows = first + second
        is_above = np.array([True] * len(first) + [False] * len(second), dtype=bool)
        sides[use] = (rows, is_above, np.array([measured.items[row].source for row in rows], dtype=np.str_))
    rows, is_above, sources = sides[Use.FIT]
    held, held_above, held_sources = sides[Use.CALIBRATE]
    weights, held_weights = balanced(sources, is_above), balanced(held_sources, held_above)
    # A gate after the last layer that may be edited would have nothing to choose.
    last = max(one.layer for method in settings.methods for one in vectors.ranking(method))
    areas, fitted = [], {}
    for layer in range(last + 1):
        residuals = measured.residuals.layer(layer)
        linear = fit_refusal(residuals[rows], is_above, weights, penalty=settings.penalty)
        scores = linear.scores(residuals[held])[:, 0]
        areas.append(roc(probability(scores), held_above, held_weights)[1])
        fitted[layer] = (linear, scores)
    layer = next(index for index, area in enumerate(areas) if area >= max(areas) - settings.probe_tolerance)
    linear, scores = fitted[layer]
    platt = fit_platt(scores, held_above, held_weights)
    scaled = platt.applied(linear)
    told = probability(platt.slope * scores + platt.offset)
    points, area = roc(told, held_above, held_weights)
    best = youden(points)
    return {
        "layer": layer,
        "layers": [{"layer": index, "area": value} for index, value in enumerate(areas)],
        "area": area,
        "operating_points": [
            {
                "name": "youden",
                "threshold": best.threshold,
                "true_positive_rate": best.true_positive_rate,
                "false_positive_rate": best.false_positive_rate,
                "positives": int(held_above.sum()),
                "negatives": int((~held_above).sum()),
            }
        ],
        "calibration": calibration(told, held_above, held_weights),
        "prompts": {use: {"above": int(side[1].sum()), "below": int((~side[1]).sum())} for use, side in sides.items()},
        "above": [role.value for role in above],
        "below": [role.value for role in below],
        "tensors": {
            "weight": torch.from_numpy(scaled.weight).to(torch.float32),
            "bias": torch.from_numpy(scaled.bias).to(torch.float32),
        },
    }
