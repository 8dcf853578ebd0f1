"""Scenario: rounds of requests that are played against one engine, and what came of them. Knows nothing of vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request: `edit` and `gate` None is unsteered; `plan_text` overrides what the other fields would give.

    `gate` holds the fields of a `GateOrder`; `response` has the bundle's response probe read the answer. `abort_at` is
    the number of engine steps of the round after which it is aborted.
    """

    prompt: tuple[int, ...]
    count: int
    edit: str | None = None
    gate: dict[str, Any] | None = None
    strength: float = 1.0
    scope: str = "generated"
    samples: int = 1
    plan_text: str | None = None
    response: bool = False
    reasoning: str = "edited"
    prompt_logprobs: bool = False
    abort_at: int | None = None


@dataclass(kw_only=True)
class Scenario:
    """One engine and what it is asked: each round is one call, its requests run together.

    Attributes:
        model: local folder.
        bundle: bundle folder; None runs vLLM as if this project were not installed.
        arguments: of `vllm.LLM`.
        rounds: requests of each round.
        environment: on top of the process's own.
        v2_interpreted: Model Runner V2 on Triton's interpreter.
    """

    model: str
    bundle: str | None
    rounds: list[list[Ask]]
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    v2_interpreted: bool = False


@dataclass(frozen=True, kw_only=True)
class Got:
    """What one request got: per sample its tokens and their log-probabilities, and cached prompt tokens.

    `prompt_logprobs` are those of the prompt's tokens from the second on, `aborted` what it was at when it was aborted.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    cached: int
    finish: list[str]
    prompt_logprobs: list[float] = field(default_factory=list)
    aborted: str = ""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Answers, engine steps and preemptions by round, outcomes the worker sent, what its response probe read ([plan,
    request, tokens, score] each), the worker's report, and the scheduler's class.
    """

    rounds: list[list[Got]]
    steps: list[int]
    preempted: list[int]
    outcomes: list[dict[str, Any]]
    responses: list[list[Any]]
    report: dict[str, Any]
    scheduler: str

    @property
    def preemptions(self) -> int:
        """Of all rounds."""
        return sum(self.preempted)
