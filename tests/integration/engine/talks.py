"""Talks of several turns with one engine: interleaved, each turn asked when the one before it has been answered.

What a turn asks holds what was answered before, so that key-value blocks of generated tokens could be found again.
`driver` has the engine processes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.integration.engine import driver
from tests.integration.engine.scenario import Ask

KIND = "talks"


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of a talk.

    Attributes:
        ask: what is asked; its prompt is what this turn adds to the talk.
        bundle: index of the bundle that its plan names.
        pause: engine steps between the answer before and this turn, or before the first.
    """

    ask: Ask
    bundle: int = 0
    pause: int = 0


@dataclass(kw_only=True)
class TalkScenario:
    """One engine and the talks it has, all at once.

    Attributes:
        model, bundles: local folders.
        talks: turns of each.
        prompts: whole prompts by talk and turn, of an engine that had these talks before; None where this one's answers
            make them.
        arguments: of `vllm.LLM`.
        is_isolated: False hands out edited blocks like clean ones, to see what the isolation is good for.
        kind: tells the process what to play.
    """

    model: str
    bundles: list[str]
    talks: list[list[Turn]]
    prompts: list[list[list[int]]] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    is_isolated: bool = True
    kind: str = KIND


@dataclass(frozen=True, kw_only=True)
class Heard:
    """A turn's whole prompt, its answers by sample, and how many tokens of the prompt came from the cache."""

    prompt: list[int]
    tokens: list[list[int]]
    cached: int


@dataclass(frozen=True, kw_only=True)
class TalkResult:
    """What was heard by talk and turn, vLLM's counts of preemptions and steps, and what the worker said it decided.

    `decisions` has a list for each turn, by talk: one entry a sample, None for an edit that was not a gate's.
    """

    talks: list[list[Heard]]
    preemptions: int
    steps: int
    decisions: list[list[list[str | None]]]


def play_talks(scenario: TalkScenario, folder: Path) -> TalkResult:
    """Have the talks with a real engine, in a process that is kept for the next scenario."""
    fields = driver.deliver(asdict(scenario), driver.environment_of({}, v2_interpreted=False), folder)
    fields["talks"] = [[Heard(**heard) for heard in talk] for talk in fields["talks"]]
    return TalkResult(**fields)


def run_talks(question: Path) -> TalkResult:
    """Have the talks with an engine in this process."""
    from steering.bundle import load_bundle
    from steering.engine import prefix_cache
    from steering.engine.plugin import engine_arguments

    fields = json.loads(question.read_text())
    talks = [[_turn(turn) for turn in talk] for talk in fields.pop("talks")]
    scenario = TalkScenario(talks=talks, **fields)
    paths = [Path(bundle) for bundle in scenario.bundles]
    digests = [load_bundle(path).digest for path in paths]
    set_apart = prefix_cache.set_apart
    if not scenario.is_isolated:
        prefix_cache.set_apart = lambda *_, **__: None
    try:
        with driver.running(
            scenario.model, {**engine_arguments(paths, is_reporting=True), **scenario.arguments}
        ) as engine:
            heard, told = _talk(engine.llm_engine, scenario, digests)
            decisions = [
                [list(told.get(f"{number}-{turn}", {}).values()) for turn in range(len(talk))]
                for number, talk in enumerate(talks)
            ]
            preemptions, steps = driver.preemptions_of(engine), driver.steps_of(engine)
            return TalkResult(talks=heard, preemptions=preemptions, steps=steps, decisions=decisions)
    finally:
        prefix_cache.set_apart = set_apart


def _turn(fields: dict[str, Any]) -> Turn:
    ask = fields.pop("ask")
    return Turn(ask=Ask(**{**ask, "prompt": tuple(ask["prompt"])}), **fields)


def _talk(
    engine: Any, scenario: TalkScenario, digests: Sequence[str]
) -> tuple[list[list[Heard]], dict[str, dict[str, str | None]]]:
    from vllm.sampling_params import RequestOutputKind

    from steering.engine.outcomes import listen
    from steering.outcome import Outcome

    reports: list[Any] = []
    listen(engine, reports.append)
    heard: list[list[Heard]] = [[] for _ in scenario.talks]
    due = {number: talk[0].pause for number, talk in enumerate(scenario.talks)}
    prompts: dict[int, list[int]] = {}
    told: dict[str, dict[str, str | None]] = {}
    step = 0
    while due or engine.has_unfinished_requests():
        if not engine.has_unfinished_requests():
            step = max(step, min(due.values()))
        for number in [number for number, when in due.items() if when <= step]:
            del due[number]
            place = len(heard[number])
            turn = scenario.talks[number][place]
            if scenario.prompts is not None:
                prompt = scenario.prompts[number][place]
            else:
                before = heard[number][-1] if place else None
                talk_so_far = [*before.prompt, *before.tokens[0]] if before else []
                prompt = [*talk_so_far, *turn.ask.prompt]
            prompts[number] = prompt
            name = f"{number}-{place}"
            parameters = driver.parameters_of(turn.ask, digests[turn.bundle], name)
            parameters.output_kind = RequestOutputKind.FINAL_ONLY
            engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
        for output in engine.step():
            number = int(output.request_id.split("-")[0])
            tokens = [list(sample.token_ids) for sample in output.outputs]
            heard[number].append(Heard(prompt=prompts.pop(number), tokens=tokens, cached=output.num_cached_tokens or 0))
            if len(heard[number]) < len(scenario.talks[number]):
                due[number] = step + 1 + scenario.talks[number][len(heard[number])].pause
        step += 1
    for report in reports:
        if isinstance(report, Outcome):
            assert not report.error, report
            told.setdefault(report.plan_id, {})[report.request_id] = report.decision
    return heard, told
