"""What a worker tells of a step: its own requests' reports, and none but these where one cannot be read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from steering.engine.model import Steering
from steering.outcome import Outcome, Response, report_from_bytes
from steering.plan import Scope


class FakeRows:
    """Rows of which the one named `broken` cannot be read."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def outcome(self, steered: Any, _table: memoryview, _place: int) -> Outcome:
        self.read.append(steered.request_id)
        if steered.request_id == "broken":
            raise KeyError(7.0)
        return Outcome(
            plan_id="p", request_id=steered.request_id, applied=True, edit="e", strength=1.0, scope=Scope.ALL
        )

    def response(self, steered: Any, _table: memoryview, _place: int) -> Response | None:
        if steered.request_id == "unread":
            return None
        return Response(plan_id="p", request_id=steered.request_id, tokens=2, score=0.5)


def steering(*, is_reporting: bool) -> Steering:
    """The state of a worker, as far as it reads a step."""
    made = object.__new__(Steering)
    made.rows = FakeRows()  # type: ignore[assignment]
    made._is_reporting = is_reporting
    return made


def due(*names: str) -> Any:
    """Requests that a step made something known of, each with its row."""
    return [(SimpleNamespace(request_id=name), number) for number, name in enumerate(names)]


def test_each_request_is_told_of_and_a_broken_one_takes_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """Its outcome before its response; of what cannot be read, and of what read nothing, there is no report."""
    told = steering(is_reporting=True)._read(memoryview(b""), due("a", "broken", "b"), due("b", "unread"))
    kinds = {name: [type(report_from_bytes(report)) for report in reports] for name, reports in told.items()}
    assert kinds == {"a": [Outcome], "b": [Outcome, Response]}
    assert "what was done to request broken cannot be read" in caplog.text


def test_a_rank_that_does_not_tell_reads_all_the_same() -> None:
    """What a gate decided has to be known for a later preemption, where nobody listens and on every other rank."""
    silent = steering(is_reporting=False)
    assert silent._read(memoryview(b""), due("a", "b"), due("a")) == {}
    assert silent.rows.read == ["a", "b"]  # type: ignore[attr-defined]


def test_reports_are_taken_once() -> None:
    """With the output of their own step; a step that makes nothing known has none."""
    made = steering(is_reporting=True)
    made._reports = {"a": [b"a"]}
    assert made.take_reports() == {"a": [b"a"]}
    assert made.take_reports() is None
