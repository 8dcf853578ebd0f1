"""Verdicts on answers, and their rates over a suite or a group.

Knows nothing of servers or of how reports look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steering.evaluate.judge import Verdict, is_broken, keyword_verdict, told_verdict
from steering.evaluate.paired import Paired
from steering.evaluate.run import TOO_LONG, Asked
from steering.evaluate.wordings import Wordings
from steering.fit.intervals import Rate

TOKEN, PROBE, KEYWORD, MODEL, WORDING = "refusal_token", "response_probe", "keyword", "llm", "wording"
"""Names of judges; the first two are the server's detectors, by its own names."""


def reading_judge(judges: Collection[str]) -> str | None:
    """The judge of what is read, beside one of what is decided: a model, else the wordings a model refuses with.

    Keywords miss most refusals that they were not made for, so that they never stand for what is read.
    """
    return next((name for name in (MODEL, WORDING) if TOKEN in judges and name in judges), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One answer and what each judge that applies makes of it; none applies to a request that failed."""

    asked: Asked
    verdicts: Mapping[str, Verdict]


Rows = Sequence[Row]


def judged(
    answers: Sequence[Asked],
    *,
    has_decision_tokens: bool,
    model: Mapping[tuple[str, str], Verdict] | None = None,
    wordings: Wordings | None = None,
) -> list[Row]:
    """Each answer with its verdicts.

    Args:
        model: a model judge's verdicts by prompt and text.
        wordings: how the served model is known to refuse.
    """
    found = []
    for asked in answers:
        verdicts: dict[str, Verdict] = {}
        if not asked.answer.error:
            is_probe = asked.answer.detector == PROBE
            told = told_verdict(refused=asked.answer.refused, is_always_told=has_decision_tokens and not is_probe)
            if told is not None:
                verdicts[PROBE if is_probe else TOKEN] = told
            if asked.has_text:
                verdicts[KEYWORD] = keyword_verdict(asked.answer.text)
                if wordings is not None:
                    verdicts[WORDING] = wordings.verdict(asked.answer.text)
                by_model = (model or {}).get((asked.record.prompt, asked.answer.text))
                if by_model is not None:
                    verdicts[MODEL] = by_model
        found.append(Row(asked=asked, verdicts=verdicts))
    return found


def tally(rows: Rows, judges: Sequence[str]) -> dict[str, Any]:
    """What came of some prompts under one arm.

    Returns:
        For each judge that applies: rates of refusals and of broken answers among those it judged (unparsable ones are
        told and in neither). Beside them the rate of broken text, categories of refusals, the gate's decisions, prompts
        too long for the served context, and failures by code.
    """
    answers = [row.asked.answer for row in rows]
    done = [answer for answer in answers if not answer.error]
    texts = [row.asked.answer.text for row in rows if KEYWORD in row.verdicts]
    failed = Counter(answer.error for answer in answers if answer.error and answer.error != TOO_LONG)
    told: dict[str, Any] = {"asked": len(rows), "answered": len(done), "judges": {}}
    for judge in judges:
        verdicts = [row.verdicts[judge] for row in rows if judge in row.verdicts]
        if not verdicts:
            continue
        kinds = Counter(verdicts)
        n = len(verdicts) - kinds[Verdict.UNPARSABLE]
        told["judges"][judge] = {
            "refused": Rate(count=kinds[Verdict.REFUSAL], n=n).to_json(),
            "broken": Rate(count=kinds[Verdict.BROKEN], n=n).to_json(),
            "unparsable": kinds[Verdict.UNPARSABLE],
        }
    if texts:
        told["broken_text"] = Rate(count=sum(map(is_broken, texts)), n=len(texts)).to_json()
    told["too_long"] = sum(answer.error == TOO_LONG for answer in answers)
    told["failed"] = dict(sorted(failed.items()))
    told["categories"] = dict(sorted(Counter(answer.verdict_category for answer in done if answer.refused).items()))
    told["decisions"] = dict(sorted(Counter(answer.decision for answer in done).items()))
    return told


def paired(first: Rows, second: Rows, judge: str) -> Paired:
    """Refusals of the same prompts under two arms, where the judge told in both."""
    known = {row.asked.record.key: row.verdicts.get(judge) for row in second}
    pairs = []
    for row in first:
        mine, other = row.verdicts.get(judge), known.get(row.asked.record.key)
        if mine in (None, Verdict.UNPARSABLE) or other in (None, Verdict.UNPARSABLE):
            continue
        pairs.append((mine is Verdict.REFUSAL, other is Verdict.REFUSAL))
    return Paired.of(pairs)
