"""Capture bench: residuals of prompts at engine speed against transformers, and what it costs those who do not ask.

All three processes stay resident and one works at a time. Every pair is a round of either side, in turns the one and
the other first.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from server.bench.companion import Companion, companion
from server.bench.report import Ratio, ratio_of
from server.bench.subject import Subject

RESIDENT = "server.bench.capture_resident"
PROMPTS, LENGTH, SHORTEST, LONGEST = 128, 64, 16, 112
"""Prompts of a round: all of one length, or of lengths drawn evenly, the mean of which is the same."""

WARM_UP = 1
IDLE = "capturing engine, nobody asks ÷ engine"


def measure(
    subject: Subject, *, pairs: int, batch: int, tokens: int, options: dict[str, Any], say: Callable[[str], None]
) -> tuple[dict[str, Any], list[Ratio]]:
    """Run every arm.

    Args:
        subject: model.
        pairs: of rounds per arm.
        batch: requests of a round that asks for nothing.
        tokens: generated for each of them.
        options: vLLM's own; both sides compute in float32.
        say: told of progress.

    Returns:
        Results for the report, and a ratio per arm.
    """
    settings = {
        "model": str(subject.model),
        "options": {"dtype": "float32", **options},
        "vocabulary": subject.bundle.manifest.model.vocabulary,
    }
    draw = random.Random(0)
    mixed = [draw.randint(SHORTEST, LONGEST) for _ in range(PROMPTS)]
    with ExitStack() as stack:
        ways: dict[str, Companion] = {}
        for way in ("transformers", "plain", "engine"):
            say(f"starting {way}")
            ways[way] = stack.enter_context(companion(RESIDENT, {**settings, "way": way}))
            ways[way].wait_until_ready()
        arms: dict[str, tuple[str, str, dict[str, Any], float]] = {
            "capture ÷ transformers, one length": ("engine", "transformers", {"lengths": [LENGTH] * PROMPTS}, 1.0),
            "capture ÷ transformers, mixed": ("engine", "transformers", {"lengths": mixed}, 1.0),
            IDLE: ("engine", "plain", {"lengths": [LENGTH // 2] * batch, "tokens": tokens}, 0.97),
        }
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
        seed = 0
        for turn in range(-WARM_UP, pairs):
            for name, (arm, reference, order, _) in arms.items():
                seed += 1  # never used twice in one engine, which would find the prompts in its cache
                rate = {}
                for side in [arm, reference] if turn % 2 else [reference, arm]:
                    answer = ways[side].ask(seed=seed, **order)
                    rate[side] = answer["made"] / answer["seconds"]
                if turn >= 0:
                    rates[name].append((rate[arm], rate[reference]))
            if turn >= 0:
                say(f"capture: pair {turn + 1} of {pairs}: " + ", ".join(_last(*each) for each in rates.items()))
    ratios = [ratio_of(name, rates[name], target=target) for name, (_, _, _, target) in arms.items()]
    columns = {
        name: {"arm": [round(mine, 1) for mine, _ in each], "reference": [round(other, 1) for _, other in each]}
        for name, each in rates.items()
    }
    facts = {"prompts": PROMPTS, "length": LENGTH, "lengths": [SHORTEST, LONGEST], "batch": batch, "tokens": tokens}
    return {**facts, "options": settings["options"], "per_second": columns}, ratios


def _last(name: str, rates: list[tuple[float, float]]) -> str:
    arm, reference = rates[-1]
    return f"{name} {arm / reference:.3f} ({arm:.0f}/s)"
