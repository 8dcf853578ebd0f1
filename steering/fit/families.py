"""Families of edits: who refuses and who complies under each category, and how each edit is made from a dose.

A family becomes a profile of the bundle. Knows nothing of thresholds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.fit.categories import PLAIN
from steering.fit.control import Fit, Variant
from steering.fit.directions import random_direction, unit
from steering.fit.doses import Recipe, added
from steering.fit.learned import null_space_edit
from steering.fit.vectors import RESPOND, benign_refusal, categorical, pooled
from steering.terms import Edit, repositioned_direction

CATEGORY, LOW_RANK, P1, POOLED = "category", "low-rank", "p1", "pooled"
NULL_SPACE, BENIGN_REFUSAL, REPOSITION = "null-space", "benign-refusal", "reposition"
RANDOM, RANDOM_CATEGORY = "random", "random-category"


def edit_name(purpose: str, category: str, prefix: str = "") -> str:
    """`refuse-requests-with-safety-concerns`, and `p1-refuse-...` for P1's Algorithm 1."""
    return f"{prefix}{purpose}-{category.lower().replace(' ', '-')}"


def recipes_of(
    fit: Fit, means: Mapping[str, Tensor], layer: int, p1_layer: int | None, learned: Mapping[str, Any]
) -> dict[str, Recipe]:
    """How every edit is made, by the edit's name.

    Args:
        p1_layer: of Algorithm 1's directions; None for a model without refusal tokens.
        learned: results of the stages `low_rank` and `null_space`.
    """
    settings = fit.settings
    recipes: dict[str, Recipe] = {}
    apart = "the difference of the class means"

    def additive(
        name: str, at: int, direction: Tensor, length: float, category: str | None, what: str, natural: float = 1.0
    ) -> None:
        for purpose, sign in (("refuse", 1.0), ("comply", -1.0)):
            key = name.format(purpose=purpose)
            recipes[key] = Recipe(
                purpose=purpose,
                category=category,
                make=_adding(key, at, direction, sign * length),
                unit=f"{length:.4g} along a unit direction, {what}",
                length=length,
                natural=natural,
            )

    for category in fit.categories:
        direction, gap = categorical(means, Variant.HEADER, category, layer, settings)
        additive(edit_name("{purpose}", category), layer, direction, gap, category, apart)
        key = edit_name("comply", category, "reposition-")
        recipes[key] = _reposition(means, category, layer, key, direction)
    if p1_layer is not None:
        for category in fit.categories:
            direction, gap = categorical(means, Variant.P1, category, p1_layer, settings)
            additive(edit_name("{purpose}", category, "p1-"), p1_layer, direction, gap, category, apart)
    direction, gap = pooled(means, layer, settings)
    additive("{purpose}-pooled", layer, direction, gap, None, f"{apart} of all categories together")
    # The trained vector's own length says how hard it was pushed, not what is needed: doses are those of a direction.
    vector = unit(fit.tensors("low_rank")["vector"])
    natural = float(learned[LOW_RANK]["length"])
    additive("{purpose}-low-rank", layer, vector, gap, None, "that of the trained vector", natural)
    benign = benign_refusal(means, layer, settings)
    if benign is not None:
        key = "comply-benign-refusal"
        recipes[key] = Recipe(
            purpose="comply",
            category=None,
            make=_adding(key, layer, benign[0], -benign[1]),
            unit=f"{benign[1]:.4g} along a unit direction, benign prompts the model refuses against those it answers",
            length=benign[1],
        )
    recipes["refuse-null-space"] = Recipe(
        purpose="refuse",
        category=None,
        make=lambda multiple: null_space_edit(fit, layer, multiple),
        unit="the null-space map towards the class difference of the prompt's category",
        length=0.0,
        spares_plain=True,
    )
    return recipes


def _adding(name: str, layer: int, direction: Tensor, length: float) -> Callable[[float], Edit]:
    return lambda multiple: added(name, layer, direction, multiple * length)


def _reposition(means: Mapping[str, Tensor], category: str, layer: int, key: str, direction: Tensor) -> Recipe:
    """Move what a residual has along the category's direction to where plain prompts are: those hardly move."""
    target = float(means[f"{Variant.HEADER}/{RESPOND}"][layer].to(torch.float32) @ direction)
    gap = float(means[f"{Variant.HEADER}/{category}"][layer].to(torch.float32) @ direction) - target

    def make(multiple: float) -> Edit:
        # Beyond the plain mean for a multiple above 1: the gain stays, so that every residual meets at one place.
        place = target - (multiple - 1.0) * gap if multiple > 1.0 else target
        terms = repositioned_direction(layer=layer, direction=direction, target=place)
        if multiple < 1.0:
            terms = type(terms)(
                layer=layer, read=terms.read, write=terms.write, gain=multiple * terms.gain, bias=multiple * terms.bias
            )
        return Edit(name=key, layers=(terms,))

    return Recipe(
        purpose="comply",
        category=category,
        make=make,
        unit=f"the component along the category's direction, moved to {target:.4g}, the mean of plain prompts",
        length=0.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Which edit belongs to each category and side; a category without an entry has none, and the gate abstains."""

    refuse: dict[str, str]
    comply: dict[str, str]


def families_of(fit: Fit, usable: Mapping[str, Edit]) -> dict[str, Family]:
    """The families whose edits were certified.

    Plain prompts, where the head tells them, get the default category's edit to refuse, since an attack may look plain,
    and none to comply; how many of them the gate may edit is a limit on its thresholds.
    """
    names = fit.categories

    def by_category(purpose: str, prefix: str = "") -> dict[str, str]:
        found = {name: edit_name(purpose, name, prefix) for name in names}
        if purpose == "refuse" and PLAIN in fit.head_categories:
            found[PLAIN] = edit_name(purpose, fit.settings.default_category, prefix)
        return {name: key for name, key in found.items() if key in usable}

    def same(key: str) -> dict[str, str]:
        told = fit.head_categories if "refuse" in key else names
        return dict.fromkeys(told, key) if key in usable else {}

    found = {
        CATEGORY: Family(refuse=by_category("refuse"), comply=by_category("comply")),
        P1: Family(refuse=by_category("refuse", "p1-"), comply=by_category("comply", "p1-")),
        LOW_RANK: Family(refuse=same("refuse-low-rank"), comply=same("comply-low-rank")),
        POOLED: Family(refuse=same("refuse-pooled"), comply=same("comply-pooled")),
        NULL_SPACE: Family(refuse=same("refuse-null-space"), comply=by_category("comply")),
        BENIGN_REFUSAL: Family(refuse=by_category("refuse"), comply=same("comply-benign-refusal")),
        REPOSITION: Family(refuse=by_category("refuse"), comply=by_category("comply", "reposition-")),
        RANDOM: Family(refuse=same("random-refuse"), comply=same("random-comply")),
    }
    found[RANDOM_CATEGORY] = another_category(fit, found[CATEGORY])
    return {name: family for name, family in found.items() if family.refuse or family.comply}


def random_edits(fit: Fit, usable: Mapping[str, Edit], layer: int) -> dict[str, tuple[str, Edit]]:
    """The control, by name with the side it stands for: one random direction with the lengths of the default category's
    two edits.
    """
    direction = random_direction(fit.loaded.width, fit.settings.seed)
    found = {}
    for purpose in ("refuse", "comply"):
        model = usable.get(edit_name(purpose, fit.settings.default_category))
        if model is not None:
            length = float(model.layers[0].bias[0])
            found[f"random-{purpose}"] = purpose, added(f"random-{purpose}", layer, direction, length)
    return found


def another_category(fit: Fit, family: Family) -> Family:
    """The control: each category gets another one's edits of this family, which one drawn once; plain prompts, where
    they have an edit, that of the default category's other.
    """
    turned = _turned(fit)
    turned[PLAIN] = turned[fit.settings.default_category]

    def moved(chosen: Mapping[str, str]) -> dict[str, str]:
        return {name: chosen[turned[name]] for name in chosen if turned[name] in chosen}

    return Family(refuse=moved(family.refuse), comply=moved(family.comply))


def _turned(fit: Fit) -> dict[str, str]:
    """Every category's other: the next one in an order drawn once."""
    names = list(fit.categories)
    random.Random(fit.settings.seed).shuffle(names)
    return {name: names[(place + 1) % len(names)] for place, name in enumerate(names)}
