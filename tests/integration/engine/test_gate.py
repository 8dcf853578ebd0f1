"""The gate inside the real engine: what it decides is what the reference decides, and what follows is the oracle's.

Residuals for the reference come from transformers; thresholds are set between the scores that prompts have, so that
some are refused, some complied with and some left alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from steering.bundle import Bundle, save_bundle
from steering.engine.outcomes import sample_of
from steering.gate import rule
from steering.plan import Decision, GateOrder
from steering.response import response_score
from tests.integration.engine.checks import check_against_oracle, prompt_of
from tests.integration.engine.conftest import Tiny
from tests.integration.engine.driver import Ask, Result, Scenario, play
from tests.samples import random_probe, with_gates, with_response
from tests.tiny_models import WIDTH

CATEGORIES = ("one", "two", "three")
SIDES = (
    {"one": "add", "two": "low rank", "three": "several terms"},
    {"one": "reposition", "two": "add", "three": "add"},
)
LATE = ({"one": "reposition", "two": "reposition"}, {"one": "reposition", "three": "reposition"})
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


RESPONSE_TOKENS = 4


@dataclass(frozen=True)
class Gated:
    """A tiny model whose bundle has two gates: `gate` at layer 1, before that layer's edits, and `late` at layer 2; and
    a response probe, at layer 2 as well.
    """

    tiny: Tiny
    bundle: Bundle

    def expected(self, ask: Ask) -> Ask:
        """The request as the oracle scores it: with the edit and strength the reference decides."""
        if ask.gate is None:
            return ask
        order = GateOrder(**ask.gate)
        probe = self.bundle.probes[order.profile]
        ruling = rule(probe.logits(self.tiny.oracle.residual(ask.prompt, probe.layer)), order, probe.categories)
        assert ruling is not None
        profile = self.bundle.manifest.profile(order.profile)
        side = {Decision.REFUSE: profile.refuse, Decision.COMPLY: profile.comply, Decision.ABSTAIN: {}}
        edit = None if order.is_observed else side[ruling.decision].get(probe.categories[ruling.category])
        return replace(ask, gate=None, edit=edit, strength=ask.strength * ruling.share if edit else 1.0)

    def score(self, prompt: Sequence[int], profile: str = "gate") -> float:
        """The refusal probability of a prompt, by the reference."""
        probe = self.bundle.probes[profile]
        return float(probe.logits(self.tiny.oracle.residual(prompt, probe.layer))[0].sigmoid())


@pytest.fixture(scope="module")
def gated(tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory) -> Gated:
    """The tiny Llama with gates in its bundle."""
    model = tiny("llama")
    probes = {
        name: random_probe(name, layer=layer, categories=CATEGORIES, width=WIDTH, seed=layer, scale=1.5)
        for name, layer in (("gate", 1), ("late", 2))
    }
    gates = {"gate": (probes["gate"], *SIDES), "late": (probes["late"], *LATE)}
    response = random_probe("response", layer=2, categories=(), width=WIDTH, seed=7, scale=1.5)
    manifest = with_gates({**model.bundle.manifest.model_dump(), "name": "tiny-gated"}, gates)
    manifest = with_response(manifest, response, RESPONSE_TOKENS)
    probes["response"] = response
    manifest.pop("tensors_digest")
    for record in manifest["edits"]:
        record["purpose"] = "control"
    bundle = save_bundle(tmp_path_factory.mktemp("gated") / "bundle", manifest, dict(model.bundle.edits), probes)
    return Gated(model, bundle)


def thresholds(gated: Gated, prompts: Sequence[Sequence[int]], profile: str = "gate") -> tuple[float, float]:
    """Thresholds that split these prompts in three, half way between the scores of neighbours."""
    scores = sorted(gated.score(prompt, profile) for prompt in prompts)
    third = len(scores) // 3
    return (scores[third - 1] + scores[third]) / 2, (scores[-third - 1] + scores[-third]) / 2


def crowd(gated: Gated, count: int) -> list[Ask]:
    """Every hard case: chunks, one token, n = 2, preemption, both gates, orders of every kind, other neighbours."""
    lengths = (100, 5, 70, 1, 61, 33, 50, 64, 90, 12)
    prompts = [prompt_of(length, 70 + number) for number, length in enumerate(lengths)]
    low, high = thresholds(gated, prompts)
    asks = [
        Ask(prompt=prompt, count=count, gate={"profile": "gate", "comply_below": low, "refuse_above": high})
        for prompt in prompts
    ]
    late = thresholds(gated, prompts[:6], "late")
    asks += [
        Ask(prompt=prompt, count=count, gate={"profile": "late", "comply_below": late[0], "refuse_above": late[1]})
        for prompt in prompts[:6]
    ]
    order: dict[str, Any] = {"profile": "gate", "comply_below": 0.5, "refuse_above": 0.5}
    asks += [
        Ask(prompt=prompts[1], count=count, gate=order, samples=2),
        Ask(prompt=prompts[2], count=count, gate={**order, "is_graded": True}, strength=2.0),
        Ask(prompt=prompts[4], count=count, gate={**order, "is_observed": True}),
        Ask(prompt=prompts[5], count=count, gate={**order, "categories": ("three",)}),
        Ask(prompt=prompts[6], count=count, edit="add everywhere", scope="all"),
        Ask(prompt=prompts[7], count=count),
        # Observed only, and twice; edits of either scope, observed as well.
        Ask(prompt=prompts[8], count=count, response=True),
        Ask(prompt=prompts[1], count=count, response=True, samples=2),
        Ask(prompt=prompts[2], count=count, edit="several terms", response=True),
        Ask(prompt=prompts[4], count=3, edit="add everywhere", scope="all", response=True),
        Ask(prompt=prompts[9], count=1, response=True),
    ]
    return [replace(ask, response=True) if ask.gate and number % 3 == 0 else ask for number, ask in enumerate(asks)]


def check_responses(gated: Gated, asks: Sequence[Ask], result: Result, round_number: int) -> None:
    """The last that was told of each sample is the reference's score of the tokens that were fed back."""
    probe = gated.bundle.probes["response"]
    told: dict[str, dict[str, tuple[int, float]]] = {}
    for plan, request, tokens, score in result.responses:
        told.setdefault(plan, {})[request] = (tokens, score)
    for number, ask in enumerate(asks):
        found = told.get(f"{round_number}-{number}", {})
        expected, answers = gated.expected(ask), result.rounds[round_number][number].tokens
        assert len(found) == (ask.samples if ask.response and ask.count > 1 else 0)
        for request, (tokens, score) in found.items():
            answer = answers[sample_of(request)]
            # An engine that schedules ahead has fed back the last token, too.
            assert min(RESPONSE_TOKENS, ask.count - 1) <= tokens <= min(RESPONSE_TOKENS, ask.count)
            residuals = gated.tiny.oracle.residuals(
                ask.prompt,
                [*ask.prompt, *answer[:tokens]],
                probe.layer,
                edit=expected.edit,
                strength=expected.strength,
                scope=expected.scope,
            )
            assert score == pytest.approx(response_score(probe, residuals[1:], RESPONSE_TOKENS), abs=1e-3)


def check_outcomes(gated: Gated, asks: Sequence[Ask], outcomes: Sequence[dict[str, Any]], round_number: int) -> None:
    """Each gated sample is reported with the decision, category, edit, strength and scores of the reference."""
    for number, ask in enumerate(asks):
        found = [outcome for outcome in outcomes if outcome["plan_id"] == f"{round_number}-{number}"]
        if ask.gate is None:
            continue
        assert len({outcome["request_id"] for outcome in found}) == ask.samples
        expected, order = gated.expected(ask), GateOrder(**ask.gate)
        for outcome in found:
            assert outcome["error"] == ""
            assert (outcome["edit"], outcome["applied"]) == (expected.edit, expected.edit is not None)
            assert outcome["strength"] == pytest.approx(expected.strength if expected.edit else 0.0, abs=1e-4)
            score = gated.score(ask.prompt, order.profile)
            assert outcome["scores"]["refusal"] == pytest.approx(score, abs=1e-4)
            assert sum(outcome["scores"]["categories"].values()) == pytest.approx(1.0)
            assert outcome["category"] in (order.categories or CATEGORIES)


@pytest.fixture(scope="module")
def crowded(gated: Gated, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Ask], Result]:
    """The crowd together, each of it alone on the cache it left behind, and the same prompts unsteered."""
    asks = crowd(gated, 20)
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


def test_many_requests_decide_in_one_step(gated: Gated, tmp_path: Path) -> None:
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
        arguments={"max_num_seqs": 80, "max_num_batched_tokens": 512},
    )
    result = play(scenario, tmp_path)
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


@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["v2", "compiled", "two ranks"])
def test_gates_on_the_other_runner_compiled_and_on_two_ranks(gated: Gated, how: str, tmp_path: Path) -> None:
    """Model Runner V2 with the Triton kernel, interpreted; V1 under torch.compile; two tensor-parallel ranks."""
    asks = [replace(ask, count=min(ask.count, 6)) for ask in crowd(gated, 6) if len(ask.prompt) <= 70][3:]
    is_v2 = how == "v2"
    scenario = Scenario(
        model=str(gated.tiny.model),
        bundle=str(gated.bundle.path),
        rounds=[asks],
        arguments={
            **CROWDED,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 32,
            "num_gpu_blocks_override": 9,
            "max_model_len": 128,
            "enforce_eager": how != "compiled",
            "tensor_parallel_size": 2 if how == "two ranks" else 1,
        },
        environment={
            "v2": {"TRIMTAB_KERNEL": "triton"},
            "compiled": {"VLLM_CACHE_ROOT": str(tmp_path / "cache")},
            "two ranks": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        }[how],
        v2_interpreted=is_v2,
    )
    result = play(scenario, tmp_path, fresh=how == "compiled")
    assert result.preemptions > 0
    assert result.report["runner"] == ("v2" if is_v2 else "v1")
    check_responses(gated, asks, result, 0)
    assert result.responses
    check_against_oracle(gated.tiny.oracle, [gated.expected(ask) for ask in asks], result.rounds[0])
    check_outcomes(gated, asks, result.outcomes, 0)
