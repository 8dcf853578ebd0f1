"""Doses: the layer and lengths at which directions control a model's decision and leave its answers well formed.

Chosen on calibration prompts, within two budgets: how far the first answer token of plain prompts may move (KL), and
how much worse given answers may be predicted. Knows nothing of bundles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from steering.fit.ability import answer_loss
from steering.fit.arms import UNSTEERED, Arm, Codes, arm_codes, arm_effects, neither, refusals
from steering.fit.certified import budgets_of, certified_range, scaled
from steering.fit.control import Fit, Settings, Variant
from steering.fit.openings import Openings
from steering.fit.passes import Sequences
from steering.fit.trials import Trials
from steering.fit.vectors import categorical
from steering.terms import Edit, added_direction

NEAR_BEST = 0.1
"""Layers whose effects sum to this much less than the best one's count as controlling as well: about what 60 prompts
of either kind can tell apart."""


def added(name: str, layer: int, direction: Tensor, coefficient: float) -> Edit:
    """An edit that adds `coefficient · direction` at one layer."""
    return Edit(name=name, layers=(added_direction(layer=layer, direction=direction, coefficient=coefficient),))


class Recipe(NamedTuple):
    """How an edit is made from a dose.

    Attributes:
        purpose: `refuse` or `comply`.
        category: whose; None for an edit of no category.
        make: the edit at a multiple of its natural length.
        unit: what multiple 1 is, in words.
        length: of what multiple 1 adds; 0 for a map, whose addition depends on the residual.
        natural: length of what P1's coefficient 1 adds: 1 for unit directions, that of s for the trained vector.
        spares_plain: made to leave plain prompts alone, so that its dose is found on prompts to refuse that the model
            answers.
    """

    purpose: str
    category: str | None
    make: Callable[[float], Edit]
    unit: str
    length: float
    natural: float = 1.0
    spares_plain: bool = False


def layer_sweep(
    fit: Fit,
    openings: Openings,
    means: Mapping[str, Tensor],
    trials_of: Callable[[], Trials],
    norms: Sequence[float],
    variant: Variant,
    after: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The default category's direction at every layer and dose, in both signs, and the layer that controls best.

    `comply` is tried on borderline prompts (most are refused), `refuse` on plain ones (most are answered).
    """

    def make() -> dict[str, Any]:
        trials = trials_of()
        concerned = trials.own[fit.settings.default_category]
        before = arm_codes(fit.loaded, openings, fit.categories, concerned, [UNSTEERED])[0]
        unsteered = answer_loss(fit.loaded, trials.answered)
        layers = []
        for layer in range(len(fit.loaded.blocks)):
            direction, gap = categorical(means, variant, fit.settings.default_category, layer, fit.settings)
            comply = _effects(fit, openings, _lengths(fit, layer, direction, -gap), concerned, before, "comply")
            refuse = _effects(fit, openings, _lengths(fit, layer, direction, gap), trials.plain, before, "refuse")
            chosen = {
                "comply": _smallest(comply, fit.settings.comply_target),
                "refuse": _smallest(refuse, fit.settings.refuse_target),
            }
            score = chosen["comply"]["effect"] + chosen["refuse"]["effect"]
            signed = {"comply": -gap, "refuse": gap}
            loss = sum(
                answer_loss(
                    fit.loaded, trials.answered, added("dose", layer, direction, row["multiple"] * signed[purpose])
                )
                for purpose, row in chosen.items()
            )
            layers.append(
                {
                    "layer": layer,
                    "gap": gap,
                    "residual_norm": norms[layer],
                    "comply": comply,
                    "refuse": refuse,
                    "chosen": chosen,
                    "score": score,
                    "loss_added": loss - 2.0 * unsteered,
                }
            )
        best = best_layer({"layers": layers}, fit.settings)
        fit.say(f"  {variant}: layer {best}")
        return {
            "unsteered": {"borderline": refusals(before).to_json(), "plain": refusals(trials.plain_codes).to_json()},
            "layers": layers,
            "layer": best,
        }

    return fit.stage(
        f"sweep-{variant}",
        make,
        of=(
            "layer",
            "tau",
            "top_k",
            "calibration",
            "ranged",
            "multiples",
            "comply_target",
            "refuse_target",
            "default_category",
        ),
        after=after,
    )


def dose_curves(
    fit: Fit,
    openings: Openings,
    recipes: Mapping[str, Recipe],
    trials_of: Callable[[], Trials],
    name: str,
    after: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """For each edit its dose, the curve it was chosen from, and the strengths certified for it."""

    def make() -> dict[str, Any]:
        trials = trials_of()
        unsteered = answer_loss(fit.loaded, trials.answered)
        edits = {}
        for key, recipe in recipes.items():
            edits[key] = _dose(fit, openings, recipe, trials, unsteered)
            facts = edits[key]
            fit.say(
                f"  {key}: {facts['multiple']:.3g} times, refused {facts['before']['rate']:.2f} to "
                f"{facts['refused']['rate']:.2f}, up to strength {facts['maximum']:g}"
            )
        return {
            "unsteered": {"loss": unsteered},
            "prompts": {
                "plain": len(trials.plain),
                "answers": len(trials.answered),
                "ranged": len(trials.ranged),
                "guarded": {category: len(ids) for category, ids in trials.guarded.items()},
                "own": {category: len(ids) for category, ids in trials.own.items()},
            },
            "edits": edits,
        }

    return fit.stage(
        name,
        make,
        of=(
            "doses",
            "multiples",
            "comply_target",
            "refuse_target",
            "strengths",
            "headroom",
            "most_spoiled",
            "divergence_budget",
            "loss_budgets",
            "calibration",
            "ranged",
            "default_category",
        ),
        after=after,
    )


def certified_ranges(
    fit: Fit,
    openings: Openings,
    edits: Mapping[str, tuple[str, Edit]],
    trials_of: Callable[[], Trials],
    name: str,
    after: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Certified strengths of edits whose dose is given, such as a control's, by name; with the side each stands for."""

    def make() -> dict[str, Any]:
        trials = trials_of()
        grounds = trials.grounds(trials.ranged, answer_loss(fit.loaded, trials.answered))
        return {
            "edits": {
                key: certified_range(fit, openings, edit, grounds, budgets_of(fit, purpose))
                for key, (purpose, edit) in edits.items()
            }
        }

    return fit.stage(
        name, make, of=("strengths", "most_spoiled", "divergence_budget", "loss_budgets", "ranged"), after=after
    )


def _dose(fit: Fit, openings: Openings, recipe: Recipe, trials: Trials, unsteered: float) -> dict[str, Any]:
    settings, budgets = fit.settings, budgets_of(fit, recipe.purpose)
    is_comply = recipe.purpose == "comply"
    concerned, known = trials.plain, not is_comply
    if is_comply:
        concerned = trials.own[recipe.category or settings.default_category]
    elif recipe.spares_plain and trials.missed:
        concerned, known = trials.missed, False
    before = trials.plain_codes if known else arm_codes(fit.loaded, openings, fit.categories, concerned, [UNSTEERED])[0]
    multiples: Sequence[float] = settings.multiples
    is_fixed = settings.doses is not None and bool(recipe.length)
    if settings.doses is not None and recipe.length:
        wanted = settings.doses[1] if is_comply else settings.doses[0]
        multiples = (abs(wanted) * recipe.natural / recipe.length,)
    edits = [(multiple, recipe.make(multiple)) for multiple in multiples]
    plain = arm_effects(fit.loaded, openings, fit.categories, trials.plain, [Arm(edit) for _, edit in edits])
    rows = _effects(fit, openings, edits, concerned, before, recipe.purpose, plain.codes if known else None)
    for row, divergence, (_, edit) in zip(rows, plain.divergences, edits, strict=True):
        row["divergence"] = divergence
        row["loss"] = answer_loss(fit.loaded, trials.answered, edit)
        row["is_within_budget"] = row["loss"] - unsteered <= budgets.loss and (
            budgets.divergence is None or divergence <= budgets.divergence
        )
    within = [row for row in rows if row["is_within_budget"]]
    chosen = _smallest(within or rows[:1], settings.comply_target if is_comply else settings.refuse_target)
    multiple = float(chosen["multiple"])
    spoilt = trials.ranged if is_comply else trials.guarded[recipe.category or settings.default_category]
    chosen_edit = recipe.make(multiple)
    ranges = certified_range(fit, openings, chosen_edit, trials.grounds(spoilt, unsteered), budgets)
    # Fixed doses are taken as they are, whatever they spoil; one of our own is lowered until `headroom` is certified.
    share = 1.0 if settings.doses is not None else min(1.0, ranges["maximum"] / settings.headroom[not is_comply])
    maximum = ranges["maximum"] / share if share and within else 0.0
    is_beyond = is_fixed and maximum < 1.0
    if is_beyond:
        fit.say(f"  {recipe.purpose} {recipe.category or 'all'}: the fixed dose is beyond the budgets, and kept")
        maximum = 1.0
    after = chosen
    if share and share < 1.0:
        after = _effects(fit, openings, [(multiple, scaled(chosen_edit, share))], concerned, before, recipe.purpose)[0]
    return {
        "purpose": recipe.purpose,
        "category": recipe.category,
        "unit": recipe.unit,
        "length": recipe.length * multiple * share,
        "multiple": multiple * share,
        "made_at": multiple,
        "share": share,
        "maximum": maximum,
        "is_beyond_budget": is_beyond,
        "before": refusals(before).to_json(),
        "refused": after["refused"],
        "malformed": after["malformed"],
        "named": after["named"],
        "curve": rows,
        # As strengths of the dose that is given, not of the one it was lowered from.
        "tried": {f"{float(strength) / (share or 1.0):g}": found for strength, found in ranges["tried"].items()},
    }


def _lengths(fit: Fit, layer: int, direction: Tensor, signed_gap: float) -> list[tuple[float, Edit]]:
    return [(multiple, added("dose", layer, direction, multiple * signed_gap)) for multiple in fit.settings.multiples]


def _effects(
    fit: Fit,
    openings: Openings,
    edits: Sequence[tuple[float, Edit]],
    prompts: Sequences,
    before: Codes,
    purpose: str,
    known: list[Codes] | None = None,
) -> list[dict[str, Any]]:
    """Outcomes at each multiple; `effect` is refusals removed (comply) or prompts refused, less malformed answers.

    Args:
        known: what the prompts do under each edit, where that was read already.
    """
    rows = []
    if known is None:
        known = arm_codes(fit.loaded, openings, fit.categories, prompts, [Arm(edit) for _, edit in edits])
    # One more arm than needed where there is one dose only: what follows is the same for all.
    for (multiple, _), codes in zip(edits, known, strict=True):
        rate, malformed = refusals(codes), neither(codes)
        effect = rate.value
        if purpose == "comply":
            unsteered = refusals(before)
            effect = 1.0 - rate.count / unsteered.count if unsteered.count else 0.0
        refused = codes[codes >= 0]
        named = np.bincount(refused, minlength=len(fit.categories) + 1) if len(refused) else np.zeros(1, int)
        rows.append(
            {
                "multiple": multiple,
                "refused": rate.to_json(),
                "malformed": malformed.to_json(),
                "effect": effect - malformed.value,
                "named": [int(count) for count in named],
            }
        )
    return rows


def _smallest(rows: Sequence[dict[str, Any]], target: float) -> dict[str, Any]:
    """The smallest dose whose effect reaches the target, else the one with the largest effect."""
    for row in rows:
        if row["effect"] >= target:
            return row
    return max(rows, key=lambda row: row["effect"])


def best_layer(swept: Mapping[str, Any], settings: Settings, *, at_least: int = 0) -> int:
    """Of the layers that control about as well as the best one, the one whose doses spoil plain answers least.

    As well as: the sum of both effects lies within `NEAR_BEST` of the largest. As in Arditi et al., the last fifth of
    the blocks is left out: it is too close to the output to count as control.
    """
    if settings.layer is not None:
        return settings.layer
    rows = swept["layers"]
    candidates = [row for row in rows if at_least <= row["layer"] < max(at_least + 1.0, 0.8 * len(rows))]
    best = max(row["score"] for row in candidates)
    near = [row for row in candidates if row["score"] >= best - NEAR_BEST]
    return int(min(near, key=lambda row: row["loss_added"])["layer"])
