"""The gate inside the real engine: what it decides is what the reference decides, and what follows is the oracle's."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from steering.plan import Decision
from tests.integration.engine.checks import check_against_oracle, prompt_of
from tests.integration.engine.driver import TWO_RANKS, play
from tests.integration.engine.gates import (
    FEW_BLOCKS,
    RESPONSE_TOKENS,
    Gated,
    check_gated,
    check_outcomes,
    check_responses,
    few_gated,
    gated_crowd,
    longer_than_fit,
    thresholds,
)
from tests.integration.engine.scenario import Ask, Result, Scenario
from tests.integration.engine.test_parity import every_edit

TRITON = {"TRIMTAB_KERNEL": "triton"}
"""Environment of an interpreted engine with the kernel that a GPU has."""

STRANGE = 255
"""A token that no prompt of these tests holds."""

CROWDED: dict[str, Any] = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
    "num_gpu_blocks_override": 24,
    "block_size": 32,
    "max_model_len": 160,
    "enable_prefix_caching": True,
}


@pytest.fixture(scope="module")
def crowded(gated: Gated, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Ask], Result]:
    """The crowd together, each of it alone on the cache it left behind, and the same prompts unsteered."""
    asks = gated_crowd(gated, 20)
    plain = [replace(ask, gate=None, edit=None, scope="generated", strength=1.0) for ask in asks]
    scenario = Scenario(
        model=str(gated.tiny.model),
        bundle=str(gated.bundle.path),
        rounds=[asks, *[[ask] for ask in asks[:6]], *[[ask] for ask in plain[:6]]],
        arguments=CROWDED,
    )
    return asks, play(scenario, tmp_path_factory.mktemp("crowded-gate"))


class TestGate:
    """Chunked prefill, whole prompts from the prefix cache, n = 2, preemption and resumption, a prompt of one token."""

    def test_every_answer_is_the_one_its_decision_leads_to(
        self, gated: Gated, crowded: tuple[list[Ask], Result]
    ) -> None:
        """Token for token and log-probability for log-probability, the oracle's under the reference's decision."""
        asks, result = crowded
        assert result.preemptions > 0
        check_against_oracle(gated.tiny.oracle, [gated.expected(ask) for ask in asks], result.rounds[0])

    def test_outcomes_say_what_was_decided(self, gated: Gated, crowded: tuple[list[Ask], Result]) -> None:
        """All three decisions occur, each with the reference's category, edit, strength and scores."""
        asks, result = crowded
        check_outcomes(gated, asks, result.outcomes, 0)
        assert {outcome["decision"] for outcome in result.outcomes} == {*Decision, None}

    def test_the_response_probe_reads_what_the_oracle_does(
        self, gated: Gated, crowded: tuple[list[Ask], Result]
    ) -> None:
        """The first generated tokens, before the edit of the probe's layer, also where nothing is edited."""
        asks, result = crowded
        check_responses(gated, asks, result, 0)
        assert len({request for _, request, _, _ in result.responses}) >= 10

    def test_a_prompt_from_the_cache_is_decided_alike(self, gated: Gated, crowded: tuple[list[Ask], Result]) -> None:
        """Asked again alone, all full blocks of the prompt come from the cache, and the gate is not blind."""
        asks, result = crowded
        for number, ask in enumerate(asks[:6], start=1):
            check_against_oracle(gated.tiny.oracle, [gated.expected(ask)], result.rounds[number])
            check_outcomes(gated, [ask], result.outcomes, number)
        assert max(round_[0].cached for round_ in result.rounds[1:7]) >= 64

    def test_no_second_pass_is_made(self, crowded: tuple[list[Ask], Result]) -> None:
        """The engine makes as many forward passes for a gated request as for the same one unsteered."""
        _, result = crowded
        assert result.steps[1:7] == result.steps[7:13]
        assert min(result.steps[1:7]) >= 20

    def test_no_row_is_left_behind(self, crowded: tuple[list[Ask], Result]) -> None:
        """Nothing is kept of requests that ended."""
        assert crowded[1].report["live"] == 0
        assert list(crowded[1].report["responses"].values()) == [RESPONSE_TOKENS]
        assert list(crowded[1].report["gates"].values()) == [["gate", "late"]]


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_many_requests_decide_in_one_step(gated: Gated, runner: str, tmp_path: Path) -> None:
    """64 prompts decided in one step; beside them, plans for unknown names and a prompt of NaN end or fail alone."""
    prompts = [prompt_of(4, 300 + number) for number in range(64)]
    low, high = thresholds(gated, prompts)
    order: dict[str, Any] = {"profile": "gate", "comply_below": low, "refuse_above": high}
    asks = [Ask(prompt=prompt, count=1, gate=order) for prompt in prompts]
    odd = [
        Ask(prompt=prompts[0], count=1, gate={**order, "profile": "absent"}),
        Ask(prompt=prompts[0], count=1, gate={**order, "categories": ("four",)}),
        Ask(prompt=(5, 6, STRANGE), count=1, gate=order),
    ]
    scenario = Scenario(
        model=str(_with_a_token_of_nan(gated.tiny.model, tmp_path / "model")),
        bundle=str(gated.bundle.path),
        rounds=[[*asks, *odd]],
        arguments={"max_num_seqs": 80, "max_num_batched_tokens": 512, "max_model_len": 128},
        environment=TRITON if runner == "v2" else {},
        v2_interpreted=runner == "v2",
    )
    result = play(scenario, tmp_path)
    assert result.report["runner"] == runner
    check_against_oracle(gated.tiny.oracle, [gated.expected(ask) for ask in asks], result.rounds[0][:64])
    check_outcomes(gated, asks, result.outcomes, 0)
    assert [got.finish for got in result.rounds[0][64:66]] == [["error"], ["error"]]
    (failed,) = [outcome for outcome in result.outcomes if outcome["plan_id"] == "0-66"]
    assert (failed["applied"], failed["edit"], failed["decision"]) == (False, None, None)
    assert "not finite" in failed["error"]
    assert result.steps[0] <= 3, "66 prompts of 3 or 4 tokens fit into one step"


def _with_a_token_of_nan(model: Path, folder: Path) -> Path:
    """A copy of the model in which one token's embedding is not a number."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][STRANGE] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("how", ["v2", "two ranks"])
def test_gates_on_the_other_runner_and_on_two_ranks(gated: Gated, how: str, tmp_path: Path) -> None:
    """Model Runner V2 with the Triton kernel, interpreted; two tensor-parallel ranks.

    Decisions, answers, n = 2, a prompt of one token, response probes, preemption and every kind of edit; each sample
    is told once. Then a request that is preempted after its gate has decided, and goes on as decided; and a prompt of
    which the cache holds all but the token that the gate reads, with n = 2 as well, decided alike. An edit that one
    rank of two made would leave their residual streams apart, and the answers wrong.
    """
    asks = few_gated(gated)
    assert any(ask.gate and ask.samples > 1 for ask in asks)
    assert any(ask.gate and len(ask.prompt) == 1 for ask in asks)
    is_v2 = how == "v2"
    prompt = prompt_of(2 * FEW_BLOCKS["block_size"] + 1, 90)
    above, below = (gated.score(prompt) + sign * 1e-3 for sign in (1, -1))
    sides = [{"profile": "gate", "comply_below": at, "refuse_above": at} for at in (above, below)]
    again = [Ask(prompt=prompt, count=3, gate=order, samples=samples) for samples in (1, 2) for order in sides]
    squeezed = longer_than_fit(3, {"profile": "gate", "comply_below": 0.5, "refuse_above": 0.5})
    scenario = Scenario(
        model=str(gated.tiny.model),
        bundle=str(gated.bundle.path),
        rounds=[asks, every_edit(3), squeezed, *([ask] for ask in again)],
        arguments={**FEW_BLOCKS, "tensor_parallel_size": 1 if is_v2 else 2},
        environment=TRITON if is_v2 else TWO_RANKS,
        v2_interpreted=is_v2,
    )
    result = play(scenario, tmp_path)
    assert result.preempted[0] > 0 < result.preempted[2]
    assert result.report["runner"] == ("v2" if is_v2 else "v1")
    check_gated(gated, asks, result, 0)
    check_against_oracle(gated.tiny.oracle, every_edit(3), result.rounds[1])
    for number, round_ in enumerate((squeezed, *([ask] for ask in again)), start=2):
        expected = [gated.expected(ask) for ask in round_]
        check_against_oracle(gated.tiny.oracle, expected, result.rounds[number])
        check_outcomes(gated, round_, result.outcomes, number)
    assert [round_[0].cached for round_ in result.rounds[4:]] == [len(prompt) - 1] * 3
    told = [outcome["request_id"] for outcome in result.outcomes]
    # To the V2 runner a sample that was preempted is a new request, and may be told again.
    assert len(told) - len(set(told)) <= (result.preemptions if is_v2 else 0)
