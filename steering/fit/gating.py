"""Stage `gate`: what every calibration prompt does under every family's edits, and each family's thresholds.

Thresholds are chosen on calibration prompts only. Knows nothing of bundles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steering.fit.arms import ANSWERED, UNSTEERED, Arm, Codes, arm_codes, over_arms
from steering.fit.control import Fit
from steering.fit.families import CATEGORY, P1, RANDOM, RANDOM_CATEGORY, Family
from steering.fit.openings import Openings
from steering.fit.passes import Sequences
from steering.fit.probes import Array, Mask
from steering.fit.prompts import GROUP_KINDS, Kind, Prompts
from steering.fit.thresholds import (
    NEVER_COMPLY,
    NEVER_REFUSE,
    Choice,
    Evidence,
    choose,
    frontier,
    hard_sign,
    threshold_curve,
)
from steering.terms import Edit

Categories = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Readings:
    """What a gate sees of prompts, [N] each.

    Attributes:
        probability: of refusal, by the probe.
        head: category by the probe's head.
        tokens: category by the model's own refusal tokens (P1.4); None without such tokens.
    """

    probability: Array
    head: Categories
    tokens: Categories | None

    def categories(self, family: str) -> Categories:
        """Those whose edits a family takes: P1 asks the model's tokens, all others the head."""
        return self.tokens if family == P1 and self.tokens is not None else self.head


def token_categories(fit: Fit, openings: Openings, sequences: Sequences) -> Categories | None:
    """The most likely refusal token of each prompt, as index of its category: P1's category source."""
    if not openings.is_tokens:
        return None
    tokens = [fit.loaded.categories[name] for name in fit.categories]
    result = np.zeros(len(sequences), dtype=np.int64)

    def take(_number: int, indices: list[int], logits: Tensor) -> None:
        result[indices] = logits[:, tokens].argmax(dim=-1).numpy()

    with torch.inference_mode():
        over_arms(fit.loaded, sequences, [UNSTEERED], take)
    return result


def token_stage(
    fit: Fit, openings: Openings, calibrating: Prompts, after: Sequence[Mapping[str, Any]]
) -> Categories | None:
    """`token_categories` of the calibration prompts, read once."""

    def make() -> dict[str, Any]:
        found = token_categories(fit, openings, calibrating.ids)
        return {"has_tokens": found is not None} | (
            {} if found is None else {"tensors": {"categories": torch.from_numpy(found)}}
        )

    if not fit.stage("tokens", make, after=after)["has_tokens"]:
        return None
    return np.asarray(fit.tensors("tokens")["categories"].numpy())


def family_codes(
    fit: Fit,
    openings: Openings,
    sequences: Sequences,
    readings: Readings,
    families: Mapping[str, Family],
    edits: Mapping[str, Edit],
    strengths: Tensor | None = None,
) -> dict[str, Codes]:
    """`unsteered`, and `<family>/refuse` and `<family>/comply`: what each prompt does under its own category's edit.

    Args:
        strengths: one for each prompt [N]; 1 for all where not given.
    """
    arms, keys = [UNSTEERED], ["unsteered"]
    for key, family in families.items():
        names = [fit.head_categories[place] for place in readings.categories(key)]
        for purpose, chosen in (("refuse", family.refuse), ("comply", family.comply)):
            each = [edits[chosen[name]] if name in chosen else None for name in names]
            arms.append(Arm(each, 1.0 if strengths is None else strengths))
            keys.append(f"{key}/{purpose}")
    codes = arm_codes(fit.loaded, openings, fit.categories, sequences, arms)
    return dict(zip(keys, codes, strict=True))


def evidence_of(prompts: Prompts, probability: Array, unsteered: Codes, comply: Codes, refuse: Codes) -> Evidence:
    """The calibration prompts that decide, with what they do on either side of a gate."""
    rows = np.isin(prompts.groups, list(GROUP_KINDS))
    codes = {"unsteered": unsteered[rows], "comply": comply[rows], "refuse": refuse[rows]}
    return Evidence(
        probability=probability[rows],
        groups=prompts.groups[rows],
        kinds=GROUP_KINDS,
        refused={name: found >= 0 for name, found in codes.items()},
        answered={name: found == ANSWERED for name, found in codes.items()},
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlainEdits:
    """Which plain prompts a family has edits for: what its thresholds do to them is known from that.

    Attributes:
        groups: group to its prompts' probabilities [N], and whether each has an edit to refuse and one to comply.
    """

    groups: Mapping[str, tuple[Array, Mask, Mask]]

    @classmethod
    def of(cls, fit: Fit, prompts: Prompts, categories: Categories, probability: Array, family: Family) -> PlainEdits:
        """Of the plain prompts among `prompts`, whose edits the categories name."""
        told = [fit.head_categories[place] for place in categories]
        has_refuse = np.array([name in family.refuse for name in told], dtype=bool)
        has_comply = np.array([name in family.comply for name in told], dtype=bool)
        found = {}
        for group, kind in GROUP_KINDS.items():
            rows = prompts.groups == group
            if kind == Kind.PLAIN and rows.any():
                found[group] = probability[rows], has_refuse[rows], has_comply[rows]
        return cls(groups=found)

    def shares(self, comply_below: float, refuse_above: float) -> dict[str, float]:
        """By group, the share of its prompts that a gate with these thresholds edits, on either side."""
        result = {}
        for group, (probability, has_refuse, has_comply) in self.groups.items():
            refuses = (probability >= refuse_above) & (refuse_above < NEVER_REFUSE)
            complies = (probability <= comply_below) & (comply_below > NEVER_COMPLY)
            result[group] = float(np.where(refuses, has_refuse, complies & has_comply).mean())
        return result

    def kept(self, curve: list[Choice], most: float | None) -> list[Choice]:
        """The pairs of a curve that edit at most a share `most` of each group; all where None."""
        if most is None:
            return curve
        return [
            choice
            for choice in curve
            if max(self.shares(choice.comply_below, choice.refuse_above).values(), default=0.0) <= most + 1e-12
        ]


def gate_stage(
    fit: Fit,
    openings: Openings,
    calibrating: Prompts,
    readings: Readings,
    families: Mapping[str, Family],
    edits: Mapping[str, Edit],
    youden: float,
    after: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Each family's thresholds, its curve of thresholds, and the outcomes they come from."""

    def make() -> dict[str, Any]:
        codes = family_codes(fit, openings, calibrating.ids, readings, families, edits)
        result: dict[str, Any] = {}
        for name in families:
            evidence = evidence_of(
                calibrating, readings.probability, codes["unsteered"], codes[f"{name}/comply"], codes[f"{name}/refuse"]
            )
            unsteered = evidence.rates(0.0, 1.0)
            curve = threshold_curve(evidence)
            placed = readings.categories(name)
            plain = PlainEdits.of(fit, calibrating, placed, readings.probability, families[name])
            if name in (RANDOM, RANDOM_CATEGORY):
                # A control differs from what it is held against in the edits alone.
                model = result[CATEGORY]["chosen"]
                chosen = _at(evidence, float(model["comply_below"]), float(model["refuse_above"]))
                how = "those of the category edits"
            elif fit.settings.threshold is not None:
                chosen, how = hard_sign(fit.settings.threshold, evidence), "fixed by the settings"
            elif name == P1:
                chosen, how = hard_sign(youden, evidence), "the probe's Youden point, as in P1: no neutral band"
            else:
                margins = fit.settings.safety_margin, fit.settings.plain_margin
                kept = plain.kept(curve, fit.settings.most_plain_edited)
                chosen = choose(kept, unsteered, safety_margin=margins[0], plain_margin=margins[1], refuse_near=youden)
                how = (
                    "least over-refusal within the margins of refusals, of plain answers and of edits of plain ones; "
                    "of thresholds as good, those that refuse most, from as near the probe's Youden point on as may be"
                )
            result[name] = {
                "chosen": chosen.to_json(),
                "how": how,
                "unsteered": {kind: round(rate, 4) for kind, rate in unsteered.items()},
                "hard_sign": hard_sign(youden, evidence).to_json(),
                "plain_edited": plain.shares(chosen.comply_below, chosen.refuse_above),
                "frontier": [choice.to_json() for choice in frontier(curve)],
            }
            rates = chosen.rates
            fit.say(
                f"  {name}: comply below {chosen.comply_below:.3f}, refuse above {chosen.refuse_above:.3f}; "
                f"over-refusal {unsteered['over']:.3f} to {rates['over']:.3f}, refusal {unsteered['refuse']:.3f} to "
                f"{rates['refuse']:.3f}; edits of plain prompts "
                + ", ".join(f"{group} {share:.3f}" for group, share in result[name]["plain_edited"].items())
            )
        agreement = None
        if readings.tokens is not None:
            agreement = float((readings.tokens == readings.head).mean())
        return {
            "families": result,
            "youden": youden,
            "category_sources_agree": agreement,
            "groups": {group: int((calibrating.groups == group).sum()) for group in GROUP_KINDS},
            "tensors": {key: torch.from_numpy(value) for key, value in codes.items()},
        }

    return fit.stage(
        "gate", make, of=("threshold", "safety_margin", "plain_margin", "plain_edited", "tells_plain"), after=after
    )


def _at(evidence: Evidence, comply_below: float, refuse_above: float) -> Choice:
    return Choice(
        comply_below=comply_below, refuse_above=refuse_above, rates=evidence.rates(comply_below, refuse_above)
    )


def gated(
    probability: Array, unsteered: Codes, comply: Codes, refuse: Codes, comply_below: float, refuse_above: float
) -> Codes:
    """What prompts do behind a gate, from what they do on either side of it."""
    result = unsteered.copy()
    if comply_below > 0.0:
        result = np.where(probability <= comply_below, comply, result)
    if refuse_above < 1.0:
        result = np.where(probability >= refuse_above, refuse, result)
    return result.astype(np.int8)
