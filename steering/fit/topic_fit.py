"""A topic fit: its model, judge and settings, the folder of its stages, and the engine its prompts are asked of.

Knows nothing of the order of the stages; `topics.py` has it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from steering import __version__
from steering.bundle import Bundle
from steering.engine.asks import Answer, Ask
from steering.engine.options import CaptureSettings
from steering.evaluate.judge import Evidence, Judge, Judged
from steering.fingerprint import fingerprint_of
from steering.fit.stages import Result, run_stage, stage_tensors
from steering.fit.topic_settings import TopicSettings
from steering.gate import Probe

PAUSE = 15.0
"""Seconds between two words on progress."""

FIRST_TOKENS = 8
"""Tokens of an answer that judges of tokens see."""


class Residuals(Protocol):
    """Residuals at the last prompt token; `steering.fit.captured.CapturedShards` is one."""

    def layer(self, layer: int) -> Tensor:
        """[N, D] float32 at the output of a block, in the order of the asks."""


class Engine(Protocol):
    """What a topic fit needs of `steering.engine.offline.OfflineEngine`."""

    tokenizer: Any

    def chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Token ids up to and including the assistant's header."""

    def ask(self, asks: Sequence[Ask], on_progress: Callable[[int], None] = ...) -> list[Answer]:
        """Everything in one batch."""

    def capture(self, asks: Sequence[Ask], on_progress: Callable[[int], None] = ...) -> Residuals:
        """Residuals of asks, those in the folder already included."""

    def captured(self) -> Residuals:
        """What was captured so far."""


class EngineOpener(Protocol):
    """Starts an engine; one at a time."""

    def __call__(
        self, *, bundles: Sequence[Path] = (), capture: CaptureSettings | None = None
    ) -> AbstractContextManager[Engine]:
        """The engine of the fit's model with these bundles loaded."""


class Session:
    """An engine that is started when it is first needed, so that a run whose stages are all there starts none."""

    def __init__(self, start: Callable[[], AbstractContextManager[Engine]], stack: ExitStack) -> None:
        self._start, self._stack = start, stack
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """The engine, running."""
        if self._engine is None:
            self._engine = self._stack.enter_context(self._start())
        return self._engine


@dataclass(frozen=True, kw_only=True, eq=False)
class TopicFit:
    """What every stage works with.

    Attributes:
        judge_facts: what the judge's verdicts depend on, such as its model; part of what judged stages depend on.
        refusal_tokens: category to the id of its token, where the model has such tokens.
        respond: id of `[respond]`; None where the model has none.
        judging: a bundle whose response probe is the judge; None where another is. What the fit writes has that probe
            as well: an engine reads an answer with the probe of the bundle that edits it.
    """

    model: Path
    work: Path
    settings: TopicSettings
    judge: Judge
    open_engine: EngineOpener
    judge_facts: Mapping[str, Any]
    refusal_tokens: Mapping[str, int] = field(default_factory=dict)
    respond: int | None = None
    judging: Bundle | None = None
    say: Callable[[str], None] = print

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Of the model: every stage depends on it."""
        return fingerprint_of(self.model).model_dump(mode="json")

    @property
    def depth(self) -> int:
        """Decoder blocks, L."""
        return int(self.fingerprint["layers"])

    @property
    def width(self) -> int:
        """Width of the residual stream, D."""
        return int(self.fingerprint["hidden_size"])

    def stage(
        self,
        name: str,
        make: Callable[[], Result],
        *,
        of: Sequence[str] = (),
        after: Sequence[Mapping[str, Any]] = (),
        given: Mapping[str, Any] | None = None,
    ) -> Result:
        """The stage's result; see `steering.fit.stages.run_stage`.

        Args:
            of: names of the settings it depends on, beside the seed.
            after: results of earlier stages it depends on.
            given: whatever else it depends on.
        """
        fields = asdict(self.settings)
        facts = {
            "stage": name,
            "code": __version__,
            "model": self.fingerprint,
            "settings": {key: fields[key] for key in ("seed", *of)},
            "after": [result["digest"] for result in after],
            "given": dict(given or {}),
        }
        identity = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        return run_stage(self.work, name, identity, make, self.say)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors a stage left."""
        return stage_tensors(self.work, name)

    @contextmanager
    def session(self, *, bundles: Sequence[Path] = (), capture: CaptureSettings | None = None) -> Iterator[Session]:
        """An engine for as long as the context lasts, started when first used."""
        if not bundles and self.judging is not None and self.judging.path is not None:
            bundles = [self.judging.path]
        with ExitStack() as stack:
            yield Session(lambda: self.open_engine(bundles=bundles, capture=capture), stack)

    def response(self) -> tuple[dict[str, Any], dict[str, Probe]]:
        """What a manifest of this fit says of the probe that judges, and the probe by name; nothing where none does."""
        record = None if self.judging is None else self.judging.manifest.response
        if self.judging is None or record is None:
            return {"probes": []}, {}
        said = record.model_dump(mode="json", exclude={"layer", "categories"})
        return {"probes": [said], "response_probe": record.name}, {record.name: self.judging.probes[record.name]}

    def prompt_ids(self, engine: Engine, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of prompts, each a user's first turn."""
        return [engine.chat([{"role": "user", "content": text}]) for text in texts]

    def progress(self, name: str, total: int) -> Callable[[int], None]:
        """Says how far it is, every so many seconds."""
        told = time.monotonic()

        def heard(done: int) -> None:
            nonlocal told
            if time.monotonic() - told > PAUSE:
                told = time.monotonic()
                self.say(f"  {name}: {done} of {total}")

        return heard

    def ask(self, name: str, engine: Engine, asks: Sequence[Ask]) -> list[Answer]:
        """All of it in one batch, with progress."""
        return engine.ask(asks, self.progress(name, len(asks))) if asks else []

    def judged(self, cases: Sequence[Case]) -> list[Judged]:
        """The judge's verdicts; what was said of finished cases is kept where the judge keeps it."""
        if not cases:
            return []
        pairs = [(case.prompt, case.text) for case in cases]
        evidence = [Evidence(tokens=case.tokens, probability=case.probability) for case in cases]
        return self.judge.judge(pairs, evidence=evidence)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One answer to be judged.

    Attributes:
        tokens: the first of the answer's.
        probability: of refusal by a response probe; None without one.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...] = ()
    probability: float | None = None


def cases_of(prompt: str, answer: Answer) -> list[Case]:
    """A case for each sample of an answer."""
    read = answer.response or (None,) * len(answer.samples)
    return [
        Case(prompt=prompt, text=sample.text, tokens=sample.tokens[:FIRST_TOKENS], probability=probability)
        for sample, probability in zip(answer.samples, read, strict=True)
    ]
