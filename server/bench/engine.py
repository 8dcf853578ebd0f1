"""Engine bench: tokens per second of a batch, steering against stock vLLM, in alternating rounds.

Both engines stay resident and one works at a time. Every pair is a round of one arm and a round of what it is compared
with, in turns the one and the other first: what slows the machine for longer than a pair slows both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from server.bench.companion import Companion, companion
from server.bench.report import Ratio, ratio_of
from server.bench.subject import Kind, Subject
from steering.errors import EditNotApplied, PluginNotArmed

RESIDENT = "server.bench.resident"
WITHOUT_PLUGINS = {"VLLM_PLUGINS": "none-of-them"}
"""vLLM loads the plugins named here and no other: nothing of ours is in the stock process."""

PROMPTS = (32, 128, 256)
"""Tokens of the prompts before first tokens: what a gate adds is the same after each; what it is added to is not."""

WARM_UP = 3
"""Rounds of each arm before the first pair: compiled code, caches and thread pools are there afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What is compared with what.

    Attributes:
        name: `this ÷ that`.
        runner, reference: the engines that do this and that; the reference is never steered.
        plans: one per request of the runner's rounds; none leaves them unsteered.
        kind: of the plans.
        first_token_after: tokens of the prompts of requests of one token, steered and not in turn, one after the other
            in one round of one engine; None for a round of whole answers.
        target: what the median ratio must reach.
    """

    name: str
    runner: Companion
    reference: Companion
    plans: Sequence[str] = ()
    kind: Kind | None = None
    first_token_after: int | None = None
    target: float | None = None

    def pair(self, seed: int, turn: int) -> list[dict[str, Any]]:
        """A round of either, first the one and then the other by `turn`; this one's answer, then the reference's.

        Prompts are alike, or where one engine plays both, others of the same length: it would find them in its cache.
        """
        if self.first_token_after is not None:
            asked = {"seed": seed, "plans": list(self.plans), "first_token_after": self.first_token_after}
            answers: list[dict[str, Any]] = self.runner.ask(**asked)["answers"]
            return answers
        seeds = [10_000 + seed, 10_000_000 + seed if self.runner is self.reference else 10_000 + seed]
        orders = _turned([(self.reference, [], seeds[0]), (self.runner, list(self.plans), seeds[1])], turn)
        return _turned([each.ask(seed=number, plans=plans) for each, plans, number in orders], turn + 1)


def measure(
    subject: Subject,
    *,
    pairs: int,
    batch: int,
    tokens: int,
    options: dict[str, Any],
    with_control: bool,
    with_stock: bool = True,
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
        with_stock: without it only what the gate costs, on one engine that is steered and not in turn: no other takes
            its processor, and a pair is soon over.
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
    plans = {kind: [plan.to_json() for plan in subject.plans(batch, kind)] for kind in Kind}
    with ExitStack() as stack:

        def start(bundles: list[str], environment: dict[str, str] | None = None) -> Companion:
            made = stack.enter_context(companion(RESIDENT, settings | {"bundles": bundles}, environment))
            check_armed(made.wait_until_ready(), is_steering=bool(bundles))
            return made

        arms: list[Arm] = []
        say("starting vLLM with the bundle")
        steering = start([str(subject.bundle.path.resolve())])
        if with_stock:
            say("starting stock vLLM")
            stock = start([], WITHOUT_PLUGINS)
            arms.append(Arm(name="idle ÷ stock vLLM", runner=steering, reference=stock, target=0.97))
            arms += [
                Arm(
                    name=f"{kind} ÷ stock vLLM",
                    runner=steering,
                    reference=stock,
                    plans=plans[kind],
                    kind=kind,
                    target=target,
                )
                for kind, target in ((Kind.STEERED, 0.93), (Kind.DISTINCT, None), (Kind.AUTO, None))
            ]
        gated = Arm(
            name="auto ÷ unsteered",
            runner=steering,
            reference=steering,
            plans=plans[Kind.AUTO],
            kind=Kind.AUTO,
            target=0.97,
        )
        arms.append(gated)
        arms += [
            replace(gated, name=f"auto ÷ unsteered, first token after {length}", first_token_after=length)
            for length in PROMPTS
        ]
        if with_stock and with_control:
            say("starting stock vLLM a second time")
            arms.append(Arm(name="stock again ÷ stock vLLM", runner=start([], WITHOUT_PLUGINS), reference=stock))
        seed = 0
        for _ in range(WARM_UP):
            for arm in arms:
                seed += 1
                arm.pair(seed, turn=seed)
        rounds: dict[str, list[tuple[float, float]]] = {arm.name: [] for arm in arms}
        work: dict[str, list[tuple[float, float]]] = {arm.name: [] for arm in arms}
        for turn in range(pairs):
            for arm in arms:
                seed += 1
                mine, reference = arm.pair(seed, turn)
                _check_edited(arm, mine, subject)
                assert mine["tokens"] == reference["tokens"] == batch * (tokens if arm.first_token_after is None else 1)
                rounds[arm.name].append((mine["tokens"] / mine["seconds"], reference["tokens"] / reference["seconds"]))
                if arm.first_token_after is not None:
                    continue
                work[arm.name].append(
                    (mine["tokens"] / mine["processor_seconds"], reference["tokens"] / reference["processor_seconds"])
                )
            say(f"engine: pair {turn + 1} of {pairs}: " + ", ".join(_last(name, rounds[name]) for name in rounds))
    ratios = [ratio_of(arm.name, rounds[arm.name], target=arm.target) for arm in arms]
    # The same rounds by processor time, which a neighbour on the machine disturbs less.
    ratios += [ratio_of(f"{name}, by work", each) for name, each in work.items() if each]
    facts = {"batch": batch, "tokens": tokens, "options": settings["options"]}
    facts["tokens_per_second"] = {name: _columns(each) for name, each in rounds.items()}
    facts["tokens_per_processor_second"] = {name: _columns(each) for name, each in work.items()}
    return facts, ratios


def _check_edited(arm: Arm, answer: dict[str, Any], subject: Subject) -> None:
    """The layers that edited a token are those the plans name; of those a gate may choose from, at least one."""
    edited = set(answer["edited"])
    possible = set() if arm.kind is None else subject.layers(arm.kind)
    is_right = bool(edited) and edited <= possible if arm.kind is Kind.AUTO else edited == possible
    if not is_right:
        raise EditNotApplied(f"a round of {arm.name!r} edited layers {sorted(edited)}, its plans {sorted(possible)}")


def _columns(pairs: list[tuple[float, float]]) -> dict[str, list[float]]:
    return {"arm": [round(arm, 1) for arm, _ in pairs], "reference": [round(beside, 1) for _, beside in pairs]}


def _turned(order: list[Any], turn: int) -> list[Any]:
    """As given on even turns, reversed on odd ones."""
    return order if turn % 2 == 0 else order[::-1]


def _last(name: str, rounds: list[tuple[float, float]]) -> str:
    arm, reference = rounds[-1]
    return f"{name} {arm / reference:.3f} ({arm:.0f} tok/s)"


def check_armed(about: dict[str, Any], *, is_steering: bool) -> None:
    """What a resident says of itself is what was started.

    Raises:
        PluginNotArmed: it steers and should not, or should and does not.
    """
    if about["steering"] != is_steering or (not is_steering and about["plugin_modules"]):
        raise PluginNotArmed(f"a process that should {'' if is_steering else 'not '}steer says {about}")
    if is_steering and not about["report"]["layers"]:
        raise PluginNotArmed(f"no layer of the steering engine is armed: {about['report']}")
