"""What vLLM does beside plain batches, under steering: every answer is the oracle's. The README names these tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from steering.bundle import save_bundle
from steering.plan import Plan
from tests.integration.engine.checks import FLOAT32_TOLERANCE, check_against_oracle, prompt_of
from tests.integration.engine.conftest import Tiny
from tests.integration.engine.driver import play
from tests.integration.engine.gates import (
    CATEGORIES,
    SIDES,
    Gated,
    check_gated,
    check_outcomes,
    longer_than_fit,
    thresholds,
)
from tests.integration.engine.quantised import make_quantised_model, round_inputs
from tests.integration.engine.scenario import Ask, Result, Scenario
from tests.integration.engine.test_parity import every_edit
from tests.integration.engine.test_runners import CROWDED, crowd
from tests.oracle import Oracle
from tests.samples import random_probe, with_gates
from tests.tiny_models import WIDTH

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


@pytest.fixture(scope="module")
def deciding(tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory) -> Gated:
    """The tiny Llama with a gate in its bundle, and no response probe."""
    model = tiny("llama")
    probe = random_probe("gate", layer=1, categories=CATEGORIES, width=WIDTH, seed=1, scale=1.5)
    manifest = with_gates({**model.bundle.manifest.model_dump(), "name": "tiny-deciding"}, {"gate": (probe, *SIDES)})
    manifest.pop("tensors_digest")
    for record in manifest["edits"]:
        record["purpose"] = "control"
    folder = tmp_path_factory.mktemp("deciding") / "bundle"
    return Gated(model, save_bundle(folder, manifest, dict(model.bundle.edits), {"gate": probe}))


PROMPTS = [prompt_of(length, 170 + number) for number, length in enumerate((40, 5, 33, 1, 21, 60))]


def order_of(gated: Gated) -> dict[str, Any]:
    """A gate's order by which `PROMPTS` are decided in all three ways."""
    low, high = thresholds(gated, PROMPTS)
    return {"profile": "gate", "comply_below": low, "refuse_above": high}


ABORTED = {0: "decode", 2: "prefill", 3: "waiting", 6: "prefill"}


def clones(gated: Gated) -> list[Ask]:
    """Beams of one steered request: its prompt, four tokens of its answer and another one each, and go on."""
    prompt = prompt_of(40, 9)
    answer = gated.tiny.oracle.greedy(prompt, 4, edit="add")
    plan = Plan(id="beam", bundle=gated.bundle.digest, edit="add", strength=1.0, prompt_length=len(prompt))
    return [
        Ask(prompt=(*prompt, *answer, 20 + beam), count=4, plan_text=structs.replace(plan, id=f"beam-{beam}").to_json())
        for beam in range(4)
    ]


@pytest.fixture(scope="module")
def stepped(deciding: Gated, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[Ask]], Result]:
    """Three requests at a time, chunks of 48 tokens; the last round lets the engine forget the one before."""
    order = order_of(deciding)
    aborts = [
        Ask(prompt=prompt_of(9, 1), count=40, edit="add", abort_at=8),
        Ask(prompt=prompt_of(7, 2), count=20),
        Ask(prompt=prompt_of(150, 3), count=8, edit="several terms", scope="all", abort_at=2),
        Ask(prompt=prompt_of(12, 4), count=8, edit="add", abort_at=2),
        Ask(prompt=prompt_of(60, 5), count=12, edit="low rank"),
        Ask(prompt=PROMPTS[0], count=12, gate=order),
        Ask(prompt=prompt_of(150, 6), count=8, gate=order, abort_at=17),
        Ask(prompt=prompt_of(12, 7), count=12),
    ]
    long = prompt_of(100, 8)
    scored = [
        Ask(prompt=long, count=3, edit="add everywhere", scope="all", prompt_logprobs=True),
        Ask(prompt=long, count=3, edit="add everywhere", prompt_logprobs=True),
        Ask(prompt=long, count=3, prompt_logprobs=True),
    ]
    asked = [aborts, scored, clones(deciding), [Ask(prompt=(1, 2), count=2)]]
    scenario = Scenario(
        model=str(deciding.tiny.model),
        bundle=str(deciding.bundle.path),
        rounds=asked,
        arguments={"max_num_seqs": 3, "max_num_batched_tokens": 48, "block_size": 32},
    )
    return asked, play(scenario, tmp_path_factory.mktemp("steps"))


class TestSteps:
    """One engine: requests aborted in every phase, log-probabilities of prompts, clones as a beam search makes them."""

    def test_abort_in_each_phase_leaves_neighbours_right(
        self, deciding: Gated, stepped: tuple[list[list[Ask]], Result]
    ) -> None:
        """Waiting, in mid-prefill (an edit, a gate that has not decided) and decoding; all others are the oracle's."""
        asks, got = stepped[0][0], stepped[1].rounds[0]
        assert {number: each.aborted for number, each in enumerate(got) if each.aborted} == ABORTED
        kept = [number for number in range(len(asks)) if number not in ABORTED]
        expected = [deciding.expected(asks[number]) for number in kept]
        check_against_oracle(deciding.tiny.oracle, expected, [got[number] for number in kept])
        begun = got[0]
        assert 0 < len(begun.tokens[0]) < asks[0].count
        check_against_oracle(deciding.tiny.oracle, [replace(asks[0], count=len(begun.tokens[0]))], [begun])

    def test_aborted_requests_give_their_rows_back(self, stepped: tuple[list[list[Ask]], Result]) -> None:
        """Nothing is kept of any request of this engine."""
        assert stepped[1].report["live"] == 0

    def test_prompt_logprobs_are_those_of_what_is_edited(
        self, deciding: Gated, stepped: tuple[list[list[Ask]], Result]
    ) -> None:
        """Under `scope: all` the prompt's are the edited model's, under `generated` the plain model's."""
        oracle, asks, round_ = deciding.tiny.oracle, stepped[0][1], stepped[1].rounds[1]
        for ask, got in zip(asks, round_, strict=True):
            edit = ask.edit if ask.scope == "all" else None
            score = oracle.score(ask.prompt[:1], ask.prompt[1:], edit=edit, scope="all")
            assert got.prompt_logprobs == pytest.approx(score.given, abs=FLOAT32_TOLERANCE)
        edited, clean, plain = (got.prompt_logprobs for got in round_)
        assert clean == pytest.approx(plain, abs=FLOAT32_TOLERANCE)
        assert max(abs(a - b) for a, b in zip(edited, plain, strict=True)) > 0.1
        check_against_oracle(oracle, asks, round_)

    def test_clones_go_on_from_the_end_of_the_prompt(
        self, deciding: Gated, stepped: tuple[list[list[Ask]], Result]
    ) -> None:
        """Each is edited from the prompt's last token on, though its own prompt holds a part of the answer."""
        for ask, got in zip(stepped[0][2], stepped[1].rounds[2], strict=True):
            score = deciding.tiny.oracle.score(ask.prompt, got.tokens[0], edit="add", begin=39)
            assert got.logprobs[0] == pytest.approx(score.given, abs=FLOAT32_TOLERANCE)
            assert score.best == pytest.approx(score.given, abs=2 * FLOAT32_TOLERANCE)


# Edits so strong that the tiny model repeats itself, so that drafts are often right; others are nearly always wrong.
REPETITIVE = [
    Ask(prompt=prompt_of(6, seed), count=30, edit=edit, strength=strength)
    for seed, edit, strength in (
        (402, "add", 8.0),
        (402, "add", 4.0),
        (403, "add", 2.0),
        (401, "reposition", 2.0),
        (403, "add everywhere", 8.0),
    )
]


def test_ngram_speculation_changes_no_token(deciding: Gated, tmp_path: Path) -> None:
    """Token for token what the engine says without it: both scopes, edits, a gate, preemption; and in fewer steps."""
    order = order_of(deciding)
    asks = [replace(ask, samples=1) for ask in crowd(12)]
    asks += [Ask(prompt=prompt, count=12, gate=order) for prompt in PROMPTS]
    results = []
    for name, speculation in (("with", NGRAM), ("without", None)):
        scenario = Scenario(
            model=str(deciding.tiny.model),
            bundle=str(deciding.bundle.path),
            rounds=[asks, REPETITIVE],
            arguments={**CROWDED, "max_num_batched_tokens": 64, "speculative_config": speculation},
        )
        results.append(play(scenario, tmp_path / name))
    guessed, plain = results
    for with_drafts, without in zip(guessed.rounds, plain.rounds, strict=True):
        assert [got.tokens for got in with_drafts] == [got.tokens for got in without]
    assert guessed.steps[1] < plain.steps[1]
    assert guessed.preemptions > 0
    check_against_oracle(deciding.tiny.oracle, [deciding.expected(ask) for ask in asks], guessed.rounds[0])
    check_against_oracle(deciding.tiny.oracle, REPETITIVE, guessed.rounds[1])
    check_outcomes(deciding, asks, guessed.outcomes, 0)


# Where an activation lies half way between two whole numbers, rounding differs and moves log-probabilities.
EIGHT_BIT_TOLERANCE = 0.02


def test_quantised_weights_are_steered(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Weights and activations of eight bits: the oracle has the same weights and rounds in the same places."""
    model = tiny("llama")
    quantised, plain = make_quantised_model(model.model, tmp_path)
    asks = every_edit(6)
    result = play(Scenario(model=str(quantised), bundle=model.bundle_path, rounds=[asks]), tmp_path)
    oracle = Oracle(plain, model.bundle.edits)
    round_inputs(oracle.model)
    check_against_oracle(oracle, asks, result.rounds[0], EIGHT_BIT_TOLERANCE)
    moved = []
    for ask, got in zip(asks, result.rounds[0], strict=True):
        unsteered = oracle.score(ask.prompt, got.tokens[0]).given
        moved.append(max(abs(a - b) for a, b in zip(unsteered, got.logprobs[0], strict=True)))
    assert moved[0] <= EIGHT_BIT_TOLERANCE
    assert min(moved[1:]) > 4 * EIGHT_BIT_TOLERANCE
    assert result.report["witness"] == [0, 1, 2, 3]


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_scheduling_ahead_changes_nothing(gated: Gated, runner: str, tmp_path: Path) -> None:
    """With the next step prepared before the last one's tokens are known, on either model runner: answers are the
    oracle's, outcomes and what response probes read the reference's, and one that is preempted after its gate has
    decided goes on as decided. V2 is interpreted and gets few tokens.
    """
    order, count = order_of(gated), 20 if runner == "v1" else 8
    gates = [Ask(prompt=prompt, count=count, gate=order) for prompt in reversed(PROMPTS)]
    plain = [replace(ask, samples=1) for ask in crowd(count)]
    asks = [ask for pair in zip(plain, gates, strict=True) for ask in pair]
    asks = [replace(ask, response=number % 4 > 1) for number, ask in enumerate(asks)]
    squeezed = [replace(ask, response=True) for ask in longer_than_fit(2, order)]
    scenario = Scenario(
        model=str(gated.tiny.model),
        bundle=str(gated.bundle.path),
        rounds=[asks, squeezed, [Ask(prompt=(1, 2), count=2)]],
        arguments={**CROWDED, "num_gpu_blocks_override": 6, "async_scheduling": True},
        v2_interpreted=runner == "v2",
    )
    result = play(scenario, tmp_path)
    assert (result.scheduler, result.report["runner"]) == ("SteeringAsyncScheduler", runner)
    assert min(result.preempted[:2]) > 0
    check_gated(gated, asks, result, 0)
    check_gated(gated, squeezed, result, 1)
    assert result.report["live"] <= 1
