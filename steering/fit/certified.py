"""Certified ranges: at which strengths answers stay well formed and what an edit costs plain prompts is within budget.

What holds at a strength is taken to hold below it. Knows nothing of how a dose is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from steering.fit.ability import ANSWER_TOKENS, answer_loss, well_formed
from steering.fit.activations import greedy
from steering.fit.arms import Arm, arm_effects
from steering.fit.control import Fit
from steering.fit.openings import Openings
from steering.fit.passes import Sequences
from steering.terms import Edit, LayerTerms


class Budgets(NamedTuple):
    """What a strength may cost.

    Attributes:
        spoiled: share of answers that may be less well formed than without steering.
        loss: nats that may be added to the next-token loss of given answers to plain prompts.
        divergence: mean KL(p_base ‖ p_steer) of the first token on plain prompts, in nats; None where moving it is the
            edit's purpose.
    """

    spoiled: float
    loss: float
    divergence: float | None


class Grounds(NamedTuple):
    """The calibration prompts a range is certified on.

    Attributes:
        asked: prompts that are answered in full, such as the edit meets.
        plain: plain prompts, for the divergence.
        answered: (prompt, answer) tokens of plain prompts, for the loss.
        loss: of these without steering.
    """

    asked: Sequences
    plain: Sequences
    answered: Sequence[tuple[list[int], list[int]]]
    loss: float


def budgets_of(fit: Fit, purpose: str) -> Budgets:
    """Those of an edit to `refuse` or to `comply`; controls have those of the side they stand for.

    What an edit to refuse does to the first token of a plain prompt is its effect, not damage.
    """
    settings, is_comply = fit.settings, purpose == "comply"
    return Budgets(
        spoiled=settings.most_spoiled,
        loss=settings.loss_budgets[is_comply],
        divergence=settings.divergence_budget if is_comply else None,
    )


def certified_range(fit: Fit, openings: Openings, edit: Edit, grounds: Grounds, budgets: Budgets) -> dict[str, Any]:
    """The largest strength tried at which every budget is kept, and what each one tried came to.

    Strength 1 is tried first, then larger ones until one fails, or smaller ones until one does not.
    """
    unsteered = well_formed(openings, greedy(fit.loaded, grounds.asked, new_tokens=ANSWER_TOKENS))
    tried: dict[str, Any] = {}

    def keeps(strength: float) -> bool:
        answers = greedy(fit.loaded, grounds.asked, edit, strength, new_tokens=ANSWER_TOKENS)
        rate = well_formed(openings, answers)
        added = answer_loss(fit.loaded, grounds.answered, scaled(edit, strength)) - grounds.loss
        found: dict[str, Any] = {**rate.to_json(), "loss_added": round(added, 4)}
        is_kept = rate.value >= unsteered.value - budgets.spoiled and added <= budgets.loss
        if budgets.divergence is not None:
            effects = arm_effects(fit.loaded, openings, fit.categories, grounds.plain, [Arm(edit, strength)])
            found["divergence"] = round(effects.divergences[0], 4)
            is_kept = is_kept and effects.divergences[0] <= budgets.divergence
        tried[f"{strength:g}"] = found
        return bool(is_kept)

    strengths = sorted({1.0, *fit.settings.strengths})
    maximum = 0.0
    if keeps(1.0):
        maximum = 1.0
        for strength in [value for value in strengths if value > 1.0]:
            if not keeps(strength):
                break
            maximum = strength
    else:
        for strength in [value for value in reversed(strengths) if value < 1.0]:
            if keeps(strength):
                maximum = strength
                break
    return {"maximum": maximum, "tried": tried}


def in_words(budgets: Budgets, tried: Mapping[str, Any]) -> str:
    """What a range was certified by, with how many answers."""
    count = min((found["n"] for found in tried.values()), default=0)
    told = (
        f"largest strength tried that spoiled at most {budgets.spoiled:.0%} of {count} greedy answers to calibration "
        f"prompts, raised the next-token loss of given answers to plain prompts by at most {budgets.loss:g} nats"
    )
    if budgets.divergence is None:
        return told
    return f"{told} and moved their first token by at most {budgets.divergence:g} nats (KL)"


def scaled(edit: Edit, share: float) -> Edit:
    """The edit that at strength 1 does what this one does at strength `share`."""
    return Edit(
        name=edit.name,
        layers=tuple(
            LayerTerms(
                layer=terms.layer, read=terms.read, write=terms.write, gain=share * terms.gain, bias=share * terms.bias
            )
            for terms in edit.layers
        ),
    )
