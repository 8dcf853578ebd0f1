"""Two tensor-parallel ranks edit, decide and capture as one engine does; the first of them tells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engine.checks import FLOAT32_TOLERANCE, check_against_oracle
from tests.integration.engine.conftest import Tiny
from tests.integration.engine.driver import Result, Scenario, play
from tests.integration.engine.offline import OfflineScenario, play_offline
from tests.integration.engine.test_capture import GENERATED, LAYERS, asks_of, check_captured
from tests.integration.engine.test_parity import every_edit
from tests.integration.engine.test_runners import CROWDED, crowd

TWO_RANKS: dict[str, Any] = {"tensor_parallel_size": 2}
UNBOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""By default vLLM gives every CPU rank a NUMA node of its own."""


@pytest.fixture(scope="module")
def two_ranks(tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, Result]:
    """A crowded engine of two ranks, then every edit in one batch."""
    model = tiny("llama")
    scenario = Scenario(
        model=str(model.model),
        bundle=model.bundle_path,
        rounds=[crowd(8), every_edit(3)],
        arguments={**CROWDED, **TWO_RANKS},
        environment=UNBOUND,
    )
    return model, play(scenario, tmp_path_factory.mktemp("two-ranks"))


class TestTwoRanks:
    """Chunked prefill, both scopes, n = 2, preemption, every kind of edit."""

    def test_each_request_is_edited_as_the_oracle_says(self, two_ranks: tuple[Tiny, Result]) -> None:
        """An edit that only one rank made would leave the ranks' residual streams apart, and the answers wrong."""
        model, result = two_ranks
        assert result.preemptions > 0
        for asks, got in zip([crowd(8), every_edit(3)], result.rounds, strict=True):
            check_against_oracle(model.oracle, asks, got)

    def test_every_steered_sample_is_reported_by_one_rank(self, two_ranks: tuple[Tiny, Result]) -> None:
        """One outcome a sample, as from a single rank."""
        steered = sum(ask.samples for ask in [*crowd(8), *every_edit(3)] if ask.edit is not None)
        request_ids = [outcome["request_id"] for outcome in two_ranks[1].outcomes]
        assert len(request_ids) == len(set(request_ids)) == steered


def test_two_ranks_capture_each_residual_once(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """The first rank writes the shards; residuals are those of transformers."""
    model = tiny("llama")
    asks = asks_of([100, 5, 1, 33])
    scenario = OfflineScenario(
        model=str(model.model),
        bundle=model.bundle_path,
        capture={"folder": str(tmp_path / "kept"), "layers": LAYERS, "generated": GENERATED},
        rounds=[asks],
        arguments=TWO_RANKS,
        environment=UNBOUND,
    )
    result = play_offline(scenario, tmp_path)
    check_captured(model, asks, result.rounds[0], tmp_path / "kept", 20 * FLOAT32_TOLERANCE)
