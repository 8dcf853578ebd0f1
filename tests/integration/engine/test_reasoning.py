"""Spared reasoning in real engines: edits begin where the model generates a given token, held against the oracle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from steering.bundle import save_bundle
from tests.integration.engine.checks import FLOAT32_TOLERANCE, prompt_of
from tests.integration.engine.conftest import Tiny
from tests.integration.engine.driver import play
from tests.integration.engine.scenario import Ask, Scenario
from tests.integration.engine.test_mixed_batch import CROWDED
from tests.integration.engine.test_runners import CROWDED as FEW

EDITS = ["add", "add everywhere", "several terms", "low rank"]


def _end_of(tiny: Tiny, prompts: list[tuple[int, ...]], count: int) -> int:
    """The token that stands for the end of reasoning: the one that most unsteered answers reach in their middle."""
    seen: Counter[int] = Counter()
    for prompt in prompts:
        answer = tiny.oracle.greedy(prompt, count)
        seen.update({token for token in set(answer) if 1 <= answer.index(token) < count - 3})
    return seen.most_common(1)[0][0]


def _asks(prompts: list[tuple[int, ...]], end: int, count: int) -> list[Ask]:
    """Spared beside edited and unsteered ones; the prompts of the last two hold the end: late, and early."""
    asks = [
        Ask(prompt=prompt, count=count, edit=EDITS[number % len(EDITS)], reasoning="spared")
        for number, prompt in enumerate(prompts)
    ]
    free = [token for token in prompt_of(20, 99) if token != end]
    return [
        *asks,
        replace(asks[0], reasoning="edited"),
        Ask(prompt=prompts[1], count=count),
        replace(asks[0], prompt=(*free[:8], end, free[8])),
        replace(asks[1], prompt=(end, *free[:9])),
    ]


def _begin(ask: Ask, tokens: list[int], end: int) -> int | None:
    """The first edited position; None where nothing is edited."""
    if ask.edit is None:
        return None
    if ask.reasoning == "edited" or end in ask.prompt[-8:]:
        return len(ask.prompt) - 1
    return len(ask.prompt) + tokens.index(end) if end in tokens else None


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_the_edit_begins_where_reasoning_ends(tiny: Callable[[str], Tiny], tmp_path: Path, runner: str) -> None:
    """Every token has the oracle's log-probability under an edit from the end of reasoning on, whether decoded or
    computed again after a preemption; requests beside it are edited as ever.
    """
    model, is_v2 = tiny("llama"), runner == "v2"
    count = 10 if is_v2 else 40
    lengths = [60, 33, 9, 50] if is_v2 else [40, 7, 64, 100, 1, 30, 64, 20, 90, 12]
    prompts = [prompt_of(length, 30 + number) for number, length in enumerate(lengths)]
    end = _end_of(model, prompts, count)
    asks = _asks(prompts, end, count)
    manifest = model.bundle.manifest.model_dump()
    manifest["reasoning_end"] = {"token": "end", "token_id": end}
    manifest["profiles"][0]["reasoning"] = "spared"
    save_bundle(tmp_path / "bundle", manifest, model.bundle.edits)
    scenario = Scenario(
        model=str(model.model),
        bundle=str(tmp_path / "bundle"),
        rounds=[asks],
        arguments=FEW if is_v2 else CROWDED,
        environment={"TRIMTAB_KERNEL": "triton"} if is_v2 else {},
        v2_interpreted=is_v2,
    )
    result = play(scenario, tmp_path)
    assert result.report["runner"] == runner
    assert result.preemptions > 0
    turned = 0
    for ask, got in zip(asks, result.rounds[0], strict=True):
        (tokens,), (logprobs,) = got.tokens, got.logprobs
        begin = _begin(ask, tokens, end)
        score = model.oracle.score(ask.prompt, tokens, edit=None if begin is None else ask.edit, begin=begin)
        for place, (given, said, best) in enumerate(zip(logprobs, score.given, score.best, strict=True)):
            where = f"{ask}\ntoken {place}, edited from {begin}: engine {given:.5f}, oracle {said:.5f}"
            assert abs(given - said) <= FLOAT32_TOLERANCE, where
            assert best - said <= 2 * FLOAT32_TOLERANCE, where
        if begin is not None and begin >= len(ask.prompt):
            unsteered = model.oracle.greedy(ask.prompt, count)
            split = begin - len(ask.prompt) + 1
            assert tokens[:split] == unsteered[:split]
            turned += tokens != unsteered
    assert turned >= 2, "too few answers reached the end of reasoning and turned there"
    reasoning = {outcome["plan_id"]: outcome["reasoning"] for outcome in result.outcomes}
    assert reasoning == {f"0-{number}": ask.reasoning for number, ask in enumerate(asks) if ask.edit is not None}
