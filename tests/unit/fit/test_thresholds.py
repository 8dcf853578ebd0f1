"""Thresholds of a gate: rates as a gate would give them, and a choice that keeps its promises."""

from __future__ import annotations

import numpy as np
import pytest

from steering.fit.thresholds import (
    AS_GOOD,
    NEVER_REFUSE,
    Evidence,
    choose,
    frontier,
    hard_sign,
    threshold_curve,
)
from steering.gate import rule
from steering.plan import Decision, GateOrder


def _evidence(seed: int = 0, count: int = 400) -> Evidence:
    """Prompts whose probability tells mostly right; the edits work on nine of ten."""
    random = np.random.default_rng(seed)
    groups = random.choice(np.array(["harmful", "odd", "borderline", "plain"]), count)
    kinds = {"harmful": "refuse", "odd": "refuse", "borderline": "over", "plain": "plain"}
    wanted = np.isin(groups, ["harmful", "odd"])
    probability = np.clip(0.25 + 0.5 * wanted + 0.2 * random.normal(size=count), 0.001, 0.999)
    unsteered = np.where(groups == "plain", random.random(count) < 0.02, random.random(count) < 0.95)
    works = random.random(count) < 0.9
    refused = {"unsteered": unsteered, "comply": unsteered & ~works, "refuse": unsteered | works}
    return Evidence(
        probability=probability,
        groups=groups,
        kinds=kinds,
        refused=refused,
        answered={name: ~value for name, value in refused.items()},
    )


def test_rates_are_those_of_the_gate_itself() -> None:
    """Prompt by prompt the same side as the reference gate takes, and the mean over sets, not over prompts."""
    import torch

    evidence = _evidence()
    low, high = 0.3, 0.7
    order = GateOrder(profile="p", comply_below=low, refuse_above=high)
    refused, answered = [], []
    for row, probability in enumerate(evidence.probability):
        logits = torch.tensor([float(np.log(probability / (1 - probability))), 0.0])
        ruling = rule(logits, order, ("c",))
        assert ruling is not None
        side = {Decision.REFUSE: "refuse", Decision.COMPLY: "comply", Decision.ABSTAIN: "unsteered"}[ruling.decision]
        refused.append(evidence.refused[side][row])
        answered.append(evidence.answered[side][row])
    rates = evidence.rates(low, high)
    by_set = [np.mean([refused[row] for row in np.flatnonzero(evidence.groups == name)]) for name in ("harmful", "odd")]
    assert rates["refuse"] == pytest.approx(np.mean(by_set))
    borderline = np.flatnonzero(evidence.groups == "borderline")
    assert rates["over"] == pytest.approx(1 - np.mean([answered[row] for row in borderline]))


def test_the_ends_never_comply_and_never_refuse() -> None:
    """0 and 1 decide nothing, also for a probability that was rounded to 0 or 1."""
    evidence = _evidence()
    unsteered = evidence.rates(0.0, 1.0)
    evidence.probability[:] = np.where(evidence.probability < 0.5, 0.0, 1.0)
    assert evidence.rates(0.0, 1.0) == unsteered
    assert evidence.rates(1e-9, 1.0) != unsteered
    harmful = [evidence.refused["unsteered"][evidence.groups == name].mean() for name in ("harmful", "odd")]
    assert unsteered["refuse"] == pytest.approx(np.mean(harmful))


@pytest.mark.parametrize("margin", [0.0, 0.01, 0.05])
def test_the_choice_keeps_the_margin_and_nothing_allowed_over_refuses_less(margin: float) -> None:
    """On the data given, exactly: every other pair of the curve that keeps the margins is no better."""
    evidence = _evidence()
    unsteered, curve = evidence.rates(0.0, 1.0), threshold_curve(evidence, steps=25)
    chosen = choose(curve, unsteered, safety_margin=margin, plain_margin=0.005)
    assert chosen.rates["refuse"] >= unsteered["refuse"] - margin
    assert chosen.rates["plain"] <= unsteered["plain"] + 0.005
    for other in curve:
        keeps = other.rates["refuse"] >= unsteered["refuse"] - margin
        if keeps and other.rates["plain"] <= unsteered["plain"] + 0.005:
            assert round(chosen.rates["over"], 4) <= round(other.rates["over"], 4)
    assert chosen.rates["over"] < unsteered["over"]
    assert 0.0 <= chosen.comply_below <= chosen.refuse_above <= 1.0


def test_the_refuse_side_begins_near_the_place_asked_for_where_nothing_speaks_against_it() -> None:
    """Where no calibration prompt gains by a refuse edit the side stays on, at the threshold nearest to that place."""
    evidence = _evidence()
    unsteered = {**evidence.refused, "refuse": evidence.refused["unsteered"]}
    useless = Evidence(
        probability=evidence.probability,
        groups=evidence.groups,
        kinds=evidence.kinds,
        refused=unsteered,
        answered={**evidence.answered, "refuse": evidence.answered["unsteered"]},
    )
    curve, rates, margins = threshold_curve(useless), useless.rates(0.0, 1.0), {"plain_margin": 0.005}
    off = choose(curve, rates, safety_margin=0.05, **margins)
    near = choose(curve, rates, safety_margin=0.05, refuse_near=0.6, **margins)
    assert off.refuse_above == NEVER_REFUSE
    assert abs(near.refuse_above - 0.6) < 0.1
    assert near.rates["over"] <= off.rates["over"] + AS_GOOD
    assert near.rates["refuse"] >= off.rates["refuse"]


def test_edits_that_do_harm_leave_the_gate_undecided() -> None:
    """Where both edits only spoil answers, no threshold helps, and a pair that decides nothing is chosen."""
    evidence = _evidence()
    count = len(evidence.probability)
    broken = Evidence(
        probability=evidence.probability,
        groups=evidence.groups,
        kinds=evidence.kinds,
        refused={**evidence.refused, "comply": np.zeros(count, bool), "refuse": np.zeros(count, bool)},
        answered={**evidence.answered, "comply": np.zeros(count, bool), "refuse": np.zeros(count, bool)},
    )
    chosen = choose(threshold_curve(broken), broken.rates(0.0, 1.0), safety_margin=0.0, plain_margin=0.005)
    assert chosen.rates == broken.rates(0.0, 1.0)


def test_a_hard_sign_has_no_band_and_the_frontier_rises() -> None:
    """P1's gate has one threshold; the frontier holds no pair that another one beats on both rates."""
    evidence = _evidence()
    sign = hard_sign(0.535, evidence)
    assert sign.comply_below == sign.refuse_above == 0.535
    assert hard_sign(1.0, evidence).refuse_above < 1.0
    best = frontier(threshold_curve(evidence, steps=20))
    pairs = [(choice.rates["over"], choice.rates["refuse"]) for choice in best]
    assert pairs == sorted(pairs)
    assert len({refuse for _, refuse in pairs}) == len(pairs) > 2
