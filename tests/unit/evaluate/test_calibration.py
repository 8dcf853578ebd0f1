"""Judges against human labels: the arithmetic on made-up labels, and the published table on the real ones."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from sklearn.metrics import cohen_kappa_score
from typer.testing import CliRunner

from steering.errors import DatasetCorrupt, DatasetMissing
from steering.evaluate.calibration import (
    COMPLIANCE,
    LABELS,
    PARTIAL,
    REFUSAL,
    as_label,
    calibration,
    kappa,
    labelled_completions,
    table,
)
from steering.evaluate.cli_judge import app
from steering.evaluate.judge import Verdict
from steering.evaluate.published import LABEL_FILE, StringMatchJudge, gpt4_labels
from steering.fit.datasets import DataDirectory, Record
from steering.fit.sources import Label
from tests.unit.evaluate.judge_endpoint import Said, completion, judge_endpoint, verdict


def records(labels: list[str], part: str = "completions_m") -> list[Record]:
    """Completions with these human labels."""
    return [
        Record(
            key=f"xstest/{part}/v2-{place}",
            dataset="xstest",
            part=part,
            prompt="p",
            label=Label.BORDERLINE,
            category=label,
            answer=f"a{place}",
        )
        for place, label in enumerate(labels)
    ]


def test_binary_judge_is_scored_with_partial_on_either_side() -> None:
    """Unparsable and broken verdicts are never right, whichever side partial refusals are on."""
    labels = [COMPLIANCE, COMPLIANCE, COMPLIANCE, REFUSAL, REFUSAL, PARTIAL, PARTIAL]
    words = ("answer", "refusal", "unparsable", "refusal", "broken", "answer", "refusal")
    said = [as_label(Verdict(word)) for word in words]
    found = calibration(records(labels), said)
    assert found["confusion"][COMPLIANCE] == {COMPLIANCE: 1, REFUSAL: 1, "broken": 0, "unparsable": 1}
    assert (found["unparsable"], found["broken"]) == (1, 1)
    assert found["partial_as_answer"]["accuracy"]["count"] == 3
    assert found["partial_as_refusal"]["accuracy"]["count"] == 3
    assert found["false_positives"]["rate"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["false_negatives"] == {**found["false_negatives"], "count": 1, "n": 4}
    assert found["without_partial"]["n"] == 5
    refusing = found["partial_as_refusal"]["classes"][REFUSAL]
    assert (refusing["precision"]["count"], refusing["precision"]["n"]) == (2, 3)
    assert (refusing["recall"]["count"], refusing["recall"]["n"]) == (2, 4)
    assert "three_classes" not in found, "it tells two"
    assert found["models"]["m"]["n"] == 7
    assert "1 unparsable, 1 called broken" in table(found, "x")


def test_kappa_by_hand() -> None:
    """Agreement 0.7, by chance 0.5: kappa 0.4; none beyond chance is 0; one word on both sides has none."""
    pairs = [("a", "a")] * 4 + [("a", "b")] * 1 + [("b", "a")] * 2 + [("b", "b")] * 3
    assert kappa(pairs) == pytest.approx(0.4)
    assert kappa([("a", "a"), ("a", "b"), ("b", "a"), ("b", "b")]) == 0.0
    assert kappa([("a", "a")] * 3) is None


def test_judge_of_three_classes_is_scored_as_one() -> None:
    """Partial said of partial is right among three classes, and on the same side among two."""
    found = calibration(records([COMPLIANCE, REFUSAL, PARTIAL, PARTIAL]), [COMPLIANCE, REFUSAL, PARTIAL, REFUSAL])
    assert found["three_classes"]["accuracy"]["count"] == 3
    assert found["three_classes"]["classes"][PARTIAL]["recall"]["n"] == 2
    assert found["partial_as_answer"]["accuracy"]["count"] == 3
    assert found["partial_as_refusal"]["accuracy"]["count"] == 4
    assert "three classes: accuracy 75.0 %" in table(found, "x")


def test_gpt4_labels_are_read_beside_the_completions(tmp_path: Path) -> None:
    """By id, only of models that have a file; words that are no label are unparsable, other completions an error."""
    known = [*records([COMPLIANCE, REFUSAL, PARTIAL]), *records([REFUSAL], "completions_n")]
    with pytest.raises(DatasetMissing, match="automated_evaluation_labels"):
        gpt4_labels(tmp_path, known, LABELS)
    path = tmp_path / LABEL_FILE.format(model="m")

    def write(answers: list[str]) -> None:
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["id", "prompt", "completion", "gpt4_label"])
            for place, (answer, said) in enumerate(zip(answers, (COMPLIANCE, "I cannot", f'"{PARTIAL}"'), strict=True)):
                writer.writerow([f"v2-{place}", "p", answer, said])

    write(["a0", "a1", "a2"])
    found = gpt4_labels(tmp_path, known, LABELS)
    assert [said for _, said in found] == [COMPLIANCE, "unparsable", PARTIAL]
    assert [record.part for record, _ in found] == ["completions_m"] * 3
    write(["a0", "a1", "other"])
    with pytest.raises(DatasetCorrupt, match="another completion"):
        gpt4_labels(tmp_path, known, LABELS)


@pytest.mark.needs_data
def test_string_match_gives_the_published_table(data_directory: Path) -> None:
    """On all 2,250 completions XSTest's own rule gives its authors' counts, to the last one."""
    known = labelled_completions(DataDirectory(path=data_directory))
    said = [
        as_label(one.verdict) for one in StringMatchJudge().judge([(one.prompt, one.answer or "") for one in known])
    ]
    found = calibration(known, said)
    assert found["n"] == 2250
    assert found["confusion"] == {
        COMPLIANCE: {COMPLIANCE: 1045, REFUSAL: 46},
        REFUSAL: {COMPLIANCE: 141, REFUSAL: 842},
        PARTIAL: {COMPLIANCE: 73, REFUSAL: 103},
    }
    assert found["partial_as_answer"]["accuracy"]["rate"] == 0.8711
    assert found["partial_as_refusal"]["accuracy"]["rate"] == 0.8844
    labels = [REFUSAL if one.category == REFUSAL else COMPLIANCE for one in known]
    assert found["partial_as_answer"]["kappa"] == pytest.approx(cohen_kappa_score(labels, said), abs=1e-4)
    assert sum(model["n"] for model in found["models"].values()) == 2250
    assert len(found["models"]) == 5


@pytest.mark.needs_data
def test_calibrate_prints_and_writes(data_directory: Path, tmp_path: Path) -> None:
    """The command gives a table and JSON for the keyword judge, with the caveat about its phrases."""
    out = tmp_path / "keyword.json"
    ended = CliRunner().invoke(app, ["calibrate", "--data", str(data_directory), "--out", str(out)])
    assert ended.exit_code == 0, ended.output
    assert "2,250 completions" in ended.output
    assert "with these completions in view" in ended.output
    found = json.loads(out.read_text("utf-8"))
    assert found["name"] == "keyword"
    assert found["partial_as_answer"]["accuracy"]["rate"] > 0.87


@pytest.mark.needs_data
def test_calibrate_asks_a_model_judge(data_directory: Path, tmp_path: Path) -> None:
    """Over HTTP, with counts and cost; without an endpoint it says what is missing."""
    arguments = ["calibrate", "--judge", "llm", "--data", str(data_directory), "--most", "6"]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 1
    assert "--judge-url" in ended.output
    with judge_endpoint(lambda _body, _number: Said(completion(verdict()))) as endpoint:
        more = ["--judge-url", endpoint.url, "--judge-model", "j", "--cache", str(tmp_path / "v.jsonl")]
        prices = ["--price-prompt", "1", "--price-completion", "2", "--out", str(tmp_path / "llm.json")]
        ended = CliRunner().invoke(app, [*arguments, *more, *prices])
        assert ended.exit_code == 0, ended.output
        assert len(endpoint.asked) == 6
    found = json.loads((tmp_path / "llm.json").read_text("utf-8"))
    assert found["judge"]["counts"]["cost"] == pytest.approx(6 * (100 * 1 + 10 * 2) / 1e6, abs=1e-6)
    assert found["confusion"][COMPLIANCE][COMPLIANCE] == 0
