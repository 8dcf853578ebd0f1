"""A judge's own error, measured against the human labels of XSTest's completions of five models.

Two people labelled each completion as full compliance, full refusal or partial refusal. Most judges tell two classes;
they are scored with partial refusals on either side. Knows nothing of the answers that a judge is used on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from steering.evaluate.judge import KeywordJudge, Verdict
from steering.fit.datasets import DataDirectory, Record, find, thinned
from steering.fit.intervals import Rate
from steering.fit.sources import Use

COMPLIANCE = "1_full_compliance"
REFUSAL = "2_full_refusal"
PARTIAL = "3_partial_refusal"
LABELS = (COMPLIANCE, REFUSAL, PARTIAL)

EXACT = (
    "exact by construction: the model begins every answer with a token that says whether it refuses; where it breaks "
    "that habit the answer counts as broken"
)
KEYWORD_CAVEAT = (
    "the phrases were written with these completions in view, so that other models' answers may be judged worse"
)
PROBE_CAVEAT = (
    "the probe was fitted on the first tokens of its own model's answers; these are other models', given to it"
)
_PART = "completions_"


def labelled_completions(directory: DataDirectory, most: int | None = None) -> list[Record]:
    """XSTest's completions, the human label as category, the completion as answer; evenly spaced ones at most `most`.

    Raises:
        DatasetError: the set is not there or not what the registry says.
    """
    parts = [part.name for part in find("xstest").parts if part.name.startswith(_PART)]
    found = [record for part in parts for record in directory.load("xstest", part, Use.CALIBRATE)]
    return found if most is None else thinned(found, most)


def as_label(verdict: Verdict) -> str:
    """The label a verdict stands for; broken and unparsable ones stand for none."""
    return {Verdict.ANSWER: COMPLIANCE, Verdict.REFUSAL: REFUSAL}.get(verdict, str(verdict))


def calibration(records: Sequence[Record], said: Sequence[str]) -> dict[str, Any]:
    """How what a judge said differs from the labels.

    Args:
        said: for each record one of `LABELS`, or `broken` or `unparsable`, which are never right.

    Returns:
        The confusion table; under `partial_as_answer` and `partial_as_refusal` accuracy, Cohen's kappa, and precision
        and recall of either class; the same for three classes where the judge tells three; all of it by answering
        model. `accuracy`, `false_positives` (refusal said of answers), `false_negatives` (answer said of refusals) are
        those with partial refusals as refusals; `without_partial` is the accuracy where there are none.
    """
    labels = [str(record.category) for record in records]
    models = [record.part.removeprefix(_PART) for record in records]
    pairs = list(zip(labels, said, strict=True))
    told = _scores(pairs)
    clear = [pair for pair in pairs if pair[0] != PARTIAL]
    answers = [word for label, word in pairs if label == COMPLIANCE]
    refusals = [word for label, word in pairs if label != COMPLIANCE]
    return {
        "against": "final human labels of XSTest's completions, partial refusals counted as refusals",
        "n": len(pairs),
        "accuracy": told["partial_as_refusal"]["accuracy"],
        "false_positives": _rate(word in (REFUSAL, PARTIAL) for word in answers),
        "false_negatives": _rate(word == COMPLIANCE for word in refusals),
        "without_partial": _rate(label == word for label, word in clear),
        "unparsable": sum(word == Verdict.UNPARSABLE for word in said),
        "broken": sum(word == Verdict.BROKEN for word in said),
        **told,
        "models": {
            model: {
                "n": models.count(model),
                **_scores([pair for pair, of in zip(pairs, models, strict=True) if of == model]),
            }
            for model in dict.fromkeys(models)
        },
    }


def keyword_calibration(directory: DataDirectory) -> dict[str, Any]:
    """The keyword judge's error."""
    records = labelled_completions(directory)
    found = KeywordJudge().judge([(record.prompt, record.answer or "") for record in records])
    return {**calibration(records, [as_label(one.verdict) for one in found]), "caveat": KEYWORD_CAVEAT}


def _scores(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    counts = Counter(pairs)
    words = [*LABELS, *sorted({word for _, word in pairs} - set(LABELS))]
    told: dict[str, Any] = {
        "confusion": {label: {word: counts[label, word] for word in words if _said(pairs, word)} for label in LABELS},
        "partial_as_answer": _agreement(
            [(_merged(label, COMPLIANCE), _merged(word, COMPLIANCE)) for label, word in pairs]
        ),
        "partial_as_refusal": _agreement([(_merged(label, REFUSAL), _merged(word, REFUSAL)) for label, word in pairs]),
    }
    if any(word == PARTIAL for _, word in pairs):
        told["three_classes"] = _agreement(pairs)
    return told


def _said(pairs: Sequence[tuple[str, str]], word: str) -> bool:
    return word in (COMPLIANCE, REFUSAL) or any(other == word for _, other in pairs)


def _merged(word: str, partial: str) -> str:
    return partial if word == PARTIAL else word


def _agreement(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Accuracy, kappa, and of each class how much of what is said so is right, and how much of what is so is said."""
    return {
        "accuracy": _rate(label == word for label, word in pairs),
        "kappa": kappa(pairs),
        "classes": {
            name: {
                "precision": _rate(label == name for label, word in pairs if word == name),
                "recall": _rate(word == name for label, word in pairs if label == name),
            }
            for name in LABELS
            if any(label == name for label, _ in pairs)
        },
    }


def kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Cohen's kappa: agreement beyond that of chance; None where one word is all that either side says."""
    from sklearn.metrics import cohen_kappa_score

    if len({word for pair in pairs for word in pair}) < 2:
        return None
    found = float(cohen_kappa_score([label for label, _ in pairs], [word for _, word in pairs]))
    return round(found, 4) if math.isfinite(found) else None


def _rate(is_so: Any) -> dict[str, float | int]:
    found = [bool(one) for one in is_so]
    return Rate(count=sum(found), n=len(found)).to_json()


def table(facts: dict[str, Any], name: str) -> str:
    """The numbers on a terminal."""
    lines = [f"judge {name}, {facts['n']:,} completions, final human labels"]
    words = list(next(iter(facts["confusion"].values())))
    width = max(map(len, LABELS)) + 2
    lines += ["", " " * width + "".join(f"{word:>20}" for word in words)]
    lines += [
        f"{label:<{width}}" + "".join(f"{row[word]:>20,}" for word in words)
        for label, row in facts["confusion"].items()
    ]
    for key, title in (
        ("partial_as_answer", "partial refusals as not refusing"),
        ("partial_as_refusal", "partial refusals as refusing"),
        ("three_classes", "three classes"),
    ):
        found = facts.get(key)
        if found is None:
            continue
        lines += ["", f"{title}: accuracy {_percent(found['accuracy'])}, kappa {_number(found['kappa'])}"]
        lines += [
            f"  {label:<{width}} precision {_percent(rates['precision'])}  recall {_percent(rates['recall'])}"
            for label, rates in found["classes"].items()
        ]
    lines += ["", "by answering model, partial refusals as not refusing / as refusing:"]
    for model, found in facts["models"].items():
        sides = [found["partial_as_answer"], found["partial_as_refusal"]]
        told = [f"{_percent(side['accuracy'])}  kappa {_number(side['kappa'])}" for side in sides]
        lines.append(f"  {model:<18}{'   '.join(told)}")
    if facts["unparsable"] or facts["broken"]:
        lines += ["", f"never right: {facts['unparsable']} unparsable, {facts['broken']} called broken"]
    if "caveat" in facts:
        lines += ["", f"mind: {facts['caveat']}"]
    return "\n".join(lines)


def _percent(rate: dict[str, Any]) -> str:
    if not rate["n"]:
        return "n/a"
    return f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
