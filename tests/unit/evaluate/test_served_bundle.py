"""The folder of the served bundle: what an evaluation says of its response probe."""

from __future__ import annotations

from typing import Any, cast

from steering.bundle import Bundle
from steering.evaluate.served_bundle import ServedBundle, probe_error
from steering.fit.intervals import Rate


def served(report: dict[str, Any]) -> ServedBundle:
    """A bundle whose fit reported this."""
    return ServedBundle(bundle=cast("Bundle", None), report=report)


def test_the_response_probe_s_error_is_that_of_held_answers() -> None:
    """Accuracy with n, refusal said of answers, answer said of refusals, and whose labels they are."""
    told = probe_error(
        served(
            {
                "response": {
                    "labels": "the keyword judge",
                    "accuracy": Rate(count=45, n=50).to_json(),
                    "refusals_told": Rate(count=17, n=20).to_json(),
                    "answers_called_refusals": Rate(count=2, n=30).to_json(),
                }
            }
        )
    )
    assert told["accuracy"]["rate"] == 0.9
    assert (told["false_negatives"]["count"], told["false_negatives"]["n"]) == (3, 20)
    assert told["false_positives"]["count"] == 2
    assert "keyword judge" in told["against"]
    assert told["n"] == 50


def test_a_bundle_without_a_report_says_that_nothing_is_known() -> None:
    """No number is made up."""
    assert set(probe_error(served({}))) == {"error"}
