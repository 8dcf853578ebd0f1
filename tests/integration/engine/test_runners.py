"""The same claims on Model Runner V2 (the GPU's, on Triton's interpreter) and under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steering.bundle import save_bundle
from tests.integration.engine.checks import check_against_oracle, prompt_of
from tests.integration.engine.conftest import Tiny
from tests.integration.engine.driver import play
from tests.integration.engine.gates import Gated, check_gated, few_gated
from tests.integration.engine.pieces import PiecesScenario, cut
from tests.integration.engine.scenario import Ask, Result, Scenario
from tests.integration.engine.test_parity import BFLOAT16_TOLERANCE, every_edit

# Five sequences of up to 70 tokens in 3 blocks of 32 each do not fit into 8: some are preempted.
CROWDED: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "num_gpu_blocks_override": 9,
    "block_size": 32,
    "max_model_len": 128,
}


def crowd(count: int) -> list[Ask]:
    """Few tokens, every hard case: chunked prefill, decode beside it, both scopes, n = 2, unsteered, preemption."""
    return [
        Ask(prompt=prompt_of(60, 1), count=count, edit="add"),
        Ask(prompt=prompt_of(5, 2), count=count),
        Ask(prompt=prompt_of(61, 3), count=count, edit="several terms", strength=-1.0, scope="all"),
        Ask(prompt=prompt_of(33, 4), count=count, edit="add everywhere", samples=2),
        Ask(prompt=prompt_of(50, 5), count=count),
        Ask(prompt=prompt_of(1, 6), count=count, edit="reposition", strength=0.5),
    ]


@pytest.fixture(scope="module")
def crowded(tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, Result]:
    """A crowded engine, then every edit in one batch."""
    model = tiny("llama")
    scenario = Scenario(
        model=str(model.model),
        bundle=model.bundle_path,
        rounds=[crowd(8), every_edit(3)],
        arguments=CROWDED,
        environment={"TRIMTAB_KERNEL": "triton"},
        v2_interpreted=True,
    )
    return model, play(scenario, tmp_path_factory.mktemp("v2"))


class TestModelRunnerV2:
    """The runner GPUs use, with the Triton kernel, both interpreted on the CPU."""

    def test_it_is_that_runner(self, crowded: tuple[Tiny, Result]) -> None:
        """The worker reports the runner, and that some request was preempted."""
        assert crowded[1].report["runner"] == "v2"
        assert crowded[1].preemptions > 0

    def test_each_request_is_edited_as_the_oracle_says(self, crowded: tuple[Tiny, Result]) -> None:
        """Chunked prefill, n = 2 and preemption."""
        model, result = crowded
        check_against_oracle(model.oracle, crowd(8), result.rounds[0])

    def test_every_kind_of_edit_equals_the_oracle(self, crowded: tuple[Tiny, Result]) -> None:
        """The Triton kernel, in the engine."""
        model, result = crowded
        check_against_oracle(model.oracle, every_edit(3), result.rounds[1])

    def test_every_steered_sample_is_reported(self, crowded: tuple[Tiny, Result]) -> None:
        """One outcome a sample; one that was preempted is a new request to this runner, and may be reported again."""
        steered = sum(ask.samples for ask in [*crowd(8), *every_edit(3)] if ask.edit is not None)
        request_ids = [outcome["request_id"] for outcome in crowded[1].outcomes]
        assert len(set(request_ids)) == steered
        assert len(request_ids) <= steered + crowded[1].preemptions


def test_v2_hybrid_state_class_is_kept(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Qwen3-Next keeps vLLM's own state class for hybrid models, and is steered through it."""
    model = tiny("qwen3_next")
    asks = [
        Ask(prompt=prompt_of(9, 1), count=3, edit="add"),
        Ask(prompt=prompt_of(9, 1), count=3),
        Ask(prompt=prompt_of(7, 2), count=3, edit="several terms", scope="all"),
    ]
    scenario = Scenario(
        model=str(model.model),
        bundle=model.bundle_path,
        rounds=[asks],
        arguments={"dtype": "bfloat16", "max_model_len": 128, "max_num_seqs": 4},
        v2_interpreted=True,
    )
    result = play(scenario, tmp_path)
    check_against_oracle(model.oracle, asks, result.rounds[0], BFLOAT16_TOLERANCE)
    assert result.report["runner"] == "v2"


@pytest.mark.timeout(900)
def test_compiled_engine_is_right_on_any_cache(gated: Gated, tmp_path: Path) -> None:
    """With torch.compile on, as by default: crowded, gates too, on a cache that another bundle filled, and on its own.

    The other bundle edits one layer only. A compile key without the layer set would serve its graph to the second,
    which edits four: the op would be missing in three of them, silently.
    """
    small = _bundle_of_one_edit(gated.tiny, "add", tmp_path / "small")
    wanted = [*crowd(8), *every_edit(3)]
    few = [ask for ask in wanted if ask.edit in (None, "add")]
    for name, bundle, rounds, layers in (
        ("other", small, [few], [1]),
        ("cold", str(gated.bundle.path), [wanted], [0, 1, 2, 3]),
        ("warm", str(gated.bundle.path), [wanted, few_gated(gated)], [0, 1, 2, 3]),
    ):
        scenario = Scenario(
            model=str(gated.tiny.model),
            bundle=bundle,
            rounds=rounds,
            arguments={**CROWDED, "enforce_eager": False},
            environment={"VLLM_CACHE_ROOT": str(tmp_path / "cache")},
        )
        result = play(scenario, tmp_path / name, fresh=True)
        check_against_oracle(gated.tiny.oracle, rounds[0], result.rounds[0])
        assert result.report["witness"] == layers
        if len(rounds) > 1:
            check_gated(gated, rounds[1], result, 1)


def test_the_op_cuts_no_graph(gated: Gated, tmp_path: Path) -> None:
    """Compiled in pieces as on a GPU, with vLLM's own splitting ops: the op is in none of the places the graph is cut
    at, but in the pieces between them, so that a step stays one traced graph and one FULL CUDA graph can hold it.
    """
    found = cut(PiecesScenario(model=str(gated.tiny.model), bundle=str(gated.bundle.path)), tmp_path)
    plain, steered = found.plain, found.steered
    assert not [name for name in steered.splitting if name.startswith("trimtab::")]
    assert "vllm::unified_attention_with_output" in steered.splitting == plain.splitting
    assert steered.cuts == plain.cuts == [[False, *[True, False] * 4]]
    edits = [[name for name in piece if name.startswith("trimtab.")] for piece in steered.graphs[0]]
    assert edits == [[], *[[], ["trimtab.edit"]] * 4]
    assert steered.tokens == plain.tokens


def _bundle_of_one_edit(model: Tiny, edit: str, folder: Path) -> str:
    manifest = model.bundle.manifest.model_dump()
    manifest["edits"] = [record for record in manifest["edits"] if record["name"] == edit]
    manifest["name"] += "-one-edit"
    save_bundle(folder, manifest, {edit: model.bundle.edits[edit]})
    return str(folder)
