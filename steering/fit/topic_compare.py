"""Stage `compare`: every method, free and gated, on the prompts of each role, and which becomes the default.

What a prompt does unsteered and under an edit does not depend on a gate's threshold, so that every threshold is judged
without asking again. Thresholds and the default are chosen on calibration prompts; test prompts are only reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from steering.evaluate.judge import Verdict
from steering.fit.datasets import thinned
from steering.fit.intervals import Rate
from steering.fit.probes import Array, Mask
from steering.fit.sources import Use
from steering.fit.stages import Result
from steering.fit.thresholds import NEVER_REFUSE, Choice, Evidence, choose, keeps, threshold_curve
from steering.fit.topic_answers import Measured
from steering.fit.topic_candidates import FREE, GATED
from steering.fit.topic_finder import Found, verdicts
from steering.fit.topic_fit import Session, TopicFit
from steering.fit.topic_gate import TopicGate
from steering.fit.topic_prompts import Role

UNSTEERED = "unsteered"
KINDS = {Role.SAFETY: "refuse", Role.REFUSED: "over", Role.ANSWERED: "plain"}
"""Roles as `steering.fit.thresholds` names what is wanted of them."""
USES = (Use.CALIBRATE, Use.TEST)
LETTERS = {Verdict.REFUSAL: "R", Verdict.ANSWER: "A", Verdict.BROKEN: "B", Verdict.UNPARSABLE: "U"}
"""Verdicts in the strings of `codes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way of steering, as compared.

    Attributes:
        name: `<method>` or `<method>, gated`.
        comply_below: the gate's threshold; None without a gate.
        rates: by use and role, `Rate.to_json`.
        is_safe: on calibration prompts it keeps the margins.
    """

    name: str
    found: Found
    comply_below: float | None
    rates: Mapping[str, Mapping[str, Mapping[str, float]]]
    is_safe: bool

    @property
    def is_gated(self) -> bool:
        """A gate decides."""
        return self.found.candidate.variant == GATED


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All arms, and the name of the default one with the reason."""

    arms: tuple[Arm, ...]
    default: Arm
    reason: str
    facts: Result


def compare(
    fit: TopicFit,
    measured: Measured,
    found: Sequence[Found],
    gate: TopicGate | None,
    session: Session,
    digest: str,
    after: Sequence[Mapping[str, Any]],
) -> Comparison:
    """Run or read the stage, and choose."""
    rows = {
        use: {role: thinned(measured.rows([role], [use], is_judged=False), fit.settings.gated) for role in KINDS}
        for use in USES
    }
    result = fit.stage(
        "compare",
        lambda: _compare(fit, measured, found, gate, session, digest, rows),
        of=("gated", "safety_margin", "plain_margin", "max_tokens"),
        after=after,
        given={"judge": fit.judge_facts, "arms": [str(one.candidate) for one in found]},
    )
    arms = tuple(
        Arm(
            name=facts["name"],
            found=one,
            comply_below=facts["comply_below"],
            rates=facts["rates"],
            is_safe=facts["is_safe"],
        )
        for one, facts in zip(found, result["arms"], strict=True)
    )
    default, reason = choose_default(arms, result["unsteered"])
    return Comparison(arms=arms, default=default, reason=reason, facts=result)


def choose_default(arms: Sequence[Arm], unsteered: Mapping[str, Mapping[str, Mapping[str, float]]]) -> tuple[Arm, str]:
    """The default arm, and why.

    P2's rule, the least shift among what removes enough (§3.3), of arms that keep safety on calibration prompts, gated
    ones first: a gate also leaves alone what no calibration prompt stands for. Where nothing removes enough it is the
    least topic refusal; where no arm keeps safety, gated ones come first, and then what keeps most harmful refusals.
    """

    def refused(arm: Arm, role: Role) -> float:
        return float(arm.rates[Use.CALIBRATE].get(role, {}).get("rate", 0.0))

    base = {role: float(found.get("rate", 0.0)) for role, found in unsteered[Use.CALIBRATE].items()}
    has_safety = bool(unsteered[Use.CALIBRATE].get(Role.SAFETY, {}).get("n"))
    safe = [arm for arm in arms if arm.is_safe]
    if safe:
        met = [arm for arm in safe if arm.found.is_met]
        gated = [arm for arm in met if arm.is_gated]
        if met:
            best = min(gated or met, key=lambda arm: (arm.found.shift, refused(arm, Role.REFUSED)))
        else:
            best = min(safe, key=lambda arm: (refused(arm, Role.REFUSED), not arm.is_gated, arm.found.shift))
        left, before = 100 * refused(best, Role.REFUSED), 100 * base.get(Role.REFUSED, 0.0)
        least = "shift" if met else "topic refusal"
        why = (
            f"{len(safe)} of {len(arms)} arms keep the margins on calibration prompts, {len(met)} of them remove "
            f"enough, {len(gated)} of those behind a gate; it has the least {least} of these, leaving {left:.1f} % of "
            f"topic refusals (unsteered {before:.1f} %)"
        )
        free = [arm for arm in arms if not arm.is_gated]
        if best.is_gated and free:
            other = min(free, key=lambda arm: refused(arm, Role.REFUSED))
            why += (
                f"; ungated, {other.name} leaves {100 * refused(other, Role.REFUSED):.1f} % of topic refusals, and of "
                f"harmful ones {100 * refused(other, Role.SAFETY):.1f} % (unsteered "
                f"{100 * base.get(Role.SAFETY, 0.0):.1f} %)"
            )
        if not has_safety:
            why += "; no --safety prompts were given, so that nothing is known of harmful ones"
        return best, why
    best = max(arms, key=lambda arm: (arm.is_gated, refused(arm, Role.SAFETY), -refused(arm, Role.REFUSED)))
    return best, (
        "no arm keeps the margins on calibration prompts; this one keeps most harmful refusals: "
        f"{100 * refused(best, Role.SAFETY):.1f} % of them, unsteered {100 * base.get(Role.SAFETY, 0.0):.1f} %"
    )


def _compare(
    fit: TopicFit,
    measured: Measured,
    found: Sequence[Found],
    gate: TopicGate | None,
    session: Session,
    digest: str,
    rows: Mapping[Use, Mapping[Role, list[int]]],
) -> Result:
    flat = [(use, role, row) for use in USES for role in KINDS for row in rows[use][role]]
    orders = [None, *(one.candidate.order(digest) for one in found)]
    asked = [(measured.items[row].text, order) for order in orders for _, _, row in flat]
    told = verdicts(fit, "compare", session.engine, asked)
    by_arm = [told[start : start + len(flat)] for start in range(0, len(told), len(flat))]
    probability = gate.probabilities(measured, [row for _, _, row in flat]) if gate is not None else None
    base, *steered = by_arm
    arms = []
    for one, codes in zip(found, steered, strict=True):
        threshold: float | None = None
        curve: list[dict[str, Any]] = []
        kept = codes
        if one.candidate.variant == GATED:
            assert probability is not None
            choice, curve = _threshold(fit, flat, base, codes, probability)
            threshold = choice.comply_below
            decided = probability <= threshold
            kept = [code if on else before for code, before, on in zip(codes, base, decided, strict=True)]
        rates = _rates(flat, kept)
        arms.append(
            {
                "name": f"{one.candidate.method}{', gated' if one.candidate.variant == GATED else ''}",
                "candidate": one.candidate.to_json(),
                "removal": one.removal,
                "shift": one.shift,
                "is_met": one.is_met,
                "comply_below": threshold,
                "rates": rates,
                "always_on": _rates(flat, codes) if threshold is not None else None,
                "curve": curve,
                "is_safe": _is_safe(fit, rates, _rates(flat, base)),
                "codes": "".join(LETTERS[code] for code in kept),
            }
        )
    return {
        "unsteered": _rates(flat, base),
        "codes": "".join(LETTERS[code] for code in base),
        "prompts": {use: {role: len(members) for role, members in by_role.items()} for use, by_role in rows.items()},
        "keys": [measured.items[row].key for _, _, row in flat],
        "arms": arms,
        "variants": {"free": FREE, "gated": GATED},
    }


def _threshold(
    fit: TopicFit,
    flat: Sequence[tuple[Use, Role, int]],
    base: Sequence[Verdict],
    codes: Sequence[Verdict],
    probability: Array,
) -> tuple[Choice, list[dict[str, Any]]]:
    """The largest relief within the margins, and what every threshold would give.

    Thresholds are looked at from below, up to the first that breaks a margin: above it one refusal gained by chance
    would pay for one that was lost, and the gate would hardly gate.
    """
    chosen = np.array([use is Use.CALIBRATE for use, _, _ in flat], dtype=bool)

    def of(told: Sequence[Verdict], wanted: Verdict) -> Mask:
        return np.array([code is wanted for code, on in zip(told, chosen, strict=True) if on], dtype=bool)

    evidence = Evidence(
        probability=probability[chosen],
        groups=np.array([role.value for _, role, _ in flat], dtype=np.str_)[chosen],
        kinds={role.value: kind for role, kind in KINDS.items()},
        refused={
            "unsteered": of(base, Verdict.REFUSAL),
            "comply": of(codes, Verdict.REFUSAL),
            "refuse": of(base, Verdict.REFUSAL),
        },
        answered={
            "unsteered": of(base, Verdict.ANSWER),
            "comply": of(codes, Verdict.ANSWER),
            "refuse": of(base, Verdict.ANSWER),
        },
    )
    curve = [one for one in threshold_curve(evidence) if one.refuse_above >= NEVER_REFUSE]
    settings, unsteered = fit.settings, evidence.rates(0.0, NEVER_REFUSE)
    margins = {"safety_margin": settings.safety_margin, "plain_margin": settings.plain_margin}
    rising = sorted(curve, key=lambda one: one.comply_below)
    kept = list(takewhile(lambda one: keeps(one, unsteered, **margins), rising))
    choice = choose(kept, unsteered, **margins)
    return choice, [one.to_json() for one in curve]


def _rates(
    flat: Sequence[tuple[Use, Role, int]], codes: Sequence[Verdict]
) -> dict[str, dict[str, dict[str, float | int]]]:
    """By use and role: refused, with its interval, and the count of broken answers."""
    found: dict[str, dict[str, dict[str, float | int]]] = {}
    for use in USES:
        for role in KINDS:
            mine = [code for code, (where, what, _) in zip(codes, flat, strict=True) if (where, what) == (use, role)]
            refused = Rate(count=sum(code is Verdict.REFUSAL for code in mine), n=len(mine))
            broken = sum(code is Verdict.BROKEN for code in mine)
            found.setdefault(use, {})[role] = {**refused.to_json(), "broken": broken}
    return found


def _is_safe(fit: TopicFit, rates: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Whether harmful prompts stay refused and answered ones answered, within the margins, on calibration prompts."""
    here, there = rates[Use.CALIBRATE], base[Use.CALIBRATE]

    def share(found: Mapping[str, Any], *names: str) -> float:
        return float(sum(found[name] for name in names)) / found["n"] if found["n"] else 0.0

    harmful = share(there[Role.SAFETY], "count") - share(here[Role.SAFETY], "count")
    lost = share(here[Role.ANSWERED], "count", "broken") - share(there[Role.ANSWERED], "count", "broken")
    return harmful <= fit.settings.safety_margin + 1e-12 and lost <= fit.settings.plain_margin + 1e-12
