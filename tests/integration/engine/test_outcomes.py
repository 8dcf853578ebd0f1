"""Outcomes on the real engine: what was done to a request is known no later than its first token (design rule 8)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.engine.gates import FEW_BLOCKS, Gated, gated_crowd
from tests.integration.engine.loading import LoadingScenario, Step, play_loading


@pytest.mark.parametrize("is_ahead", [False, True], ids=["in turn", "scheduling ahead"])
def test_an_outcome_is_there_when_its_first_token_is(gated: Gated, is_ahead: bool, tmp_path: Path) -> None:
    """After each engine step every sample of which it gave the first token has been told of: edits in both scopes,
    gates, n = 2, prompts in chunks, preempted requests.
    """
    asks = {f"{number}": ask for number, ask in enumerate(gated_crowd(gated, 6)) if len(ask.prompt) <= 90}
    bundle = str(gated.bundle.path)
    steps = [Step(do="ask", name=name, ask=ask, bundle=bundle) for name, ask in asks.items()]
    scenario = LoadingScenario(
        model=str(gated.tiny.model),
        bundle=bundle,
        terms=128,
        steps=[*steps, Step(do="run")],
        arguments={**FEW_BLOCKS, "num_gpu_blocks_override": 6, "async_scheduling": is_ahead},
    )
    result = play_loading(scenario, tmp_path)
    expected = [name for name, ask in asks.items() if ask.gate or ask.edit for _ in range(ask.samples)]
    assert result.late == []
    assert sorted(result.in_time) == sorted(expected)
    assert len(expected) > 15
    assert result.preemptions > 0
    assert result.scheduler == ("SteeringAsyncScheduler" if is_ahead else "SteeringScheduler")
