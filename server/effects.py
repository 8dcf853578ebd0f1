"""Effects: what was done to each sample of a request, held against what was allowed, and told to the client.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from server.policy import Report, Resolution
from server.verdicts import DIGITS, Verdict
from steering.errors import EditFailed, EditNotApplied
from steering.outcome import Outcome, Scores
from steering.plan import Decision, GateOrder, Mode, Plan, Reasoning, Scope, log_odds

TOLERANCE = 1e-4
"""How near a threshold, as log-odds and relative to a score beyond 1, the engine's rounding may decide otherwise than
ours.
"""


class Effect(Struct, frozen=True, kw_only=True):
    """What was done to one sample.

    Attributes:
        decision: a mode that names its side, `off`, or what a gate decided, which may be `abstain`.
        category: of the edit, or what the gate took the prompt for; None for `off`.
        edit: name of the edit; None where nothing was edited.
        strength, scope: as applied; None where nothing was edited.
        reasoning: as applied.
        scores: what the gate's probe read; None where no gate decided.
        is_shadow: it was decided and not done.
    """

    decision: str
    category: str | None = None
    edit: str | None = None
    strength: float | None = None
    scope: Scope | None = None
    reasoning: Reasoning = Reasoning.EDITED
    scores: Scores | None = None
    is_shadow: bool = False

    @property
    def applied(self) -> bool:
        """Whether something was edited."""
        return self.edit is not None

    @property
    def header(self) -> str:
        """The decision as `x-trimtab-decision` tells it."""
        return f"shadow:{self.decision}" if self.is_shadow else self.decision


def effect_of(resolution: Resolution, outcome: Outcome | None) -> Effect:
    """The effect that an outcome reports.

    Args:
        resolution: what was allowed.
        outcome: of the sample; None where no plan was sent.

    Raises:
        EditNotApplied: the engine reports an error, or something that the plan does not allow.
    """
    plan = resolution.plan
    if plan is None and resolution.is_shadow:
        return Effect(decision=resolution.mode.value, category=resolution.category, is_shadow=True)
    if plan is None or outcome is None:
        return Effect(decision=Mode.OFF.value)
    if outcome.error:
        raise EditFailed(f"the engine could not do what was asked: {outcome.error}; the answer is withheld")
    if outcome.reasoning != plan.reasoning:
        raise EditNotApplied(
            f"the engine reports reasoning {outcome.reasoning.value}, where {plan.reasoning.value} was asked; "
            "the answer is withheld"
        )
    if plan.gate is None:
        _check_edit(plan, outcome)
        decision, category = resolution.mode.value, resolution.category
    else:
        _check_ruling(plan, plan.gate, resolution, outcome)
        assert outcome.decision is not None
        decision, category = outcome.decision.value, outcome.category
    return Effect(
        decision=decision,
        category=category,
        edit=outcome.edit,
        strength=None if outcome.edit is None else outcome.strength,
        scope=None if outcome.edit is None else outcome.scope,
        reasoning=outcome.reasoning,
        scores=outcome.scores,
        is_shadow=resolution.is_shadow,
    )


def attach(
    body: dict[str, Any], resolution: Resolution, effects: Sequence[Effect], verdicts: Sequence[Verdict]
) -> None:
    """Put the `steering` object of design §6 into an answer or a last chunk, unless the client wants none.

    It tells of the first sample; of all where they differ, which needs scores within rounding of a threshold.
    """
    if resolution.report is Report.NONE:
        return
    first, is_full = effects[0], resolution.report is Report.FULL
    steering: dict[str, Any] = {
        "applied": first.applied,
        "profile": resolution.profile.name,
        "bundle": resolution.bundle.label,
        "decision": first.decision,
        "category": first.category,
        "edit": first.edit,
        "strength": _told_strength(resolution, first),
        "scope": None if first.scope is None else first.scope.value,
        "verdict": verdicts[0].to_json(in_full=is_full),
    }
    if first.is_shadow:
        steering["shadow"] = True
    if resolution.category_source is not None:
        steering["category_source"] = resolution.category_source.value
    if resolution.bundle.is_thinking and first.applied:
        steering["reasoning"] = first.reasoning.value
    if is_full:
        steering |= _details(resolution, first)
    if len(verdicts) > 1:
        steering["verdicts"] = [verdict.to_json(in_full=is_full) for verdict in verdicts]
    if len({effect.decision for effect in effects}) > 1:
        steering["decisions"] = [effect.decision for effect in effects]
    if resolution.bundle.is_transferred:
        steering["transferred"] = True
    body["steering"] = steering


def _told_strength(resolution: Resolution, effect: Effect) -> float | None:
    """The strength, except where it tells a caller what the probe read who may not know it: of a graded gate it is a
    share, and rounded as a score is.
    """
    gate = resolution.plan.gate if resolution.plan is not None else None
    if gate is None or not gate.is_graded or effect.strength is None:
        return effect.strength
    return None if resolution.is_discreet else round(effect.strength, DIGITS)


def told_scores(scores: Scores) -> dict[str, Any]:
    """What a probe read, as a client is told it."""
    categories = {name: round(score, DIGITS) for name, score in scores.categories.items()}
    return {"refusal": round(scores.refusal, DIGITS), "categories": categories}


def _details(resolution: Resolution, effect: Effect) -> dict[str, Any]:
    order = resolution.plan.gate if resolution.plan is not None else None
    if order is None:
        return {}
    assert effect.scores is not None
    return {
        "scores": told_scores(effect.scores),
        "thresholds": {"comply_below": order.comply_below, "refuse_above": order.refuse_above},
        "graded": order.is_graded,
    }


def _check_edit(plan: Plan, outcome: Outcome) -> None:
    """The engine must have done what the plan says, not merely something."""
    if (
        not outcome.applied
        or outcome.edit != plan.edit
        or outcome.scope != plan.scope
        or not math.isclose(outcome.strength, plan.strength, rel_tol=1e-5)
    ):
        raise EditNotApplied(
            f"the engine reports edit {outcome.edit!r} at strength {outcome.strength} (applied: {outcome.applied}) "
            f"where {plan.edit!r} at {plan.strength} was asked; the answer is withheld"
        )


def _check_ruling(plan: Plan, order: GateOrder, resolution: Resolution, outcome: Outcome) -> None:
    """The engine must have decided as the scores it reports demand, and done what it decided."""
    scores, category, decision = outcome.scores, outcome.category, outcome.decision
    probe = resolution.profile.gate.probe if resolution.profile.gate else None
    assert probe is not None
    if scores is None or scores.names != probe.categories or len(scores.logits) != len(probe.categories) + 1:
        raise _wrong(f"no scores of probe {probe.name!r}")
    if not all(map(math.isfinite, scores.logits)):
        raise _wrong("scores that are not finite")
    score, allowed = scores.logits[0], order.categories or probe.categories
    if category not in allowed:
        raise _wrong(f"category {category!r}, where {list(allowed)} were allowed")
    own = scores.of(category)
    if own + _slack(own) < max(scores.logits[1:] if order.categories is None else map(scores.of, allowed)):
        raise _wrong(f"category {category!r}, which is not the likeliest of {list(allowed)}")
    refuse, comply = resolution.profile.refuse.get(category), resolution.profile.comply.get(category)
    if not _may_decide(decision, score, order, can_refuse=refuse is not None, can_comply=comply is not None):
        raise _wrong(
            f"decision {decision!s} at refusal probability {scores.refusal:.{DIGITS}f}, with thresholds "
            f"{order.comply_below} and {order.refuse_above} and for category {category!r} the edits {refuse!r} and "
            f"{comply!r}"
        )
    if order.is_observed:
        if outcome.applied or outcome.edit is not None or outcome.strength != 0:
            raise _wrong(f"edit {outcome.edit!r} at strength {outcome.strength}, where it was only to observe")
        return
    if decision is Decision.ABSTAIN:
        if outcome.applied or outcome.edit is not None:
            raise _wrong(f"edit {outcome.edit!r} after it abstained")
        return
    assert decision is not None
    edit = refuse if decision is Decision.REFUSE else comply
    if not outcome.applied or outcome.edit != edit or outcome.scope != plan.scope:
        raise _wrong(f"edit {outcome.edit!r} (applied: {outcome.applied}), where its decision means {edit!r}")
    if not _strength_fits(plan, order, decision, scores.refusal, outcome.strength):
        raise _wrong(f"strength {outcome.strength} for edit {edit!r}, where {plan.strength} was asked")


def _slack(score: float) -> float:
    return TOLERANCE * max(1.0, abs(score))


def _may_decide(
    decision: Decision | None, score: float, order: GateOrder, *, can_refuse: bool, can_comply: bool
) -> bool:
    """Whether the rule of `steering.gate` may say this of a refusal score that was read within the tolerance. A side
    without an edit for the category is the neutral band.
    """
    least, most = score - _slack(score), score + _slack(score)
    low, high = log_odds(order.comply_below), log_odds(order.refuse_above)
    refuses, complies = most >= high, least <= low  # a threshold of 1 never refuses and one of 0 never complies
    if decision is Decision.REFUSE:
        return refuses and can_refuse
    if decision is Decision.COMPLY:
        return complies and can_comply
    is_between = low < high and least < high and most > low
    is_left_alone = is_between or (refuses and not can_refuse) or (complies and not can_comply)
    return decision is Decision.ABSTAIN and is_left_alone


def _strength_fits(plan: Plan, order: GateOrder, decision: Decision, refusal: float, strength: float) -> bool:
    if not order.is_graded:
        return math.isclose(strength, plan.strength, rel_tol=1e-5)
    room = 1 - order.refuse_above if decision is Decision.REFUSE else order.comply_below
    way = refusal - order.refuse_above if decision is Decision.REFUSE else order.comply_below - refusal
    share = min(1.0, max(0.0, way / room))
    return 0 <= strength <= plan.strength * (1 + 1e-5) and abs(strength / plan.strength - share) <= TOLERANCE / room


def _wrong(found: str) -> EditNotApplied:
    return EditNotApplied(f"the engine's gate reports {found}; the answer is withheld")
