"""What engine tests compare: answers against the oracle and against each other."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tests.integration.engine.scenario import Ask, Got
from tests.oracle import Oracle

# Both sides compute in float32, but sum in another order (fused norms, blocked attention, one batch against one
# request). Over four layers that moves a log-probability by up to 3e-6 on one processor and 2.3e-5 on another; edits
# move it by 0.02 to 1.4.
FLOAT32_TOLERANCE = 5e-5


def prompt_of(length: int, seed: int) -> tuple[int, ...]:
    """A random prompt; its first token depends on the seed, so that no two share a prefix by accident."""
    generator = random.Random(seed)
    return (seed % 200 + 1, *(generator.randrange(1, 250) for _ in range(length - 1)))


def check_against_oracle(
    oracle: Oracle, asks: Sequence[Ask], answers: Sequence[Got], tolerance: float = FLOAT32_TOLERANCE
) -> None:
    """Every token is the best one under its edit, or as good within rounding, and has the oracle's log-probability."""
    for ask, got in zip(asks, answers, strict=True):
        assert len(got.tokens) == ask.samples
        for tokens, logprobs in zip(got.tokens, got.logprobs, strict=True):
            assert len(tokens) == ask.count
            score = oracle.score(ask.prompt, tokens, edit=ask.edit, strength=ask.strength, scope=ask.scope)
            for place, (given, oracle_given, best) in enumerate(zip(logprobs, score.given, score.best, strict=True)):
                where = f"{ask}\ntoken {place}: engine {given:.5f}, oracle {oracle_given:.5f}, best {best:.5f}"
                assert abs(given - oracle_given) <= tolerance, where
                assert best - oracle_given <= 2 * tolerance, where
