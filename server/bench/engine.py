"""Engine bench: tokens per second of a batch, steering against stock vLLM, in alternating rounds.

Both engines stay resident and one works at a time. Every pair is a round of stock vLLM and a round of one arm with the
same prompts, in turns the one and the other first: what slows the machine for longer than a pair slows both.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from server.bench.companion import Companion, companion
from server.bench.report import Ratio, ratio_of
from server.bench.subject import Subject
from steering.errors import EditNotApplied, PluginNotArmed

RESIDENT = "server.bench.resident"
WITHOUT_PLUGINS = {"VLLM_PLUGINS": "none-of-them"}
"""vLLM loads the plugins named here and no other: nothing of ours is in the stock process."""

TARGETS = {"idle": 0.97, "steered": 0.93}
WARM_UP = 3
"""Rounds of each arm before the first pair: compiled code, caches and thread pools are there afterwards."""


def measure(
    subject: Subject,
    *,
    pairs: int,
    batch: int,
    tokens: int,
    options: dict[str, Any],
    with_control: bool,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], list[Ratio]]:
    """Run every arm against stock vLLM.

    Args:
        subject: model and bundle.
        pairs: of rounds per arm.
        batch: requests of a round, all submitted at once.
        tokens: generated for each of them.
        options: vLLM's own, the same for both engines.
        with_control: also a second stock engine against the first: the noise of the method.
        say: told of progress.

    Returns:
        Results for the report, and a ratio per arm.
    """
    assert subject.bundle.path is not None
    settings = {
        "model": str(subject.model),
        "options": {"max_num_seqs": batch, **options},
        "batch": batch,
        "tokens": tokens,
        "vocabulary": subject.bundle.manifest.model.vocabulary,
    }
    arms = {
        "idle": [],
        "steered": [plan.to_json() for plan in subject.plans(batch, distinct=False)],
        "distinct": [plan.to_json() for plan in subject.plans(batch, distinct=True)],
    }
    with ExitStack() as stack:

        def start(bundles: list[str], environment: dict[str, str] | None = None) -> Companion:
            made = stack.enter_context(companion(RESIDENT, settings | {"bundles": bundles}, environment))
            _check(made.wait_until_ready(), is_steering=bool(bundles))
            return made

        say("starting stock vLLM")
        stock = start([], WITHOUT_PLUGINS)
        say("starting vLLM with the bundle")
        steering = start([str(subject.bundle.path.resolve())])
        runners = dict.fromkeys(arms, steering)
        if with_control:
            say("starting stock vLLM a second time")
            runners["stock again"], arms["stock again"] = start([], WITHOUT_PLUGINS), []
        layers = {name: _layers(subject, distinct=name == "distinct") if plans else [] for name, plans in arms.items()}
        seed = 0
        for _ in range(WARM_UP):
            seed += 1
            stock.ask(seed=seed, plans=[])
            for name, runner in runners.items():
                runner.ask(seed=seed * 1000 + len(name), plans=arms[name])
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
        work: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
        for turn in range(pairs):
            for name, runner in runners.items():
                seed += 1
                order = [(stock, []), (runner, arms[name])]
                answers = [each.ask(seed=10_000 + seed, plans=plans) for each, plans in _turned(order, turn)]
                mine, reference = _turned(answers, turn + 1)
                if mine["edited"] != layers[name]:
                    raise EditNotApplied(f"round {name!r} edited layers {mine['edited']}, its plans {layers[name]}")
                assert mine["tokens"] == reference["tokens"] == batch * tokens
                rounds[name].append((mine["tokens"] / mine["seconds"], reference["tokens"] / reference["seconds"]))
                work[name].append(
                    (mine["tokens"] / mine["processor_seconds"], reference["tokens"] / reference["processor_seconds"])
                )
            say(f"engine: pair {turn + 1} of {pairs}: " + ", ".join(_last(name, rounds[name]) for name in rounds))
    ratios = [ratio_of(f"{name} ÷ stock vLLM", rounds[name], target=TARGETS.get(name)) for name in rounds]
    # The same rounds by processor time, which a neighbour on the machine disturbs less.
    ratios += [ratio_of(f"{name} ÷ stock vLLM, by work", work[name]) for name in work]
    facts = {"batch": batch, "tokens": tokens, "options": settings["options"]}
    facts["tokens_per_second"] = {name: _columns(each) for name, each in rounds.items()}
    facts["tokens_per_processor_second"] = {name: _columns(each) for name, each in work.items()}
    return facts, ratios


def _columns(pairs: list[tuple[float, float]]) -> dict[str, list[float]]:
    return {"arm": [round(arm, 1) for arm, _ in pairs], "stock_beside": [round(stock, 1) for _, stock in pairs]}


def _turned(order: list[Any], turn: int) -> list[Any]:
    """As given on even turns, reversed on odd ones."""
    return order if turn % 2 == 0 else order[::-1]


def _last(name: str, rounds: list[tuple[float, float]]) -> str:
    arm, reference = rounds[-1]
    return f"{name} {arm / reference:.3f} ({arm:.0f} tok/s)"


def _layers(subject: Subject, *, distinct: bool) -> list[int]:
    names = {plan.edit for plan in subject.plans(len(subject.bundle.edits), distinct=distinct)}
    return sorted({terms.layer for name in names for terms in subject.bundle.edits[name].layers})


def _check(about: dict[str, Any], *, is_steering: bool) -> None:
    if about["steering"] != is_steering or (not is_steering and about["plugin_modules"]):
        raise PluginNotArmed(f"a process that should {'' if is_steering else 'not '}steer says {about}")
    if is_steering and not about["report"]["layers"]:
        raise PluginNotArmed(f"no layer of the steering engine is armed: {about['report']}")
