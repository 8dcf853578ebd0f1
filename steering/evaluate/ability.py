"""Ability on plain benign prompts: how far steered answers stay with the unsteered ones.

What the served API can show of a model too small for benchmarks. Knows nothing of servers or of loaded models.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import SequenceMatcher
from statistics import fmean
from typing import Any

from steering.evaluate.arms import UNSTEERED
from steering.evaluate.paired import Paired
from steering.evaluate.suites import Group
from steering.evaluate.tally import Row, Rows, paired
from steering.fit.intervals import Z95, Rate


def similarity(first: str, second: str) -> float:
    """Share of words in common order, 0…1, as difflib matches them; 1 for two empty texts."""
    return SequenceMatcher(None, first.split(), second.split(), autojunk=False).ratio()


def mean_interval(values: list[float]) -> dict[str, Any]:
    """Mean with its 95 % interval by the normal approximation."""
    mean = fmean(values)
    spread = (sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)) ** 0.5
    half = Z95 * spread / len(values) ** 0.5
    return {"mean": round(mean, 5), "low": round(mean - half, 5), "high": round(mean + half, 5), "n": len(values)}


def kept_ability(by_arm: Mapping[str, Rows], arm: str, judge: str) -> dict[str, Any]:
    """Answers to plain benign prompts under an arm against unsteered ones.

    Returns:
        Shares of identical text, mean similarity of words, refusals of either, the change of the mean negative
        log-probability a token has for the model that generated it, over all suites and by suite. Empty without both
        arms.
    """
    plain = {
        row.asked.record.key: row
        for row in by_arm.get(UNSTEERED, ())
        if row.asked.suite.group is Group.ABILITY and not row.asked.answer.error
    }
    pairs = [
        (plain[row.asked.record.key], row)
        for row in by_arm.get(arm, ())
        if row.asked.record.key in plain and not row.asked.answer.error
    ]
    if not pairs:
        return {}
    suites = sorted({before.asked.suite.name for before, _ in pairs})
    return {
        "pooled": _compared(pairs, judge),
        "suites": {
            name: _compared([pair for pair in pairs if pair[0].asked.suite.name == name], judge) for name in suites
        },
    }


def _compared(pairs: list[tuple[Row, Row]], judge: str) -> dict[str, Any]:
    texts = [(before.asked.answer.text, after.asked.answer.text) for before, after in pairs]
    losses = [
        after.asked.answer.loss - before.asked.answer.loss
        for before, after in pairs
        if after.asked.answer.loss is not None and before.asked.answer.loss is not None
    ]
    refused: Paired = paired([after for _, after in pairs], [before for before, _ in pairs], judge)
    told: dict[str, Any] = {
        "identical": Rate(count=sum(first == second for first, second in texts), n=len(texts)).to_json(),
        "similarity": mean_interval([similarity(first, second) for first, second in texts]),
    }
    if refused.n:
        told["refused"] = refused.to_json()
    if losses:
        told["loss_change"] = mean_interval(losses)
    return told
