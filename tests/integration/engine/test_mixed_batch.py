"""Many requests in one engine: each gets what it gets alone, whatever runs beside it and whatever vLLM does with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steering.plan import Plan
from tests.integration.engine.checks import check_against_oracle, prompt_of
from tests.integration.engine.conftest import Tiny
from tests.integration.engine.driver import play
from tests.integration.engine.scenario import Ask, Result, Scenario

# 16 sequences run at once over chunks of 48 tokens, so that prompts of 100 tokens and more are prefilled in pieces
# beside others that decode; 17 blocks of 32 tokens hold about five of them, so that some are preempted and recomputed.
CROWDED = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 48,
    "enable_chunked_prefill": True,
    "num_gpu_blocks_override": 18,
    "block_size": 32,
}
EDITS = ["add", "add everywhere", "ablate", "reposition", "low rank", "several terms"]


def mixed(count: int) -> list[Ask]:
    """16 requests: unsteered, six edits, different strengths, both scopes, n = 2, prompts of 1 to 150 tokens."""
    asks = []
    for number in range(16):
        prompt = prompt_of([1, 7, 40, 64, 100, 150][number % 6], number)
        if number % 4 == 0:
            asks.append(Ask(prompt=prompt, count=count, samples=2 if number == 4 else 1))
        else:
            asks.append(
                Ask(
                    prompt=prompt,
                    count=count,
                    edit=EDITS[number % len(EDITS)],
                    strength=[0.5, 1.0, -1.0, 1.5][number % 4],
                    scope="all" if number % 5 == 0 else "generated",
                    samples=2 if number == 9 else 1,
                )
            )
    return asks


def _asks(tiny: Tiny) -> list[Ask]:
    """Turns that share their beginning, interleaved so that a wrong share of key-value blocks would show.

    Later turns hold earlier answers, which the oracle gives: they are the engine's too, or the test fails.
    """
    count, system = 40, prompt_of(70, 77)

    def extended(ask: Ask, seed: int) -> tuple[int, ...]:
        answer = tiny.oracle.greedy(ask.prompt, count, edit=ask.edit, strength=ask.strength, scope=ask.scope)
        return (*ask.prompt, *answer, *prompt_of(5, seed))

    steered = Ask(prompt=system, count=count, edit="add", strength=1.5)
    throughout = replace(steered, scope="all")
    second = replace(steered, prompt=extended(steered, 1))
    return [
        steered,
        Ask(prompt=system, count=count),
        Ask(prompt=second.prompt, count=count),
        second,
        throughout,
        replace(throughout, strength=-1.5),
        replace(throughout, edit="ablate"),
        Ask(prompt=system, count=count),
        replace(throughout, prompt=extended(throughout, 2)),
        Ask(prompt=extended(throughout, 2), count=count),
        replace(steered, samples=2),
        replace(second, prompt=extended(second, 3), edit="low rank"),
    ]


@pytest.fixture(scope="module")
def crowded(tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, list[Ask], Result]:
    """The mixed batch in a crowded engine, and after it each of its requests alone, prefix caching on."""
    model, asks = tiny("llama"), mixed(24)
    bad = [
        Ask(prompt=prompt_of(9, 50), count=4),
        Ask(prompt=prompt_of(9, 51), count=4, plan_text="not a plan"),
        Ask(
            prompt=prompt_of(9, 52),
            count=4,
            plan_text=Plan(id="x", bundle="sha256:0", edit="add", strength=1.0).to_json(),
        ),
        Ask(prompt=prompt_of(9, 53), count=4, edit="no such edit"),
        Ask(prompt=prompt_of(9, 54), count=4, edit="add"),
    ]
    scenario = Scenario(
        model=str(model.model),
        bundle=model.bundle_path,
        rounds=[asks, *[[ask] for ask in asks], bad],
        arguments=CROWDED,
    )
    return model, asks, play(scenario, tmp_path_factory.mktemp("crowded"))


class TestMixedBatch:
    """16 requests of every kind in an engine that chunks and preempts."""

    def test_each_request_is_edited_as_the_oracle_says(self, crowded: tuple[Tiny, list[Ask], Result]) -> None:
        """Chunked prefill, n = 2, preemption and neighbours with other edits leave every answer right."""
        model, asks, result = crowded
        check_against_oracle(model.oracle, asks, result.rounds[0])

    def test_some_request_was_preempted(self, crowded: tuple[Tiny, list[Ask], Result]) -> None:
        """The scenario is as crowded as it claims."""
        assert crowded[2].preemptions > 0

    def test_each_request_gets_the_tokens_it_gets_alone(self, crowded: tuple[Tiny, list[Ask], Result]) -> None:
        """Token for token: together, and alone in the same engine."""
        _, asks, result = crowded
        together, alone = result.rounds[0], [round_[0] for round_ in result.rounds[1 : len(asks) + 1]]
        assert [got.tokens for got in together] == [got.tokens for got in alone]

    def test_every_steered_sample_is_reported_once(self, crowded: tuple[Tiny, list[Ask], Result]) -> None:
        """One outcome a sample, also for n = 2 and for a request that was preempted; none for unsteered ones."""
        _, asks, result = crowded
        steered = sum(ask.samples for ask in asks if ask.edit is not None)
        request_ids = [outcome["request_id"] for outcome in result.outcomes]
        assert len(request_ids) == len(set(request_ids)) == 2 * steered + 1  # together, alone, and one beside bad plans
        assert all(outcome["applied"] for outcome in result.outcomes)

    def test_bad_plan_ends_its_request_and_no_other(self, crowded: tuple[Tiny, list[Ask], Result]) -> None:
        """A plan that is none, or names what is not loaded, ends without a token; its neighbours are served."""
        model, _, result = crowded
        good, *bad, steered = result.rounds[-1]
        assert [got.finish for got in bad] == [["error"]] * 3
        assert all(got.tokens == [[]] for got in bad)
        check_against_oracle(
            model.oracle,
            [Ask(prompt=prompt_of(9, 50), count=4), Ask(prompt=prompt_of(9, 54), count=4, edit="add")],
            [good, steered],
        )

    def test_no_row_is_left_behind(self, crowded: tuple[Tiny, list[Ask], Result]) -> None:
        """All but the last step's requests have given their rows back."""
        assert crowded[2].report["live"] <= 1

    def test_unsteered_requests_equal_stock_vllm(self, crowded: tuple[Tiny, list[Ask], Result], tmp_path: Path) -> None:
        """The unsteered of the mixed batch get the tokens and log-probabilities of vLLM without this project."""
        model, asks, result = crowded
        unsteered = [(ask, got) for ask, got in zip(asks, result.rounds[0], strict=True) if ask.edit is None]
        stock = play(
            Scenario(model=str(model.model), bundle=None, rounds=[[ask for ask, _ in unsteered]], arguments=CROWDED),
            tmp_path,
        )
        assert [got.tokens for _, got in unsteered] == [got.tokens for got in stock.rounds[0]]
        for (_, ours), theirs in zip(unsteered, stock.rounds[0], strict=True):
            assert ours.logprobs[0] == pytest.approx(theirs.logprobs[0], abs=1e-5)


def test_prefix_cache_never_mixes_edited_and_clean_blocks(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Multi-turn talk over one long beginning, unsteered and steered in both scopes: every answer is the oracle's.

    Also: clean blocks of the beginning are shared with a steered request, and edited ones are not handed out.
    """
    model = tiny("llama")
    arguments: dict[str, Any] = {"block_size": 32, "enable_prefix_caching": True, "max_num_seqs": 4}
    asks = _asks(model)

    def run(name: str, **changed: Any) -> Result:
        rounds = [[ask] for ask in asks]
        scenario = Scenario(
            model=str(model.model), bundle=model.bundle_path, rounds=rounds, arguments={**arguments, **changed}
        )
        return play(scenario, tmp_path / name)

    cached, plain = run("cached"), run("plain", enable_prefix_caching=False)
    for ask, round_ in zip(asks, cached.rounds, strict=True):
        check_against_oracle(model.oracle, [ask], round_)
    assert [round_[0].tokens for round_ in cached.rounds] == [round_[0].tokens for round_ in plain.rounds]
    hits = [round_[0].cached for round_ in cached.rounds]
    assert hits[1] == 64, "the two clean blocks of a steered prompt are shared with an unsteered request"
    assert hits[2] == 64, "blocks of a steered answer are not found by an unsteered next turn"
    assert hits[4] == hits[5] == hits[6] == 0, "an edit of all positions shares nothing with others"
    assert hits[7] == 64, "the unsteered prompt is still shared"
    assert hits[8] >= 96, "an edit of all positions finds its own blocks again, answer included"
    assert hits[9] == 64, "but nobody else does"
