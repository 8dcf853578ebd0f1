"""Topic fits of thinking models: edits that begin with the answer are measured so, and the bundle says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steering.bundle import load_bundle
from steering.engine.asks import Ask
from steering.errors import FitError
from steering.fit.topic_settings import TopicSettings
from steering.plan import Reasoning, Scope
from tests.unit.fit.planted import PlantedEngine
from tests.unit.fit.planted_fits import SMALL, planted_fit

SPARED = replace(SMALL, scope=Scope.GENERATED, reasoning=Reasoning.SPARED)


def test_reasoning_is_spared_by_edits_of_what_is_generated_only() -> None:
    """An edit of every position would begin in the prompt; the message names the option."""
    with pytest.raises(FitError, match="--scope must be generated, got all"):
        TopicSettings(reasoning=Reasoning.SPARED)


def test_a_model_that_does_not_think_has_nothing_to_spare(tmp_path: Path) -> None:
    """Told after its answers are there, before anything is searched for."""
    with pytest.raises(FitError, match="leave --reasoning out"):
        planted_fit(tmp_path, SPARED).run()


def test_what_is_measured_is_what_the_bundle_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every edit the fit tries spares reasoning, and so does every profile it writes."""
    end = {"token": "</think>", "token_id": 7}
    for module in ("topics", "topic_bundle"):
        monkeypatch.setattr(f"steering.fit.{module}.reasoning_end", lambda _answers: end)
    monkeypatch.setattr("steering.fit.topics.draw_stage", lambda path, _draw, *_results: path.touch())
    tried: list[Reasoning] = []
    answer = PlantedEngine.ask

    def ask(self: PlantedEngine, asks: Sequence[Ask], *rest: Any) -> Any:
        tried.extend(order.reasoning for one in asks for order in (one.edit, one.gate) if order is not None)
        return answer(self, asks, *rest)

    monkeypatch.setattr(PlantedEngine, "ask", ask)
    fitted = planted_fit(tmp_path, SPARED)
    fitted.run()
    manifest = load_bundle(fitted.bundle).manifest
    assert set(tried) == {Reasoning.SPARED}
    assert {profile.reasoning for profile in manifest.profiles} == {"spared"}
    assert manifest.reasoning_end is not None
    assert manifest.reasoning_end.token_id == 7
