"""The canary: fixed prompts, asked again and again, whose refusals tell a change of the model or of a profile from one
of what people ask.

They go through the service like any request, greedily, are no traffic, and give way to it, but not for ever. Knows
nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter as Tally
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from prometheus_client import CollectorRegistry, Counter, Gauge
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.access.caller import LOCAL
from server.catalog import BundleView, LiveCatalog
from server.generation import Generation, Ticket
from server.observe.labels import NONE, Labels
from server.policy import Report, SteeringSpec
from server.service import Service
from steering.errors import EngineOverloaded, OperatorError, TrimtabError
from steering.plan import Mode

SHIPPED = Path(__file__).with_name("canary.jsonl")
MOST_PROMPTS, MOST_SETS, MOST_PROFILES = 1000, 8, 50
PATIENCE = 60.0
"""Seconds that a prompt waits for a server that is full; then the run is given up."""

LOOK = 0.5
"""Seconds between two looks at a busy server."""

JUDGED_TOKENS = 128
"""Of an answer that only a judge can tell of, which reads what is there."""

Judge = Callable[[str, str], Awaitable[str]]
"""Says of a prompt and its answer what it is: refusal, comply, broken or error."""

_log = logging.getLogger("trimtab")


class CanaryPrompt(BaseModel):
    """One line of a file of prompts; refusals are counted by set."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    set: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,40}$")]
    prompt: Annotated[str, Field(min_length=1, max_length=20_000)]


def read_prompts(path: Path) -> tuple[CanaryPrompt, ...]:
    """The prompts of a file.

    Raises:
        OperatorError: it cannot be read, holds none, too many, too many sets, or a line of another form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OperatorError(f"canary prompts {path}: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(CanaryPrompt.model_validate_json(line))
            except ValidationError as error:
                why = error.errors(include_input=False)[0]
                raise OperatorError(
                    f'canary prompts {path}:{number}: {why["msg"]}; a line is {{"set": "a_name", "prompt": "..."}}'
                ) from None
    sets = {prompt.set for prompt in found}
    if not 1 <= len(found) <= MOST_PROMPTS or len(sets) > MOST_SETS:
        raise OperatorError(
            f"canary prompts {path}: {len(found)} prompts in {len(sets)} sets; 1 to {MOST_PROMPTS} in at most "
            f"{MOST_SETS} are possible"
        )
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryOrder:
    """What is asked, of whom, how often.

    Attributes:
        prompts: asked of every profile.
        interval: seconds from the end of a run to the begin of the next; a run that is not through after as many waits
            for a busy server no longer.
        profiles: names of `Catalog.profile_names`; empty for those with a gate. The model without steering is always
            asked, as profile `none`.
        most_inflight: other requests beside which a run goes on; with more it waits.
        concurrency: prompts asked at once.
    """

    prompts: Sequence[CanaryPrompt]
    interval: float
    profiles: Sequence[str] = ()
    most_inflight: int = 8
    concurrency: int = 2

    def check(self, known: Sequence[str]) -> None:
        """Refuse profiles that are not there.

        Raises:
            OperatorError: names them.
        """
        unknown = sorted(set(self.profiles) - set(known))
        if unknown:
            raise OperatorError(f"TRIMTAB_CANARY_PROFILES names {unknown}; profiles: {list(known)}")


class _GivenUp(Exception):
    """A run that did not come to its end; says why, as a label value."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Canary:
    """Asks the prompts of an order, over and over.

    Args:
        order: which, of whom, how often.
        service: answers.
        catalog: in force.
        model: name of the served model.
        registry: where it is counted.
        labels: of metrics.
        judge: of answers of blind bundles; None for none.
    """

    def __init__(
        self,
        order: CanaryOrder,
        service: Service,
        catalog: LiveCatalog,
        model: str,
        registry: CollectorRegistry,
        labels: Labels,
        judge: Judge | None = None,
    ) -> None:
        self._order = order
        self._service = service
        self._catalog = catalog
        self._model = model
        self._labels = labels
        self._sets = sorted({prompt.set for prompt in order.prompts})
        self._told: set[str] = set()
        self._awaited: set[str] = set()
        self._blind: set[str] = set()
        self._judge = judge
        self._own = 0
        self._overdue_at = 0.0
        self._alone = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._outcomes = Counter(
            "steering_canary_outcomes",
            "Answers to canary prompts by what they turned out to be: refusal, comply, unknown, error or, where a "
            "judge tells, broken.",
            ("profile", "set", "outcome"),
            registry=registry,
        )
        self._ratio = Gauge(
            "steering_canary_refusal_ratio",
            "Refusals among the answers of the last whole run whose verdict is known; profile none is the model "
            "without steering.",
            ("profile", "set"),
            registry=registry,
        )
        self._known = Gauge(
            "steering_canary_prompts", "Answers that the ratio rests on.", ("profile", "set"), registry=registry
        )
        self._last_run = Gauge(
            "steering_canary_last_run_timestamp_seconds",
            "When a profile's last whole run ended, since 1970.",
            ("profile",),
            registry=registry,
        )
        self._since = Gauge(
            "steering_canary_since_timestamp_seconds",
            "Since when a profile is asked, since 1970; how long its first whole run is waited for.",
            ("profile",),
            registry=registry,
        )
        self._skipped = Counter(
            "steering_canary_skipped",
            "Runs that were given up: busy (the server had no room for a prompt), broken or not_ready (it shut down).",
            ("reason",),
            registry=registry,
        )
        for reason in ("busy", "broken", "not_ready"):
            self._skipped.labels(reason)  # from 0 on, since Prometheus does not see the first step of a new series

    def start(self) -> None:
        """Begin with a run."""
        self._task = asyncio.create_task(self._work(), name="canary")

    async def stop(self) -> None:
        """End, in the middle of a run if need be."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def run(self) -> None:
        """Ask every prompt of every profile once; the ratios are those of the run before until a profile is through."""
        self._overdue_at = asyncio.get_running_loop().time() + self._order.interval
        asked = self._asked()
        self._await(asked)
        for label, spec in asked.items():
            try:
                tally = await self._ask_all(label, spec)
            except _GivenUp as given_up:
                self._skipped.labels(given_up.reason).inc()
                return
            self._tell(label, tally)

    async def _work(self) -> None:
        while not self._service.is_leaving:
            try:
                await self.run()
            except Exception as error:  # noqa: BLE001 - the next run may do better: recorded
                _log.warning("a run of the canary broke with %s", type(error).__name__)
                self._skipped.labels("broken").inc()
            await asyncio.sleep(self._order.interval)

    def _asked(self) -> dict[str, SteeringSpec]:
        """Profiles by their label, each with what is asked of it; first the model as it is."""
        catalog = self._catalog.now
        names = [name for name in self._order.profiles or catalog.gated_profile_names if name in catalog.profile_names]
        asked = {NONE: SteeringSpec(mode=Mode.OFF, report=Report.NONE)}
        for name in names[:MOST_PROFILES]:
            _, profile = catalog.profile(name)
            asked.setdefault(self._labels.profile(profile.name), SteeringSpec(profile=name, report=Report.NONE))
        return asked

    async def _ask_all(self, label: str, spec: SteeringSpec) -> Tally[tuple[str, str]]:
        """Outcomes of a profile, by set.

        Raises:
            _GivenUp: before its end.
        """
        tally: Tally[tuple[str, str]] = Tally()
        waiting = iter(self._order.prompts)

        async def ask_on() -> None:
            for prompt in waiting:
                outcome = await self._outcome(prompt.prompt, spec)
                self._outcomes.labels(label, prompt.set, outcome).inc()
                tally[prompt.set, outcome] += 1

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._order.concurrency):
                    group.create_task(ask_on())
        except* _GivenUp as found:
            raise next(error for error in found.exceptions if isinstance(error, _GivenUp)) from None
        return tally

    async def _outcome(self, text: str, spec: SteeringSpec) -> str:
        """What one answer turned out to be, asked for when the server is at rest, or once the run is overdue, and then
        beside no other prompt.

        Raises:
            _GivenUp: the server is shutting down, or full for too long.
        """
        if await self._comes_to_rest():
            return await self._where_there_is_room(text, spec)
        async with self._alone:
            return await self._where_there_is_room(text, spec)

    async def _where_there_is_room(self, text: str, spec: SteeringSpec) -> str:
        end = asyncio.get_running_loop().time() + PATIENCE
        while True:
            self._check_staying()
            try:
                return await self._ask(text, spec)
            except EngineOverloaded:
                self._check_staying()
                if asyncio.get_running_loop().time() > end:
                    raise _GivenUp("busy") from None
            await asyncio.sleep(LOOK)

    async def _ask(self, text: str, spec: SteeringSpec) -> str:
        """What one answer turned out to be.

        Raises:
            EngineOverloaded: there is no room for it.
        """
        # A trace that is marked as not sampled, so that the engine makes no spans of what is no traffic.
        trace = {"traceparent": f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"}
        name = f"canary-{secrets.token_hex(12)}"
        ticket = Ticket(request_id=name, caller=LOCAL, is_internal=True, trace=trace)
        self._own += 1
        try:
            bundle, _ = self._catalog.now.profile(spec.profile)  # unless it was unloaded meanwhile
            generation = self._generation(text, spec, tokens_to_tell(bundle, is_judged=self._judge is not None))
            resolution = self._service.resolve(generation, LOCAL)
            answer = await self._service.complete(generation, resolution, ticket)
        except EngineOverloaded:
            raise
        except TrimtabError as error:
            _log.warning("a canary prompt failed: %s", error.code)
            return "error"
        finally:
            self._own -= 1
        if bundle.is_blind and self._judge is not None:
            return await self._judge(text, answer.body["choices"][0]["message"]["content"] or "")
        return answer.verdicts[0].outcome

    def _generation(self, text: str, spec: SteeringSpec, tokens: int) -> Generation:
        prompt = {"model": self._model, "messages": [{"role": "user", "content": text}]}
        fields = {**prompt, "max_tokens": tokens, "temperature": 0.0}
        return Generation(model=self._model, spec=spec, fields=fields, prompt_fields=prompt)

    async def _comes_to_rest(self) -> bool:
        """Wait until the server has little else to do; False where it has not when the run is overdue.

        Raises:
            _GivenUp: it is shutting down.
        """
        while self._service.inflight - self._own > self._order.most_inflight:
            self._check_staying()
            if asyncio.get_running_loop().time() > self._overdue_at:
                return False
            await asyncio.sleep(LOOK)
        return True

    def _check_staying(self) -> None:
        if self._service.is_leaving:
            raise _GivenUp("not_ready")

    def _await(self, asked: dict[str, SteeringSpec]) -> None:
        """Take note of who is asked from now on, and of who is no longer; say of whom nothing will be known."""
        for gone in self._told - asked.keys():
            self._forget(gone)
        for gone in self._awaited - asked.keys():
            self._since.remove(gone)
        for new in asked.keys() - self._awaited:
            self._since.labels(new).set(time.time())
        self._awaited = set(asked)
        bundles = {label: self._catalog.now.profile(spec.profile)[0] for label, spec in asked.items()}
        blind = {label for label, bundle in bundles.items() if bundle.is_blind and self._judge is None}
        for label in sorted(blind - self._blind):
            _log.warning(
                "the canary asks profile %s and cannot tell refusals: its bundle has neither refusal tokens nor a "
                "response probe, and no judge is configured (TRIMTAB_JUDGE_URL)",
                label,
            )
        self._blind = blind

    def _tell(self, label: str, tally: Tally[tuple[str, str]]) -> None:
        """What the ratios of a profile are after a whole run; there is none where no verdict is known."""
        self._forget(label)
        for name in self._sets:
            known = tally[name, "refusal"] + tally[name, "comply"]
            self._known.labels(label, name).set(known)
            if known:
                self._ratio.labels(label, name).set(tally[name, "refusal"] / known)
        self._last_run.labels(label).set(time.time())
        self._told.add(label)

    def _forget(self, label: str) -> None:
        if label in self._told:
            self._told.remove(label)
            self._last_run.remove(label)
            for name in self._sets:
                self._known.remove(label, name)
                self._ratio.remove(label, name)


def tokens_to_tell(bundle: BundleView, *, is_judged: bool = False) -> int:
    """Tokens of an answer that its verdict needs: the first, where the model begins with one that tells, else those
    that the response probe reads and one more, since the last generated one is never read; or those of a judge.
    """
    if bundle.is_blind and is_judged:
        return JUDGED_TOKENS
    return 1 if bundle.reader is None else bundle.reader.tokens + 1
