"""The bench without engines: its statistics, its processes, what it measures, and what it writes."""

from __future__ import annotations

import json
import math
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from server.bench import host, report
from server.bench.cli import app
from server.bench.companion import companion
from server.bench.report import ratio_of
from server.bench.subject import Kind, Subject, subject_of
from steering.errors import EngineError, FingerprintMismatch, OperatorError
from tests.samples import random_edit, write_bundle


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that a fingerprint can be taken of."""
    folder = tmp_path / "some-model"
    folder.mkdir()
    shape = {"hidden_size": 16, "num_hidden_layers": 4, "vocab_size": 64}
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **shape}))
    save_file({"weight": torch.zeros(4)}, folder / "model.safetensors")
    return folder


def test_a_ratio_is_the_median_of_the_pairs_own_ratios() -> None:
    """A machine that slows down halfway moves both rates of a pair, and so neither the ratio nor its interval."""
    rates = [(98.0, 100.0)] * 5 + [(49.0, 50.0)] * 5
    ratio = ratio_of("arm", rates, target=0.97)
    assert math.isclose(ratio.median, 0.98)
    assert math.isclose(ratio.low, 0.98)
    assert math.isclose(ratio.high, 0.98)
    assert ratio.verdict == "met"


def test_one_disturbed_round_does_not_decide() -> None:
    """A pair in which a neighbour took half the machine shows in the spread, not in the median."""
    ratio = ratio_of("arm", [(95.0, 100.0)] * 8 + [(40.0, 100.0), (190.0, 100.0)], target=0.97)
    assert math.isclose(ratio.median, 0.95)
    assert (ratio.smallest, ratio.largest) == (0.4, 1.9)
    assert ratio.low <= ratio.median <= ratio.high
    assert ratio.verdict == "missed"
    assert "missed" in ratio.line()


def test_nothing_asked_means_no_verdict() -> None:
    """An arm without a target is shown and not judged."""
    ratio = ratio_of("arm", [(1.0, 2.0)])
    assert (ratio.median, ratio.verdict) == (0.5, "")
    assert "asked" not in ratio.line()


def test_the_file_says_when_and_on_what_and_nothing_of_where(tmp_path: Path) -> None:
    """Date, processor, cores, versions and every pair; no host name and no path of the machine."""
    path = report.write(
        tmp_path / "results", {"subject": {"model": "demo"}}, [ratio_of("arm", [(1.0, 1.0)], target=0.9)]
    )
    text = path.read_text(encoding="utf-8")
    document = json.loads(text)
    assert document["machine"]["cores"] >= 1
    assert document["machine"]["packages"]["torch"]
    assert document["ratios"][0]["pairs"] == [1.0]
    assert document["ratios"][0]["verdict"] == "met"
    assert document["measured"].endswith("+00:00")
    assert socket.gethostname() not in text
    assert str(Path.cwd()) not in text
    assert str(Path.home()) not in text


def test_a_model_without_a_bundle_is_measured_with_random_directions(model: Path, tmp_path: Path) -> None:
    """One unit direction per edit at the middle layer, bound to the model by its fingerprint."""
    subject = subject_of(model, None, tmp_path)
    assert subject.is_random
    assert subject.facts["bundle"] == "random directions"
    assert subject.facts["model"] == "some-model"
    assert {terms.layer for edit in subject.bundle.edits.values() for terms in edit.layers} == {2}
    assert str(tmp_path) not in json.dumps(subject.facts)


def test_plans_are_all_alike_or_all_different(model: Path, tmp_path: Path) -> None:
    """`steered` uses one edit at one strength, `distinct` as many (edit, strength) pairs as there are requests."""
    subject = subject_of(model, None, tmp_path)
    alike = {(plan.edit, plan.strength) for plan in subject.plans(32, Kind.STEERED)}
    different = {(plan.edit, plan.strength) for plan in subject.plans(32, Kind.DISTINCT)}
    assert len(alike) == 1
    assert len(different) == 32
    assert len({edit for edit, _ in different}) == len(subject.bundle.edits)


def test_a_gate_decides_for_every_request_of_its_arm(model: Path, tmp_path: Path) -> None:
    """`auto` names no edit: the hard sign makes the gate edit each request, at layers that the arm knows."""
    subject = subject_of(model, None, tmp_path)
    plans = subject.plans(4, Kind.AUTO)
    assert {plan.edit for plan in plans} == {None}
    assert {(plan.gate.comply_below, plan.gate.refuse_above) for plan in plans if plan.gate} == {(0.5, 0.5)}
    assert subject.layers(Kind.AUTO) == {2}
    ungated = write_bundle(tmp_path / "ungated", {"e": random_edit("e", ranks={0: 1})})
    with pytest.raises(OperatorError, match="no profile with a gate"):
        Subject(model=model, bundle=ungated, is_random=False).plans(1, Kind.AUTO)


def test_a_bundle_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    """The bench serves what the server would serve."""
    write_bundle(tmp_path / "other", {"e": random_edit("e", ranks={0: 1})})
    with pytest.raises(FingerprintMismatch):
        subject_of(model, tmp_path / "other", tmp_path)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    """The operator is told what to name."""
    with pytest.raises(OperatorError, match="--model"):
        subject_of(tmp_path / "absent", None, tmp_path)


def test_host_cost_is_measured_for_every_batch(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive times; per steered request where some are steered."""
    monkeypatch.setattr(host, "STEPS", 100)
    lines = host.measure(subject_of(model, None, tmp_path))
    assert [(line["requests"], line["steered"]) for line in lines] == list(host.BATCHES)
    for line in lines:
        assert line["microseconds_per_step"] > 0
        assert (line["microseconds_per_steered_request"] is None) == (line["steered"] == 0)


COMPANION = """
import json, sys
from server.bench.companion import serve, take_over_output

answers = take_over_output()
print("a library prints where it should not")


def work(number):
    if number < 0:
        raise SystemExit("own last words")
    print("again")
    return {"double": 2 * number}


serve(answers, {"ready": json.loads(sys.argv[1])}, work)
"""


@pytest.fixture
def doubler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A companion's module."""
    (tmp_path / "doubler.py").write_text(COMPANION)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(report.__file__).parents[2]}")
    return "doubler"


def test_a_companion_answers_order_by_order(doubler: str) -> None:
    """Settings reach it, answers come back in order, and what its libraries print stays out of the way."""
    with companion(doubler, {"a": 1}) as made:
        assert made.wait_until_ready() == {"ready": {"a": 1}}
        assert [made.ask(number=number) for number in (1, 5)] == [{"double": 2}, {"double": 10}]


def test_a_companion_that_ends_is_an_error_with_its_last_words(doubler: str) -> None:
    """What it wrote to its log is in the message; the bench never reports a round that did not happen."""
    with companion(doubler, {}) as made:
        made.wait_until_ready()
        with pytest.raises(EngineError, match="own last words"):
            made.ask(number=-1)


PARENT = """
import json, subprocess, sys
from server.bench.companion import serve, take_over_output

answers = take_over_output()
child = subprocess.Popen(["sleep", "600"])
serve(answers, {"child": child.pid}, dict)
"""


def test_a_companions_own_processes_end_with_it(doubler: str, tmp_path: Path) -> None:
    """An engine that outlives its companion would keep the memory of a GPU."""
    (tmp_path / "parent.py").write_text(PARENT)
    with companion("parent", {}) as made:
        child = made.wait_until_ready()["child"]
        assert Path(f"/proc/{child}").exists()
    deadline = time.monotonic() + 10
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _is_running(child)


def _is_running(process: int) -> bool:
    """A process that has ended and was not waited for, as in a container without an init, counts as ended."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("options", ["[1]", "{", "5"])
def test_engine_options_must_be_an_object(options: str) -> None:
    """A mistake on the command line is an operator's error before anything is started."""
    result = CliRunner().invoke(app, ["--only", "host", "--options", options])
    assert isinstance(result.exception, OperatorError)
