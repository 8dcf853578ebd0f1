"""Curves over thresholds: pooled over-refusal against pooled refusal, for the gate and for R1's first token.

A gate's answer is one of three: unsteered, steered to comply, steered to refuse. Asked for all three, the rates at
every threshold are known. Knows nothing of servers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steering.evaluate.arms import UNSTEERED, Arm
from steering.evaluate.judge import Verdict
from steering.evaluate.suites import Group
from steering.evaluate.tally import Row, Rows
from steering.fit.intervals import Rate

STEPS = tuple(step / 40 for step in range(41))
KEPT_HIGH = 1.0
"""`refuse_above` of the second composed curve: only ever comply, never add a refusal."""


def asked_points(by_arm: Mapping[str, Rows], arms: Sequence[Arm], judge: str) -> list[dict[str, Any]]:
    """Rates by group under each arm that sets thresholds."""
    return [
        {"comply_below": arm.pair[0], "refuse_above": arm.pair[1], "groups": _rates(by_arm[arm.name], judge)}
        for arm in arms
        if arm.pair is not None and by_arm.get(arm.name)
    ]


def composed_lines(by_arm: Mapping[str, Rows], arms: Sequence[Arm], auto: Rows, judge: str) -> dict[str, Any]:
    """Lines over all thresholds, put together from always-refuse, always-comply and unsteered answers by score.

    Returns:
        Empty where one of the three, or the scores, are not there.
    """
    always = {arm.pair: by_arm[arm.name] for arm in arms if arm.pair in ((0.0, 0.0), (1.0, 1.0)) and arm.name in by_arm}
    if len(always) < 2 or UNSTEERED not in by_arm:
        return {}
    scores = {row.asked.record.key: row.asked.answer.score for row in auto if row.asked.answer.score is not None}
    refused = _verdicts(always[0.0, 0.0], judge)
    complied = _verdicts(always[1.0, 1.0], judge)
    known = []
    for row in by_arm[UNSTEERED]:
        key = row.asked.record.key
        plain = row.verdicts.get(judge)
        if plain is None or key not in scores or key not in refused or key not in complied:
            continue
        score = scores[key]
        assert score is not None
        known.append((row.asked.suite.group, score, refused[key], complied[key], plain))
    if not known:
        return {}

    def point(low: float, high: float) -> dict[str, Any]:
        chosen = [
            (group, up if score >= high else down if score <= low else plain) for group, score, up, down, plain in known
        ]
        return {"comply_below": low, "refuse_above": high, "groups": _rates_of(chosen)}

    return {
        "hard_sign": [point(step, step) for step in STEPS],
        "comply_only": [point(step, KEPT_HIGH) for step in STEPS],
    }


def forced_line(first: Rows) -> list[dict[str, Any]]:
    """R1's threshold on the first token: refuse where the likeliest refusal token has at least this probability.

    The decision is the forced token, so that every rate is exact; what would follow that token is not known.
    """
    known = [
        (row.asked.suite.group, max((row.asked.answer.first or {}).values(), default=0.0))
        for row in first
        if not row.asked.answer.error
    ]
    if not any(probability for _, probability in known):
        return []
    return [
        {
            "threshold": step,
            "groups": _rates_of(
                [(group, Verdict.REFUSAL if probability >= step else Verdict.ANSWER) for group, probability in known]
            ),
        }
        for step in STEPS[1:]
    ]


def _verdicts(rows: Rows, judge: str) -> dict[str, Verdict]:
    return {row.asked.record.key: row.verdicts[judge] for row in rows if judge in row.verdicts}


def _rates(rows: Sequence[Row], judge: str) -> dict[str, Any]:
    return _rates_of([(row.asked.suite.group, row.verdicts[judge]) for row in rows if judge in row.verdicts])


def _rates_of(pairs: Sequence[tuple[Group, Verdict]]) -> dict[str, Any]:
    told = {}
    for group in Group:
        verdicts = [verdict for of, verdict in pairs if of is group]
        if verdicts and group is not Group.ABILITY:
            told[group.value] = Rate(count=verdicts.count(Verdict.REFUSAL), n=len(verdicts)).to_json()
    return told
