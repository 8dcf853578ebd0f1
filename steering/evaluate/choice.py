"""The category choice: how often its two sources agree, what is taken for what, what choosing adds.

Knows nothing of servers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steering.evaluate.arms import AUTO, CATEGORICAL, POOLED, RANDOM_CATEGORY, TWICE, UNSTEERED
from steering.evaluate.scores import likeliest
from steering.evaluate.suites import Group
from steering.evaluate.tally import Rows, paired
from steering.fit.intervals import Rate


def agreement(by_arm: Mapping[str, Rows]) -> dict[str, Any]:
    """How often the probe's category head and the model's refusal tokens name the same category.

    The head's name is the argmax of its scores, the tokens' that of the first of two passes. Prompts of the refusal
    group, over all of them and by suite. Empty where the server has but one source.
    """
    source = next((name for name in (TWICE, CATEGORICAL) if by_arm.get(name)), None)
    if source is None or not by_arm.get(AUTO):
        return {}
    named = {row.asked.record.key: row.asked.answer.category for row in by_arm[source] if not row.asked.answer.error}
    pairs = [
        (row.asked.suite.name, likeliest(row.asked.answer.categories), named[row.asked.record.key])
        for row in by_arm[AUTO]
        if row.asked.suite.group is Group.REFUSAL
        and row.asked.answer.categories
        and named.get(row.asked.record.key) is not None
    ]
    if not pairs:
        return {}

    def rate(chosen: list[tuple[str, str, str | None]]) -> dict[str, Any]:
        return Rate(count=sum(head == token for _, head, token in chosen), n=len(chosen)).to_json()

    suites = sorted({suite for suite, _, _ in pairs})
    return {
        "tokens_by": source,
        "pooled": rate(pairs),
        "suites": {suite: rate([pair for pair in pairs if pair[0] == suite]) for suite in suites},
    }


def confusion(by_arm: Mapping[str, Rows], suite: str) -> dict[str, Any]:
    """What prompts of each labelled category are taken for, by the probe's head and by the model's own refusals.

    Returns:
        For each source the labels, the names and a table of counts, and how often they are equal.
    """
    told: dict[str, Any] = {}
    for name, arm in (("probe", AUTO), ("model", UNSTEERED)):
        pairs = []
        for row in by_arm.get(arm, ()):
            answer = row.asked.answer
            found = likeliest(answer.categories) if name == "probe" and answer.categories else None
            if name == "model":
                found = answer.verdict_category if answer.refused else None
            if row.asked.suite.name == suite and row.asked.record.category and found:
                pairs.append((row.asked.record.category, found))
        if pairs:
            labels = sorted({label for label, _ in pairs})
            names = sorted({found for _, found in pairs} | set(labels))
            told[name] = {
                "labels": labels,
                "names": names,
                "counts": [[pairs.count((label, found)) for found in names] for label in labels],
                "right": Rate(count=sum(label == found for label, found in pairs), n=len(pairs)).to_json(),
            }
    return told


def what_choosing_adds(by_arm: Mapping[str, Rows], judge: str) -> dict[str, Any]:
    """Auto against one pooled vector and against wrong categories, on the same prompts, by group."""
    told: dict[str, Any] = {}
    for other in (POOLED, RANDOM_CATEGORY):
        if not by_arm.get(other) or not by_arm.get(AUTO):
            continue
        told[other] = {
            group.value: found.to_json()
            for group in (Group.OVER_REFUSAL, Group.REFUSAL, Group.ATTACKS)
            if (
                found := paired(
                    [row for row in by_arm[AUTO] if row.asked.suite.group is group],
                    [row for row in by_arm[other] if row.asked.suite.group is group],
                    judge,
                )
            ).n
        }
    return told
