"""Refusal rates measured over a served API, as any client would.

Each prompt is asked once under every arm, greedily; the judge is the server's own verdict, read from the first token,
so it is exact for models with refusal tokens and absent for others. Knows nothing of vLLM, torch or the gateway's code.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openai import APIError, AsyncOpenAI

from steering.errors import UnsupportedConfiguration
from steering.fit.intervals import Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to ask; None as profile is the server's default.

    Attributes:
        name: in reports.
        mode: `off`, `refuse` or `comply`.
        strength: None is the profile's.
    """

    name: str
    mode: str
    profile: str | None = None
    strength: float | None = None

    def steering(self) -> dict[str, Any]:
        """The `steering` field of a request."""
        asked = {"mode": self.mode, "profile": self.profile, "strength": self.strength}
        return {name: value for name, value in asked.items() if value is not None}


ARMS = (
    Arm(name="unsteered", mode="off"),
    Arm(name="refuse", mode="refuse"),
    Arm(name="comply", mode="comply"),
    Arm(name="random-refuse", mode="refuse", profile="random-control"),
    Arm(name="random-comply", mode="comply", profile="random-control"),
)
"""The arms of the README: both sides, and a random direction of the same norm on both sides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What came of one suite under one arm.

    Attributes:
        refused, answered: choices the detector told of.
        unknown: choices it could not tell of; in neither rate.
        failed: requests that were not answered, by error code.
        categories: refusals by the category they name.
    """

    refused: int
    answered: int
    unknown: int
    failed: Mapping[str, int]
    categories: Mapping[str, int]

    @property
    def refusals(self) -> Rate:
        """Refused among those the detector told of."""
        return Rate(count=self.refused, n=self.refused + self.answered)

    def to_json(self) -> dict[str, Any]:
        """For a report."""
        return {
            "refusals": self.refusals.to_json(),
            "unknown": self.unknown,
            "failed": dict(self.failed),
            "categories": dict(self.categories),
        }


async def measure(
    client: AsyncOpenAI,
    suites: Mapping[str, Sequence[str]],
    arms: Sequence[Arm] = ARMS,
    *,
    concurrency: int = 32,
    max_tokens: int = 4,
    on_progress: Callable[[int], object] = lambda _: None,
) -> dict[str, Any]:
    """Ask every prompt of every suite under every arm.

    Args:
        client: of the server.
        suites: prompts by name.
        arms: ways to ask.
        concurrency: requests at once; arms are mixed within the batch.
        max_tokens: of each answer; the verdict needs the first only.
        on_progress: called with the number of answers that are new.

    Returns:
        A report for JSON: the server's model, bundles, arms, and a tally by suite and arm.

    Raises:
        UnsupportedConfiguration: the server applied something else than an arm asks.
    """
    model = (await client.models.list()).data[0].id
    described = await client.get("/steering", cast_to=object)
    assert isinstance(described, dict)
    gate = asyncio.Semaphore(concurrency)

    async def ask(prompt: str, arm: Arm) -> tuple[str, str | None]:
        async with gate:
            try:
                answer = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": prompt}],
                    temperature=0,
                    max_tokens=max_tokens,
                    extra_body={"steering": arm.steering()},
                )
            except APIError as error:
                return "failed", error.code or type(error).__name__
            finally:
                on_progress(1)
        told = (answer.model_extra or {}).get("steering")
        if not told or told["decision"] != arm.mode or told["applied"] != (arm.mode != "off"):
            raise UnsupportedConfiguration(f"arm {arm.name!r} asked for {arm.mode}, the server says {told}")
        verdict = told["verdict"]
        if verdict["refused"] is None:
            return "unknown", None
        return ("refused", verdict["category"]) if verdict["refused"] else ("answered", None)

    results: dict[str, dict[str, Any]] = {}
    for suite, prompts in suites.items():
        jobs = [(prompt, arm) for prompt in prompts for arm in arms]
        found = await asyncio.gather(*(ask(prompt, arm) for prompt, arm in jobs))
        by_arm: dict[str, list[tuple[str, str | None]]] = {arm.name: [] for arm in arms}
        for (_, arm), outcome in zip(jobs, found, strict=True):
            by_arm[arm.name].append(outcome)
        results[suite] = {name: _tally(outcomes).to_json() for name, outcomes in by_arm.items()}
    return {
        "model": model,
        "version": described["version"],
        "bundles": [bundle["label"] for bundle in described["bundles"]],
        "judge": "the server's verdict on the first token",
        "max_tokens": max_tokens,
        "prompts": {suite: len(prompts) for suite, prompts in suites.items()},
        "arms": {arm.name: arm.steering() for arm in arms},
        "results": results,
    }


def table(report: Mapping[str, Any]) -> str:
    """The report's refusal rates as a table in Markdown."""
    arms = list(report["arms"])
    lines = ["| suite | n | " + " | ".join(arms) + " |", "|---|---|" + "---|" * len(arms)]
    for suite, by_arm in report["results"].items():
        cells = []
        for arm in arms:
            rate = by_arm[arm]["refusals"]
            cells.append(f"{rate['rate']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})")
        lines.append(f"| {suite} | {report['prompts'][suite]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _tally(outcomes: Sequence[tuple[str, str | None]]) -> Tally:
    kinds = Counter(kind for kind, _ in outcomes)
    return Tally(
        refused=kinds["refused"],
        answered=kinds["answered"],
        unknown=kinds["unknown"],
        failed=Counter(str(detail) for kind, detail in outcomes if kind == "failed"),
        categories=dict(sorted(Counter(str(detail) for kind, detail in outcomes if kind == "refused").items())),
    )
