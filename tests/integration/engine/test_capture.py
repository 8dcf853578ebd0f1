"""Capture and the offline engine: residuals, given answers and samples of the real engine equal transformers'.

Residuals are compared relative to their size. Both sides compute in float32 but sum in another order; where vLLM
computes in bfloat16 only (gated delta net on the CPU), the tolerance is that of its rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steering.fit.captured import CapturedShards
from steering.plan import Scope
from tests.integration.engine.checks import FLOAT32_TOLERANCE, prompt_of
from tests.integration.engine.conftest import Tiny
from tests.integration.engine.driver import play
from tests.integration.engine.offline import OfflineAsk, OfflineResult, OfflineScenario, play_offline
from tests.integration.engine.scenario import Ask, Scenario
from tests.integration.engine.test_parity import BFLOAT16_TOLERANCE

LAYERS = [0, 1, 3]
GENERATED = 3

# 16 sequences at once over chunks of 48 tokens, and few blocks: prompts in pieces, decodes beside them, preemption.
CROWDED: dict[str, Any] = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 48,
    "num_gpu_blocks_override": 14,
    "block_size": 32,
    "max_model_len": 192,
    "enable_prefix_caching": True,
}


def order(edit: str, strength: float = 1.0, scope: Scope = Scope.GENERATED) -> dict[str, Any]:
    """The fields of an edit order."""
    return {"edit": edit, "strength": strength, "scope": scope.value}


def asks_of(lengths: Sequence[int], *, count: int = 5) -> list[OfflineAsk]:
    """Capturing asks of every kind: sampled twice, alike prompts, edited, answers given."""
    asks = [
        OfflineAsk(prompt=prompt_of(length, 40 + number), max_tokens=count, capture=True)
        for number, length in enumerate(lengths)
    ]
    asks.append(replace(asks[-1], samples=2, temperature=1.0, seed=3))
    asks.append(replace(asks[0], answer=prompt_of(GENERATED + 2, 5)))
    asks.append(replace(asks[1], max_tokens=2))
    asks.append(replace(asks[0], order=order("add everywhere")))
    asks.append(replace(asks[1], order=order("several terms", -0.5, Scope.ALL)))
    return asks


def expected_residuals(model: Tiny, ask: OfflineAsk, tokens: Sequence[int], layer: int) -> torch.Tensor:
    """[1 + n, D] at the last prompt token and at the first generated ones, before the layer's own edit."""
    what = ask.order or {}
    return model.oracle.residuals(
        ask.prompt,
        [*ask.prompt, *tokens],
        layer,
        edit=what.get("edit"),
        strength=what.get("strength", 1.0),
        scope=what.get("scope", "generated"),
    )


def check_captured(
    model: Tiny, asks: Sequence[OfflineAsk], answers: Sequence[dict[str, Any]], folder: Path, tolerance: float
) -> None:
    """Every capturing ask's residuals are the oracle's, as far as tokens were fed back; relative to their size."""
    shards = CapturedShards(folder)
    kept = [(ask, answer) for ask, answer in zip(asks, answers, strict=True) if ask.capture]
    assert shards.count == len(kept)
    for layer in shards.layers:
        last, (generated, mask) = shards.layer(layer), shards.generated(layer)
        for row, (ask, answer) in enumerate(kept):
            given = ask.answer if ask.answer is not None else answer["samples"][0]["tokens"][:-1]
            fed = given[:GENERATED]
            found = torch.cat([last[row : row + 1], generated[row][mask[row]]])
            if len(found) == len(fed) + 2 and ask.answer is None:
                found = found[:-1]  # an engine that schedules ahead has fed back the last token too
            expected = expected_residuals(model, ask, fed, layer)
            assert found.shape == expected.shape, f"ask {row} at layer {layer}"
            off = float((found - expected).norm() / expected.norm())
            assert off <= tolerance, f"ask {row} at layer {layer}: off by {off:.2e}"


@pytest.fixture(scope="module")
def crowded(
    tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tiny, list[list[OfflineAsk]], OfflineResult, Path]:
    """Capturing asks beside others in a crowded engine; then the same prompts again, from the cache."""
    model, folder = tiny("llama"), tmp_path_factory.mktemp("crowded-capture")
    asks = asks_of([100, 5, 70, 1, 61, 33, 64, 90])
    others = [replace(ask, capture=False) for ask in asks]
    again = [ask for ask in asks[:7] if ask.answer is None]
    scenario = OfflineScenario(
        model=str(model.model),
        bundle=model.bundle_path,
        capture={"folder": str(folder / "kept"), "layers": LAYERS, "generated": GENERATED, "shard_bytes": 8000},
        rounds=[[*asks, *others], again],
        arguments=CROWDED,
    )
    return model, [*scenario.rounds], play_offline(scenario, folder), folder / "kept"


class TestCapture:
    """Chunked prefill, prefix-cache hits, n = 2, preemption, given answers, edits of either scope, neighbours."""

    def test_residuals_are_those_of_transformers(
        self, crowded: tuple[Tiny, list[list[OfflineAsk]], OfflineResult, Path]
    ) -> None:
        """At the last prompt token and at the first generated tokens, each once, in the order of the asks."""
        model, rounds, result, folder = crowded
        asks = [ask for round_ in rounds for ask in round_]
        answers = [answer for round_ in result.rounds for answer in round_]
        check_captured(model, asks, answers, folder, 20 * FLOAT32_TOLERANCE)
        assert len(list(folder.glob("*.safetensors"))) > 3, "shards are cut by size"
        assert result.report["captured"] == LAYERS

    def test_given_answers_score_as_the_oracle_says(
        self, crowded: tuple[Tiny, list[list[OfflineAsk]], OfflineResult, Path]
    ) -> None:
        """Log-probabilities of given and of sampled tokens, under each ask's own edit, strength and scope."""
        model, rounds, result, _ = crowded
        for ask, answer in zip(rounds[0], result.rounds[0], strict=True):
            what = ask.order or {"edit": None}
            texts = [(ask.answer, answer["given"])] if ask.answer else []
            texts += [(sample["tokens"], sample["logprobs"]) for sample in answer["samples"]]
            assert len(texts) == ask.samples
            for tokens, logprobs in texts:
                score = model.oracle.score(ask.prompt, tokens, **what)
                assert logprobs == pytest.approx(score.given, abs=FLOAT32_TOLERANCE)

    def test_requests_that_do_not_ask_equal_stock_vllm(
        self, crowded: tuple[Tiny, list[list[OfflineAsk]], OfflineResult, Path], tmp_path: Path
    ) -> None:
        """In an engine that captures, beside requests that do, an unsteered greedy answer is stock vLLM's."""
        model, rounds, result, _ = crowded
        plain = [
            (ask, answer)
            for ask, answer in zip(rounds[0], result.rounds[0], strict=True)
            if not ask.capture and ask.samples == 1 and ask.order is None and ask.answer is None
        ]
        assert len(plain) >= 8
        stock_asks = [Ask(prompt=ask.prompt, count=ask.max_tokens) for ask, _ in plain]
        stock = play(Scenario(model=str(model.model), bundle=None, rounds=[stock_asks], arguments=CROWDED), tmp_path)
        assert [got.tokens[0] for got in stock.rounds[0]] == [answer["samples"][0]["tokens"] for _, answer in plain]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_next"])
def test_residuals_of_other_families(family: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Qwen3, and Qwen3-Next with its linear attention and experts; without any bundle, at every layer asked for."""
    model = tiny(family)
    is_bfloat16 = family == "qwen3_next"
    asks = [
        OfflineAsk(prompt=prompt_of(length, 60 + number), max_tokens=5, capture=True)
        for number, length in enumerate((9, 1, 30))
    ]
    scenario = OfflineScenario(
        model=str(model.model),
        capture={"folder": str(tmp_path / "kept"), "layers": LAYERS, "generated": GENERATED},
        rounds=[asks],
        arguments={"dtype": "bfloat16" if is_bfloat16 else "float32", "max_model_len": 128, "max_num_seqs": 4},
    )
    result = play_offline(scenario, tmp_path)
    tolerance = BFLOAT16_TOLERANCE if is_bfloat16 else 20 * FLOAT32_TOLERANCE
    check_captured(model, asks, result.rounds[0], tmp_path / "kept", tolerance)


def test_capture_on_model_runner_v2(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """The runner GPUs use, with the Triton kernels, both interpreted: chunks, a given answer, an edit, few tokens."""
    model = tiny("llama")
    asks = [ask for ask in asks_of([20, 33], count=GENERATED + 1) if ask.samples == 1]
    scenario = OfflineScenario(
        model=str(model.model),
        bundle=model.bundle_path,
        capture={"folder": str(tmp_path / "kept"), "layers": LAYERS, "generated": GENERATED},
        rounds=[asks],
        arguments={"max_num_seqs": 8, "max_num_batched_tokens": 32, "block_size": 32, "max_model_len": 128},
        environment={"TRIMTAB_KERNEL": "triton"},
        v2_interpreted=True,
    )
    result = play_offline(scenario, tmp_path)
    assert result.report["runner"] == "v2"
    check_captured(model, asks, result.rounds[0], tmp_path / "kept", 20 * FLOAT32_TOLERANCE)


def test_a_folder_is_gone_on_with_and_never_mixed(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Of six prompts three are in files already; asked again, the other three are added. Other prompts are refused."""
    model, folder = tiny("llama"), tmp_path / "kept"
    asks = [OfflineAsk(prompt=prompt_of(7, 90 + number)) for number in range(6)]
    capture = {"folder": str(folder), "layers": [2]}

    def run(*rounds: list[OfflineAsk]) -> OfflineResult:
        scenario = OfflineScenario(
            model=str(model.model), capture=capture, rounds=list(rounds), arguments=CROWDED, only_capture=True
        )
        return play_offline(scenario, tmp_path)

    run(asks[:3])
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert run(asks[:2], asks[2:]).rounds[-1] == [{"count": 6}]
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert before.items() < after.items()
    assert len(after) == 2
    found = CapturedShards(folder).layer(2)
    expected = torch.stack([model.oracle.residual(ask.prompt, 2) for ask in asks])
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(AssertionError, match="ask 0 is not the one whose residuals"):
        run(asks[1:])
