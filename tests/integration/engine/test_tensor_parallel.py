"""Two tensor-parallel ranks capture as one engine does; `test_gate` proves that they edit and decide as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.integration.engine.checks import FLOAT32_TOLERANCE
from tests.integration.engine.conftest import Tiny
from tests.integration.engine.driver import TWO_RANKS
from tests.integration.engine.offline import OfflineScenario, play_offline
from tests.integration.engine.test_capture import GENERATED, LAYERS, asks_of, check_captured


def test_two_ranks_capture_each_residual_once(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """The first rank writes the shards; residuals are those of transformers."""
    model = tiny("llama")
    asks = asks_of([100, 5, 1, 33])
    scenario = OfflineScenario(
        model=str(model.model),
        bundle=model.bundle_path,
        capture={"folder": str(tmp_path / "kept"), "layers": LAYERS, "generated": GENERATED},
        rounds=[asks],
        arguments={"tensor_parallel_size": 2},
        environment=TWO_RANKS,
    )
    result = play_offline(scenario, tmp_path)
    check_captured(model, asks, result.rounds[0], tmp_path / "kept", 20 * FLOAT32_TOLERANCE)
