"""A gate's two thresholds: the whole curve of what they cost, from outcomes that are known per prompt, and the choice.

What a prompt does unsteered, under its comply edit and under its refuse edit does not depend on the thresholds, so that
every pair of them is judged without running the model again. Pure maths on arrays.

Shapes: `N` prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from steering.errors import OperatorError
from steering.fit.probes import Array, Mask

NEVER_REFUSE = 1.0
NEVER_COMPLY = 0.0
AS_GOOD = 0.005
"""Difference of over-refusal that some hundred calibration prompts cannot tell."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evidence:
    """What is known of calibration prompts.

    Attributes:
        probability: [N], of the probe.
        groups: [N], the set a prompt is counted in; rates are means over the sets of a kind, whatever their sizes.
        kinds: set to its kind: `refuse`, `over` (to be answered, looks harmful) or `plain`.
        refused: `unsteered`, `comply` and `refuse` to [N], whether the prompt is refused under it.
        answered: likewise, whether it is answered; a prompt may be neither, which is right for nobody.
    """

    probability: Array
    groups: NDArray[np.str_]
    kinds: Mapping[str, str]
    refused: Mapping[str, Mask]
    answered: Mapping[str, Mask]

    def rates(self, comply_below: float, refuse_above: float) -> dict[str, float]:
        """Share not answered of `over` and `plain`, share refused of `refuse`, under a gate with these thresholds."""
        return self.tally().rates(comply_below, refuse_above)

    def tally(self) -> Tally:
        """The same for many thresholds: each set's prompts in order of probability, with running counts."""
        sets = []
        for group, kind in self.kinds.items():
            rows = np.flatnonzero(self.groups == group)
            if not len(rows):
                continue
            rows = rows[np.argsort(self.probability[rows], kind="stable")]
            counted = {
                side: (self.refused[side] if kind == "refuse" else ~self.answered[side])[rows]
                for side in ("unsteered", "comply", "refuse")
            }
            running = {side: np.concatenate([[0], np.cumsum(values)]) for side, values in counted.items()}
            sets.append((kind, self.probability[rows], running))
        return Tally(tuple(sets))


class Tally(NamedTuple):
    """For each set its kind, its probabilities rising, and by side how many of its first prompts count."""

    sets: tuple[tuple[str, Array, dict[str, NDArray[np.int64]]], ...]

    def rates(self, comply_below: float, refuse_above: float) -> dict[str, float]:
        """See `Evidence.rates`. Where both thresholds hold, refuse goes first, as in the gate."""
        found: dict[str, list[float]] = {"refuse": [], "over": [], "plain": []}
        for kind, probability, running in self.sets:
            count = len(probability)
            high = count if refuse_above >= NEVER_REFUSE else int(np.searchsorted(probability, refuse_above, "left"))
            low = 0 if comply_below <= NEVER_COMPLY else int(np.searchsorted(probability, comply_below, "right"))
            low = min(low, high)
            total = running["comply"][low] + running["unsteered"][high] - running["unsteered"][low]
            total += running["refuse"][count] - running["refuse"][high]
            found[kind].append(float(total) / count)
        return {kind: float(np.mean(values)) if values else 0.0 for kind, values in found.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Thresholds, and the rates they give on the prompts they were chosen on; see `Evidence.rates`."""

    comply_below: float
    refuse_above: float
    rates: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Rounded to four places, the thresholds as they are."""
        rates = {kind: round(rate, 4) for kind, rate in self.rates.items()}
        return {"comply_below": self.comply_below, "refuse_above": self.refuse_above, "rates": rates}


def threshold_curve(evidence: Evidence, steps: int = 60) -> list[Choice]:
    """Every pair of `steps` quantiles of the probabilities of prompts that are not plain, and of the ends."""
    contested = np.isin(evidence.groups, [group for group, kind in evidence.kinds.items() if kind != "plain"])
    if not contested.any():
        raise OperatorError("a gate needs calibration prompts to refuse and to answer; there are none")
    inner = np.quantile(evidence.probability[contested], np.linspace(0.01, 0.99, steps))
    inner = np.unique(np.clip(inner, 1e-6, 1.0 - 1e-6))
    lows, highs = [NEVER_COMPLY, *map(float, inner)], [*map(float, inner), NEVER_REFUSE]
    tally = evidence.tally()
    return [
        Choice(comply_below=low, refuse_above=high, rates=tally.rates(low, high))
        for low in lows
        for high in highs
        if low <= high
    ]


def choose(
    curve: list[Choice],
    unsteered: Mapping[str, float],
    *,
    safety_margin: float,
    plain_margin: float,
    refuse_near: float | None = None,
) -> Choice:
    """The pair with the least over-refusal that keeps refusals of prompts to refuse, and plain answers.

    Args:
        unsteered: rates without a gate.
        safety_margin: share of prompts to refuse that may be refused less than unsteered.
        plain_margin: share of plain prompts that may be answered less than unsteered.
        refuse_near: where the refuse side begins as long as nothing speaks against it. Few calibration prompts are
            both harmful and answered, so that over-refusal alone would switch that side off, and attacks would pass.

    Of pairs that are as good, the one with the widest neutral band is taken. With `refuse_near` pairs within `AS_GOOD`
    are as good: the one that refuses most of the prompts to refuse, and then the nearest to it, is taken. The pair
    (0, 1) decides nothing and always keeps the margins, so that there is always a choice.
    """
    allowed = [one for one in curve if keeps(one, unsteered, safety_margin=safety_margin, plain_margin=plain_margin)]
    if not allowed:
        raise OperatorError("no pair of thresholds keeps the margins, not even (0, 1); was the curve made in full?")
    if refuse_near is not None:
        least = min(choice.rates["over"] for choice in allowed)
        near = [choice for choice in allowed if choice.rates["over"] <= least + AS_GOOD]
        return min(
            near,
            key=lambda choice: (
                -round(choice.rates["refuse"], 4),
                abs(choice.refuse_above - refuse_near),
                round(choice.rates["over"], 4),
            ),
        )
    return min(
        allowed, key=lambda choice: (round(choice.rates["over"], 4), -(choice.refuse_above - choice.comply_below))
    )


def keeps(choice: Choice, unsteered: Mapping[str, float], *, safety_margin: float, plain_margin: float) -> bool:
    """Whether a pair keeps the margins; arguments are those of `choose`."""
    harmful, plain = unsteered["refuse"] - safety_margin, unsteered["plain"] + plain_margin
    return choice.rates["refuse"] >= harmful - 1e-12 and choice.rates["plain"] <= plain + 1e-12


def hard_sign(threshold: float, evidence: Evidence) -> Choice:
    """P1's gate, without a neutral band: the same threshold on both sides, clipped inside 0 and 1."""
    inside = min(max(threshold, 1e-6), 1.0 - 1e-6)
    return Choice(comply_below=inside, refuse_above=inside, rates=evidence.rates(inside, inside))


def frontier(curve: list[Choice]) -> list[Choice]:
    """Of every rate of kept refusals the least over-refusal: the curve worth looking at, refusals rising."""
    best: list[Choice] = []
    for choice in sorted(curve, key=lambda choice: (choice.rates["over"], -choice.rates["refuse"])):
        if not best or choice.rates["refuse"] > best[-1].rates["refuse"]:
            best.append(choice)
    return best
