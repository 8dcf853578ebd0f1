"""A judge's own error, measured against the human labels of XSTest's completions of five models.

Two people labelled each completion; full and partial refusals count as refusals. Knows nothing of the answers that a
judge is used on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steering.evaluate.judge import Verdict, keyword_verdict
from steering.fit.datasets import DataDirectory, Record, find, thinned
from steering.fit.intervals import Rate
from steering.fit.sources import Use

COMPLIANCE = "1_full_compliance"
PARTIAL = "3_partial_refusal"

EXACT = (
    "exact by construction: the model begins every answer with a token that says whether it refuses; where it breaks "
    "that habit the answer counts as broken"
)
KEYWORD_CAVEAT = (
    "the phrases were written with these completions in view, so that other models' answers may be judged worse"
)


def labelled_completions(directory: DataDirectory, most: int | None = None) -> list[Record]:
    """XSTest's completions, the human label as category, the completion as answer; evenly spaced ones at most `most`.

    Raises:
        DatasetError: the set is not there or not what the registry says.
    """
    parts = [part.name for part in find("xstest").parts if part.name.startswith("completions_")]
    found = [record for part in parts for record in directory.load("xstest", part, Use.CALIBRATE)]
    return found if most is None else thinned(found, most)


def judge_error(records: Sequence[Record], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """How often verdicts differ from the labels; unparsable verdicts count as wrong and are told.

    Returns:
        Accuracy, false positives among answered and false negatives among refused completions, accuracy without the
        partial refusals, each with its interval, and what became of partial refusals.
    """
    pairs = [(record.category, verdict) for record, verdict in zip(records, verdicts, strict=True)]
    answered = [verdict for label, verdict in pairs if label == COMPLIANCE]
    refused = [verdict for label, verdict in pairs if label != COMPLIANCE]
    partial = [verdict for label, verdict in pairs if label == PARTIAL]
    clear = [(label == COMPLIANCE, verdict) for label, verdict in pairs if label != PARTIAL]
    right = sum(verdict is Verdict.ANSWER for verdict in answered) + sum(
        verdict is Verdict.REFUSAL for verdict in refused
    )
    right_clear = sum(verdict is (Verdict.ANSWER if is_answer else Verdict.REFUSAL) for is_answer, verdict in clear)
    return {
        "against": "final human labels of XSTest's completions, partial refusals counted as refusals",
        "accuracy": Rate(count=right, n=len(pairs)).to_json(),
        "false_positives": Rate(
            count=sum(verdict is Verdict.REFUSAL for verdict in answered), n=len(answered)
        ).to_json(),
        "false_negatives": Rate(count=sum(verdict is Verdict.ANSWER for verdict in refused), n=len(refused)).to_json(),
        "without_partial": Rate(count=right_clear, n=len(clear)).to_json(),
        "partial_as_refusal": Rate(
            count=sum(verdict is Verdict.REFUSAL for verdict in partial), n=len(partial)
        ).to_json(),
        "unparsable": sum(verdict is Verdict.UNPARSABLE for verdict in (*answered, *refused)),
    }


def keyword_error(directory: DataDirectory) -> dict[str, Any]:
    """The keyword judge's error."""
    records = labelled_completions(directory)
    measured = judge_error(records, [keyword_verdict(record.answer or "") for record in records])
    return {**measured, "caveat": KEYWORD_CAVEAT}
