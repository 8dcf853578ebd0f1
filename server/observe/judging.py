"""Judging: a model elsewhere says of a sample of the answers whether they refuse, long after they were given.

Never in the way of an answer: what finds no room in the queue is dropped and counted. The texts of a request leave this
process here and nowhere else, for the configured judge alone, of profiles that the operator names. Knows nothing of
HTTP, vLLM or torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.catalog import Catalog
from server.engine import Prompting
from server.generation import Generation
from server.observe.events import Ended
from server.observe.labels import Labels
from server.rollout import EVERY, drawn
from server.verdicts import DETECTOR, PROBE_DETECTOR
from steering.errors import OperatorError, UnsupportedConfiguration

WINDOW = 500
"""Latest judgements that an online agreement rests on."""

BATCH = 8
"""Answers judged at once."""

LONGEST_PAUSE = 60.0
"""Seconds, after a judge that is out of reach."""

HUMAN_LABELS = "human_labels"

_log = logging.getLogger("trimtab")


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeOrder:
    """Which answers are judged, and by whom.

    Attributes:
        url: root of an OpenAI-compatible API.
        model: of the judge.
        key: of that API.
        rates: share of answers by stratum: `category/decision`, `category/*`, `*/decision` or `*`; the first of these
            that is there counts, and without any none is judged.
        profiles: whose answers may be judged, as `Catalog.profile_names` has them; `*` for all.
        calibration: what `trimtab judge calibrate --judge llm --out` wrote of this judge.
        per_minute: most answers.
        queue: answers that wait at most.
    """

    url: str
    model: str
    key: str = field(default="unused", repr=False)
    rates: Mapping[str, float] = field(default_factory=lambda: {EVERY: 0.02})
    profiles: frozenset[str] = frozenset()
    calibration: Path | None = None
    per_minute: int = 60
    queue: int = 256

    def check(self, catalog: Catalog) -> None:
        """Refuse what would judge nothing, or not what was meant.

        Raises:
            UnsupportedConfiguration: no profile is named, or one that is not loaded.
        """
        known = {EVERY} | {
            name
            for bundle in catalog.bundles
            for profile in bundle.profiles
            for name in (profile, f"{bundle.name}/{profile}")
        }
        unknown = sorted(self.profiles - known)
        if not self.profiles or unknown:
            why = f"names {unknown}, which no loaded bundle has" if unknown else "names none"
            raise UnsupportedConfiguration(
                f"TRIMTAB_JUDGE_PROFILES {why}; answers go to the judge at {self.url} only for profiles that are named "
                f"there: {sorted(known)}"
            )

    def rate(self, category: str, decision: str) -> float:
        """The share of a stratum that is judged."""
        strata = (f"{category}/{decision}", f"{category}/*", f"*/{decision}", EVERY)
        return next((self.rates[name] for name in strata if name in self.rates), 0.0)


class Verdicts(Protocol):
    """The part of `steering.evaluate.llm_judge.LlmJudge` that is used here."""

    async def judging(self, pairs: Sequence[tuple[str, str]]) -> Sequence[Any]:
        """A judgement for each (prompt, answer); raises `OperatorError` where the judge is out of reach."""
        ...


@dataclass(frozen=True, slots=True)
class Case:
    """An answer to be judged, with what is known of it."""

    prompt: str
    answer: str
    category: str
    decision: str
    detector: str
    refused: bool | None


class Judging:
    """Samples answers and has them judged; an observer.

    Args:
        order: which, and by whom.
        judge: asked for verdicts; its name is the label `judge`.
        registry: where it is counted.
        labels: of metrics.
        name: of the judge.
    """

    def __init__(
        self, order: JudgeOrder, judge: Verdicts, registry: CollectorRegistry, labels: Labels, name: str = "llm"
    ) -> None:
        self._order = order
        self._judge = judge
        self._labels = labels
        self._name = name
        self._queue: asyncio.Queue[Case] = asyncio.Queue(order.queue)
        self._task: asyncio.Task[None] | None = None
        self._agreed: dict[str, deque[bool]] = {}
        self._allowed = float(order.per_minute)
        self._filled_at: float | None = None
        self._sampled = Counter(
            "steering_judge_sampled",
            "Answers chosen to be judged: each stratum has a rate of its own, so do not sum over them unweighted.",
            ("category", "decision"),
            registry=registry,
        )
        self._judged = Counter(
            "steering_judged",
            "Judged answers by what the judge says of them; error is a judge that gave no verdict.",
            ("category", "decision", "outcome", "judge"),
            registry=registry,
        )
        self._failures = Counter(
            "steering_judge_failures",
            "Answers chosen and not judged: dropped (no room in the queue), over_budget, no_text, unreachable or "
            "unparsable.",
            ("reason",),
            registry=registry,
        )
        self._waiting = Gauge("steering_judge_queue", "Answers that wait to be judged.", registry=registry)
        self._waiting.set_function(self._queue.qsize)
        agreement = ("judge", "against")
        self._ratio = Gauge(
            "steering_judge_agreement_ratio",
            "Share of verdicts on which the judge agrees with human labels (its calibration), or with the server's own "
            f"detectors (the latest {WINDOW}).",
            agreement,
            registry=registry,
        )
        self._rests_on = Gauge(
            "steering_judge_agreement_samples", "Verdicts that the agreement rests on.", agreement, registry=registry
        )
        if order.calibration is not None:
            found = read_calibration(order.calibration, model=order.model)
            self._ratio.labels(name, HUMAN_LABELS).set(found.rate)
            self._rests_on.labels(name, HUMAN_LABELS).set(found.n)

    def start(self) -> None:
        """Begin to judge."""
        self._task = asyncio.create_task(self._work(), name="judge")

    async def stop(self) -> None:
        """End; what waits is not judged."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def ended(self, event: Ended) -> None:
        """Put the answers of a request into the queue that are drawn."""
        if event.ticket.is_internal or not event.is_complete or not self._may_judge(event):
            return
        prompt: str | None = None
        for sample, (answer, verdict) in enumerate(zip(event.contents, event.verdicts, strict=True)):
            effect = event.effects[sample]
            category = self._labels.category(effect.category or verdict.category, event.resolution.bundle)
            number = str(event.ticket.number or 0)
            draw = drawn("judge", event.ticket.request_id, number, str(sample))
            if draw >= self._order.rate(category, effect.decision):
                continue
            self._sampled.labels(category, effect.decision).inc()
            prompt = text_of(event.generation) if prompt is None else prompt
            if not prompt or not answer.strip():  # token ids, or a call of a tool
                self._failures.labels("no_text").inc()
            elif not self._is_allowed():
                self._failures.labels("over_budget").inc()
            else:
                self._put(Case(prompt, answer, category, effect.decision, verdict.detector, verdict.refused))

    async def outcome_of(self, prompt: str, answer: str) -> str:
        """What the judge says of an answer of the server's own, which is no sample: refusal, comply, broken or error.

        Waits for its turn in the budget, and is counted by whoever asks.
        """
        while not self._is_allowed():  # noqa: ASYNC110 - a budget, which nobody refills
            await asyncio.sleep(60 / self._order.per_minute)
        try:
            (judged,) = await self._judge.judging([(prompt, answer)])
        except Exception as error:  # noqa: BLE001 - as in `_judge_batch`
            _log.warning("the judge at %s failed with %s", self._order.url, type(error).__name__)
            return "error"
        return _OUTCOMES[str(judged.verdict)]

    def _may_judge(self, event: Ended) -> bool:
        bundle, profile = event.resolution.bundle.name, event.resolution.profile.name
        return not self._order.profiles.isdisjoint({EVERY, profile, f"{bundle}/{profile}"})

    def _is_allowed(self) -> bool:
        """Whether the budget of a minute has room; it fills evenly."""
        now, most = asyncio.get_running_loop().time(), float(self._order.per_minute)
        if self._filled_at is not None:
            self._allowed = min(most, self._allowed + (now - self._filled_at) * most / 60)
        self._filled_at = now
        if self._allowed < 1:
            return False
        self._allowed -= 1
        return True

    def _put(self, case: Case) -> None:
        try:
            self._queue.put_nowait(case)
        except asyncio.QueueFull:
            self._failures.labels("dropped").inc()

    async def _work(self) -> None:
        """Judge what waits, in batches, and rest for longer and longer while the judge is out of reach."""
        pause = 1.0
        while True:
            cases = [await self._queue.get()]
            while len(cases) < BATCH and not self._queue.empty():
                cases.append(self._queue.get_nowait())
            if await self._judge_batch(cases):
                pause = 1.0
            else:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    async def _judge_batch(self, cases: Sequence[Case]) -> bool:
        """False where the judge is out of reach."""
        try:
            judged = await self._judge.judging([(case.prompt, case.answer) for case in cases])
        except OperatorError:  # its words may quote what was judged
            _log.warning("the judge at %s is out of reach; %d answers are not judged", self._order.url, len(cases))
            return self._lost(cases)
        except Exception as error:  # noqa: BLE001 - a judge's fault must not end the judging: recorded and counted
            _log.warning("judging failed with %s; %d answers are not judged", type(error).__name__, len(cases))
            return self._lost(cases)
        for case, verdict in zip(cases, judged, strict=True):
            self._count(case, _OUTCOMES[str(verdict.verdict)])
        return True

    def _lost(self, cases: Sequence[Case]) -> bool:
        for case in cases:
            self._failures.labels("unreachable").inc()
            self._judged.labels(case.category, case.decision, "error", self._name).inc()
        return False

    def _count(self, case: Case, outcome: str) -> None:
        self._judged.labels(case.category, case.decision, outcome, self._name).inc()
        if outcome == "error":
            self._failures.labels("unparsable").inc()
        # Broken text is neither side: it says nothing of how judge and detector agree.
        if case.refused is None or outcome not in ("refusal", "comply") or case.detector not in _AGAINST:
            return
        window = self._agreed.setdefault(case.detector, deque(maxlen=WINDOW))
        window.append(case.refused == (outcome == "refusal"))
        self._ratio.labels(self._name, case.detector).set(sum(window) / len(window))
        self._rests_on.labels(self._name, case.detector).set(len(window))


_AGAINST = (DETECTOR, PROBE_DETECTOR)
_OUTCOMES = {"refusal": "refusal", "answer": "comply", "broken": "broken", "unparsable": "error"}
"""Label values by `steering.evaluate.judge.Verdict`."""


def open_judge(order: JudgeOrder) -> Verdicts:
    """The judge of an order, which keeps nothing of what it judges."""
    from steering.evaluate.llm_judge import LlmJudge, LlmSettings

    settings = LlmSettings(
        url=order.url,
        model=order.model,
        key=order.key,
        cache=Path(os.devnull),
        concurrency=BATCH,
        retries=2,
        timeout=60.0,
    )
    return LlmJudge(settings)


def text_of(generation: Generation) -> str:
    """What was asked, in words: a lone user message as it is, else each message under its role; empty for token ids."""
    if generation.prompting is not Prompting.CHAT:
        return generation.prompt if isinstance(generation.prompt, str) else ""
    messages: Sequence[Mapping[str, Any]] = generation.fields["messages"]
    said = [(str(message.get("role")), _content(message.get("content"))) for message in messages]
    if [role for role, _ in said] == ["user"]:
        return said[0][1]
    return "\n\n".join(f"{role}:\n{text}" for role, text in said if text)


def _content(content: object) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else ()
    texts = (part.get("text") for part in parts if isinstance(part, Mapping))
    return "\n".join(text for text in texts if isinstance(text, str))


class _Rate(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    rate: float = Field(ge=0, le=1)
    n: int = Field(ge=1)


class _Judge(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model: str
    rubric: str


class _Calibration(BaseModel):
    """Of what `trimtab judge calibrate` writes, the part that is needed."""

    model_config = ConfigDict(extra="ignore")

    accuracy: _Rate
    judge: _Judge


def read_calibration(path: Path, *, model: str) -> _Rate:
    """How often the judge agreed with human labels, partial refusals counted as refusals.

    Raises:
        OperatorError: the file cannot be read, or tells of another judge or of another rubric.
    """
    from steering.evaluate.rubric import VERSION

    how = "make it with `trimtab judge calibrate --judge llm --out FILE`"
    try:
        found = _Calibration.model_validate_json(path.read_bytes())
    except OSError as error:
        raise OperatorError(f"judge calibration {path}: {error.strerror}; {how}") from error
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise OperatorError(f"judge calibration {path}: {place}: {error.errors()[0]['msg']}; {how}") from error
    if (found.judge.model, found.judge.rubric) != (model, VERSION):
        raise OperatorError(
            f"judge calibration {path} is of model {found.judge.model!r} with rubric {found.judge.rubric}, and this "
            f"server's judge is {model!r} with rubric {VERSION}: {how}"
        )
    return found.accuracy
