"""Stage `induction`: refusals induced on chosen prompts by the same vectors, free and gated (P2, §5.1, Fig. 4).

For every dose the share refused of the prompts to be refused and of general ones. Doses and thresholds are chosen on
calibration prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steering.evaluate.judge import Verdict
from steering.fit.datasets import thinned
from steering.fit.intervals import Rate
from steering.fit.probes import Array, Mask
from steering.fit.sources import Use
from steering.fit.stages import Result
from steering.fit.topic_answers import Measured
from steering.fit.topic_candidates import FREE, GATED, Candidate, counts_of
from steering.fit.topic_directions import Method
from steering.fit.topic_finder import verdicts
from steering.fit.topic_fit import Session, TopicFit
from steering.fit.topic_gate import TopicGate
from steering.fit.topic_prompts import Role
from steering.fit.topic_settings import TopicSettings
from steering.fit.topic_vectors import Vectors
from steering.plan import Scope

ROLES = {Role.INDUCED: "topic", Role.ANSWERED: "general"}
USES = (Use.CALIBRATE, Use.TEST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Induction:
    """What was chosen.

    Attributes:
        free, gated: the configurations; None where there is no such variant.
        refuse_above: the gate's threshold for the gated one.
        facts: the curves.
    """

    free: Candidate | None
    gated: Candidate | None
    refuse_above: float | None
    facts: Result


def induction_candidates(
    settings: TopicSettings, vectors: Vectors, method: Method, gate_layer: int | None
) -> list[Candidate]:
    """One method's additive edits with α > 0; of a preset's number of layers where it gives one."""
    variants: list[tuple[str, int, Scope]] = [(FREE, 0, settings.scope)]
    if gate_layer is not None:
        variants.append((GATED, gate_layer, Scope.GENERATED))
    given = settings.doses.get(method)
    found = []
    for variant, first, scope in variants:
        ranking = [one.layer for one in vectors.ranking(method, at_least=first)]
        for count in counts_of((given.count,) if given else settings.counts, len(ranking)):
            layers = tuple(sorted(ranking[:count]))
            found += [
                Candidate(
                    method=method,
                    variant=variant,
                    layers=layers,
                    alpha=alpha,
                    is_reposition=False,
                    scope=scope,
                    reasoning=settings.reasoning,
                )
                for alpha in settings.alphas
            ]
    return found


def induce(
    fit: TopicFit,
    measured: Measured,
    candidates: Sequence[Candidate],
    gate: TopicGate | None,
    session: Session,
    digest: str,
    after: Sequence[Mapping[str, Any]],
) -> Induction:
    """Run or read the stage."""
    result = fit.stage(
        "induction",
        lambda: _induce(fit, measured, candidates, gate, session, digest),
        of=("gated", "plain_margin", "max_tokens"),
        after=after,
        given={"judge": fit.judge_facts, "candidates": [one.to_json() for one in candidates]},
    )

    def of(variant: str) -> Candidate | None:
        chosen = result["chosen"].get(variant)
        return None if chosen is None else candidates[chosen["candidate"]]

    gated = result["chosen"].get(GATED)
    return Induction(
        free=of(FREE),
        gated=of(GATED),
        refuse_above=None if gated is None else gated["refuse_above"],
        facts=result,
    )


def _induce(
    fit: TopicFit,
    measured: Measured,
    candidates: Sequence[Candidate],
    gate: TopicGate | None,
    session: Session,
    digest: str,
) -> Result:
    flat = [
        (use, role, row)
        for use in USES
        for role in ROLES
        for row in thinned(measured.rows([role], [use], is_judged=False), fit.settings.gated)
    ]
    orders = [None, *(one.order(digest) for one in candidates)]
    told = verdicts(
        fit,
        "induction",
        session.engine,
        [(measured.items[row].text, order) for order in orders for _, _, row in flat],
    )
    size = len(flat)
    base, *steered = [
        np.array([verdict is Verdict.REFUSAL for verdict in told[start : start + size]], dtype=bool)
        for start in range(0, len(told), size)
    ]
    probability = gate.probabilities(measured, [row for _, _, row in flat]) if gate is not None else None
    general = _member(flat, Use.CALIBRATE, Role.ANSWERED)
    topic = _member(flat, Use.CALIBRATE, Role.INDUCED)
    rows, scored = [], []
    for index, (one, codes) in enumerate(zip(candidates, steered, strict=True)):
        threshold = None
        kept = codes
        if one.variant == GATED:
            assert probability is not None
            most = float(base[general].mean()) + fit.settings.plain_margin if general.any() else 0.0
            threshold = _threshold(probability, base, codes, general, most)
            kept = np.where(probability >= threshold, codes, base)
        gap = _share(kept, topic) - _share(kept, general)
        # Of equals the one that moves the residual least in all.
        scored.append((gap, -one.alpha * len(one.layers), index))
        rows.append(
            {
                **one.to_json(),
                "count": len(one.layers),
                "refuse_above": threshold,
                "rates": _rates(flat, kept),
                "always_on": _rates(flat, codes) if threshold is not None else None,
            }
        )
    chosen = {}
    for variant in (FREE, GATED):
        mine = [entry for entry in scored if candidates[entry[2]].variant == variant]
        if mine:
            best = max(mine)[2]
            chosen[variant] = {"candidate": best, "refuse_above": rows[best]["refuse_above"]}
    return {"unsteered": _rates(flat, base), "curve": rows, "chosen": chosen}


def _member(flat: Sequence[tuple[Use, Role, int]], use: Use, role: Role) -> Mask:
    return np.array([(where, what) == (use, role) for where, what, _ in flat], dtype=bool)


def _share(codes: Mask, members: Mask) -> float:
    return float(codes[members].mean()) if members.any() else 0.0


def _threshold(probability: Array, base: Mask, codes: Mask, general: Mask, most: float) -> float:
    """The lowest threshold under which at most a share `most` of general prompts is refused; 1 refuses none."""
    if not general.any():
        return 0.5
    for threshold in np.unique(np.clip(probability, 1e-6, 1 - 1e-6)):
        kept = np.where(probability >= threshold, codes, base)
        if float(kept[general].mean()) <= most + 1e-12:
            return float(threshold)
    return 1.0


def _rates(flat: Sequence[tuple[Use, Role, int]], codes: Mask) -> dict[str, dict[str, dict[str, float | int]]]:
    found: dict[str, dict[str, dict[str, float | int]]] = {}
    for use in USES:
        for role, name in ROLES.items():
            mine = codes[_member(flat, use, role)]
            found.setdefault(use, {})[name] = Rate(count=int(mine.sum()), n=len(mine)).to_json()
    return found
