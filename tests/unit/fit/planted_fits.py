"""Topic fits on the planted model, ready to run, whose files all lie in one folder.

The prompts are harmful, of the topic, or plain, and the judge goes by first tokens unless another is given.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steering.evaluate.judge import Judge, TokenJudge
from steering.fit.datasets import DataDirectory
from steering.fit.topic_directions import Method
from steering.fit.topic_fit import TopicFit
from steering.fit.topic_prompts import Role
from steering.fit.topic_settings import TopicSettings
from steering.fit.topics import TopicStage, fit_topics
from tests.unit.fit.planted import HARM, PLAIN, REFUSAL, RESPOND, TOPIC, Planted, model_folder, opener, prompts

WHOLE = TopicSettings(
    samples=3,
    max_tokens=64,
    counts=(1, 2),
    alphas=(0.5, 1.0, 2.0, 4.0),
    shift_prompts=8,
    finder_prompts=10,
    gated=20,
    ranged=4,
    strengths=(1.0, 1.5),
    bootstrap=2,
    least=4,
)
SMALL = replace(WHOLE, methods=(Method.MD, Method.WRMD), alphas=(1.0, 2.0), repositions=False, bootstrap=0)
"""Half the methods and a fraction of the configurations, for tests that look at something else."""

COUNT = 80
"""Prompts of each kind."""

NOWHERE = DataDirectory(path=Path("no-such-folder"))
TOKENS = TokenJudge(refusals={REFUSAL: "Political"}, respond=RESPOND)


@dataclass
class Fitted:
    """A fit on a planted model, ready to run.

    Attributes:
        said: what it told.
        started: engines that were started.
    """

    fit: TopicFit
    sources: dict[Role, Sequence[str]]
    bundle: Path
    said: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)

    def run(self, until: TopicStage = TopicStage.BUNDLE) -> Any:
        """The whole, or up to a stage."""
        return fit_topics(self.fit, self.sources, NOWHERE, self.bundle, name="planted", version="1", until=until)

    def stage(self, name: str) -> dict[str, Any]:
        """What a stage left."""
        found: dict[str, Any] = json.loads((self.fit.work / f"{name}.json").read_text("utf-8"))
        return found


def planted_fit(
    folder: Path,
    settings: TopicSettings = SMALL,
    planted: Planted | None = None,
    judge: Judge = TOKENS,
    *,
    safety: bool = True,
    work: str = "work",
) -> Fitted:
    """A fit whose files all lie in one folder."""
    sources: dict[Role, Sequence[str]] = {}
    for role, word in ((Role.REFUSED, TOPIC), (Role.ANSWERED, PLAIN), (Role.SAFETY, HARM)):
        if role is Role.SAFETY and not safety:
            continue
        path = folder / f"{role}.txt"
        path.write_text("\n".join(prompts(word, COUNT)), "utf-8")
        sources[role] = [str(path)]
    said: list[str] = []
    started: list[str] = []
    fit = TopicFit(
        model=model_folder(folder / "model"),
        work=folder / work,
        settings=settings,
        judge=judge,
        open_engine=opener(planted or Planted(), started),
        judge_facts={"name": judge.name},
        say=said.append,
    )
    return Fitted(fit=fit, sources=sources, bundle=folder / "bundle", said=said, started=started)
