"""lm-evaluation-harness: what is asked of it, what it answers, and how its errors are told.

`lm_eval_results.json` is what `trimtab eval ability` wrote over the served demo with the real harness 0.4.13, from
GSM8K's own test file (`--include-path`, no examples in the prompt, 20 questions). Make it again with that command.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from steering.errors import OperatorError
from steering.evaluate.harness import benchmark, check_installed

RECORDED = json.loads((Path(__file__).parent / "lm_eval_results.json").read_text(encoding="utf-8"))
ARMS = {"unsteered": {"mode": "off"}, "auto": {"mode": "auto"}}


class Harness:
    """Stands in for the package: answers as the real one did, or raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self.included: list[str] = []
        self.error = error

    def simple_evaluate(self, **given: Any) -> dict[str, Any]:
        """What was recorded of the arm that is asked for."""
        self.calls.append(given)
        if self.error is not None:
            raise self.error
        (found,) = (arm for arm in RECORDED["arms"].values() if arm["steering"] == given["gen_kwargs"]["steering"])
        return {"results": found["results"]}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Harness:
        """Put it where the package would be imported from."""
        package, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
        package.simple_evaluate = self.simple_evaluate  # type: ignore[attr-defined]
        package.__version__ = RECORDED["harness"]  # type: ignore[attr-defined]
        tasks.TaskManager = lambda include_path: self.included.append(include_path) or include_path  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "lm_eval", package)
        monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
        monkeypatch.setattr("steering.evaluate.harness.check_installed", lambda *_args, **_more: None)
        return self


def _benchmark(**changed: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"tasks": ["gsm8k"], "limit": 20, "concurrency": 8, "allows_code": False, **changed}
    return benchmark(url="http://host:1/", model=RECORDED["model"], arms=ARMS, **asked)


def test_benchmarks_say_what_to_install_and_ask_before_running_code() -> None:
    """Without the optional package the message has the command; a task that runs code is refused unasked."""
    with pytest.raises(OperatorError, match="pip install"):
        check_installed(["gsm8k"], allows_code=False)
    with pytest.raises(OperatorError, match="--run-code"):
        check_installed(["humaneval"], allows_code=False)
    with pytest.raises(OperatorError, match="ifeval"):
        check_installed(["arc"], allows_code=False)


def test_benchmarks_send_steering_in_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each arm's field travels as a generation argument, which the harness puts into the body as it is."""
    harness = Harness().install(monkeypatch)
    _benchmark(tasks=["mmlu"])
    assert [call["gen_kwargs"] for call in harness.calls] == [{"steering": arm} for arm in ARMS.values()]
    assert harness.calls[0]["model_args"]["base_url"] == "http://host:1/v1/chat/completions"
    assert "header" not in harness.calls[0]["model_args"]
    assert harness.calls[0]["tasks"] == ["mmlu_generative"]
    assert harness.calls[0]["task_manager"] is None


def test_what_the_real_harness_gave_is_kept_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics are named `<metric>,<filter>` with their errors beside them, and the harness' version is told."""
    Harness().install(monkeypatch)
    told = _benchmark()
    assert told == RECORDED
    for arm in ARMS:
        found = told["arms"][arm]["results"]["gsm8k"]
        assert found["sample_len"] == 20
        for metric in ("exact_match,strict-match", "exact_match,flexible-extract"):
            assert 0.0 <= found[metric] <= 1.0
            assert found[metric.replace(",", "_stderr,")] >= 0.0


def test_a_folder_of_tasks_and_a_key_reach_the_harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The folder goes before the harness's own tasks; the key is sent as a bearer token."""
    harness = Harness().install(monkeypatch)
    _benchmark(include=tmp_path, key="secret")
    assert harness.included == [str(tmp_path)]
    assert harness.calls[0]["task_manager"] == str(tmp_path)
    assert harness.calls[0]["model_args"]["header"] == {"Authorization": "Bearer secret"}


def test_what_the_harness_raises_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that cannot be reached, a prompt beyond the context: the arm and the cause are named."""
    Harness(ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")).install(monkeypatch)
    with pytest.raises(OperatorError, match=r"arm 'unsteered': ConnectionError: .*gsm8k.*--include-path"):
        _benchmark()
