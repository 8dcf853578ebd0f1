"""The service: one chat completion from a checked request to a confirmed answer.

Nothing of a steered answer leaves before the engine has confirmed the edit. Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from server.catalog import Catalog
from server.engine import ChatCall, Chunk, Completion, Engine
from server.metrics import NONE, Metrics, flag
from server.policy import Report, Resolution, resolve
from server.verdicts import UNKNOWN, MarkerStripper, Verdict, VerdictTable
from server.wire import ChatRequest
from steering.errors import EditNotApplied, EngineDied, EngineOverloaded, EngineTimeout, TrimtabError, UnknownModel
from steering.plan import Outcome, Plan

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much at once, and how long at most; times in seconds.

    Attributes:
        inflight: requests being answered at once; more are refused with 503.
        outcome: from the first token of a sample to the engine's confirmation of its edit.
        first_token: from admission to the first token of a stream.
        between: between two chunks of a stream.
        total: from admission to the end.
    """

    inflight: int = 1024
    outcome: float = 5.0
    first_token: float = 120.0
    between: float = 60.0
    total: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer: a `chat.completion` object with its `steering`, and the decision for the header."""

    body: dict[str, Any]
    decision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenStream:
    """A streamed answer whose first piece is confirmed.

    Attributes:
        decision: for the header.
        first: the first `chat.completion.chunk`.
        rest: those after it; to be closed by whoever reads it.
    """

    decision: str
    first: dict[str, Any]
    rest: AsyncGenerator[dict[str, Any], None]


class ChatService:
    """Answers chat completions over one engine.

    Args:
        engine: generates.
        catalog: what may be asked for.
        metrics: what is counted.
        limits: how much, how long.

    Attributes:
        is_draining: no new request is taken.
    """

    def __init__(self, *, engine: Engine, catalog: Catalog, metrics: Metrics, limits: Limits) -> None:
        self.is_draining = False
        self._engine = engine
        self._catalog = catalog
        self._metrics = metrics
        self._limits = limits
        self._tables = {bundle.name: VerdictTable(bundle) for bundle in catalog.bundles}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_aborting = False

    @property
    def inflight(self) -> int:
        """Requests being answered now."""
        return len(self._tasks)

    def resolve(self, request: ChatRequest) -> Resolution:
        """What is to be done for this request.

        Raises:
            CallerError: the request asks for what this server does not have.
        """
        if request.model != self._engine.model.name:
            raise UnknownModel(
                f"model {request.model!r} is not served here; models: [{self._engine.model.name!r}]", parameter="model"
            )
        return resolve(request.spec, self._catalog, plan_id=secrets.token_hex(16))

    async def complete(self, request: ChatRequest, resolution: Resolution, request_id: str) -> Answer:
        """Answer in one piece.

        Raises:
            TrimtabError: see the table in `server/errors.py`; never an unconfirmed answer.
        """
        call = _call(request, resolution, request_id)
        with self._in_flight(resolution):
            completion = await _within(self._limits.total, self._engine.complete(call), "the answer")
            await self._confirm(resolution.plan, call.samples)
            return Answer(body=self._reported(completion, resolution), decision=resolution.decision.value)

    async def open_stream(self, request: ChatRequest, resolution: Resolution, request_id: str) -> OpenStream:
        """Answer piece by piece; returns once the first piece is confirmed.

        Raises:
            TrimtabError: before the first piece, so that it can still be answered with a status.
        """
        wants_usage = bool(request.stream_options and request.stream_options.include_usage)
        chunks = self._chunks(_call(request, resolution, request_id), resolution, wants_usage=wants_usage)
        try:
            first = await anext(chunks)
        except StopAsyncIteration:
            raise EngineDied("the engine ended the answer before it began") from None
        return OpenStream(decision=resolution.decision.value, first=first, rest=chunks)

    def abort_all(self) -> None:
        """End every request in flight with an error; for the end of a drain."""
        self._is_aborting = True
        for task in tuple(self._tasks):
            task.cancel()

    async def _chunks(
        self, call: ChatCall, resolution: Resolution, *, wants_usage: bool
    ) -> AsyncGenerator[dict[str, Any], None]:
        began = time.perf_counter()
        progress = _Progress(self._tables[resolution.bundle.name], call.samples)
        held: list[dict[str, Any]] = []  # chunks before the first confirmed token: roles, which hold no text
        with self._in_flight(resolution):
            async with aclosing(self._engine.stream(call)) as source, aclosing(self._in_time(source)) as timely:
                async for chunk in timely:
                    body = chunk.body
                    if not body["choices"]:
                        self._count_tokens(body.get("usage"), resolution)
                        if wants_usage:
                            yield body
                        continue
                    if progress.begins(chunk):
                        await self._confirm(resolution.plan, progress.begun)
                        if progress.begun == 1:
                            self._metrics.first_token.labels(flag(resolution.plan is not None)).observe(
                                time.perf_counter() - began
                            )
                    if wants_usage:
                        body["usage"] = None
                    kept = progress.cleaned(chunk)
                    if progress.is_finished:
                        self._count_outcomes(progress.verdicts, resolution)
                        _attach(body, resolution, progress.verdicts)
                    if kept:
                        held.append(body)
                    if progress.begun:
                        for ready in held:
                            yield ready
                        held.clear()

    async def _in_time(self, source: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
        """`source`, given up when it is silent for too long or goes on for too long."""
        clock = asyncio.get_running_loop().time
        end = clock() + self._limits.total
        wait = self._limits.first_token
        while True:
            try:
                async with asyncio.timeout_at(min(clock() + wait, end)):
                    chunk = await anext(source)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise EngineTimeout("the engine was silent for too long; the request was given up") from None
            yield chunk
            if chunk.tokens:
                wait = self._limits.between

    async def _confirm(self, plan: Plan | None, count: int) -> None:
        if plan is None:
            return
        try:
            for outcome in await self._engine.outcomes(plan.id, count, self._limits.outcome):
                _check_outcome(plan, outcome)
        except EditNotApplied:
            self._metrics.unapplied.inc()
            raise

    @contextmanager
    def _in_flight(self, resolution: Resolution) -> Iterator[None]:
        if self.is_draining:
            raise EngineOverloaded("this server is shutting down; send the request again")
        if not self._engine.is_alive:
            raise EngineDied("the engine is gone; this server must be started again")
        if len(self._tasks) >= self._limits.inflight:
            raise EngineOverloaded(f"this server answers {self._limits.inflight} requests at once; try again")
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._metrics.inflight.inc()
        try:
            yield
        except asyncio.CancelledError:
            if not self._is_aborting:
                raise
            task.uncancel()
            raise EngineOverloaded("this server shut down before the answer was complete") from None
        except TrimtabError:
            self._metrics.outcomes.labels(
                resolution.category or NONE, resolution.decision.value, "error", UNKNOWN.detector
            ).inc()
            raise
        finally:
            self._tasks.discard(task)
            self._metrics.inflight.dec()
            if resolution.plan is not None:
                self._engine.forget(resolution.plan.id)

    def _reported(self, completion: Completion, resolution: Resolution) -> dict[str, Any]:
        table, body = self._tables[resolution.bundle.name], completion.body
        verdicts = [table.verdict(tokens) for tokens in completion.tokens]
        for tokens, choice in zip(completion.tokens, body["choices"], strict=True):
            if content := choice["message"].get("content"):
                stripper = MarkerStripper(table)
                stripper.see(tokens)
                choice["message"]["content"] = stripper.feed(content) + stripper.flush()
        self._count_tokens(body.get("usage"), resolution)
        self._count_outcomes(verdicts, resolution)
        _attach(body, resolution, verdicts)
        return body

    def _count_tokens(self, usage: dict[str, Any] | None, resolution: Resolution) -> None:
        steered = flag(resolution.plan is not None)
        if usage:
            self._metrics.tokens.labels("prompt", steered).inc(usage["prompt_tokens"])
            self._metrics.tokens.labels("completion", steered).inc(usage["completion_tokens"])

    def _count_outcomes(self, verdicts: list[Verdict], resolution: Resolution) -> None:
        decision = resolution.decision.value
        self._metrics.decisions.labels(resolution.category or NONE, decision).inc()
        for verdict in verdicts:
            category = verdict.category or resolution.category or NONE
            self._metrics.outcomes.labels(category, decision, verdict.outcome, verdict.detector).inc()


class _Progress:
    """What is known of a streamed answer so far, by choice."""

    def __init__(self, table: VerdictTable, samples: int) -> None:
        self._table = table
        self._strippers: dict[int, MarkerStripper] = {}
        self._verdicts = [UNKNOWN] * samples
        self._finished: set[int] = set()

    @property
    def begun(self) -> int:
        """Choices that have begun."""
        return len(self._strippers)

    @property
    def is_finished(self) -> bool:
        return len(self._finished) == len(self._verdicts)

    @property
    def verdicts(self) -> list[Verdict]:
        return self._verdicts

    def begins(self, chunk: Chunk) -> bool:
        """Take note of the chunk; True when it is its choice's first with tokens, or its last without any."""
        choice = chunk.body["choices"][0]
        index = choice["index"]
        if index in self._strippers or not (chunk.tokens or choice.get("finish_reason")):
            return False
        self._verdicts[index] = self._table.verdict(chunk.tokens)
        self._strippers[index] = MarkerStripper(self._table)
        return True

    def cleaned(self, chunk: Chunk) -> bool:
        """Take markers out of the chunk's text; False when nothing is left to tell the client."""
        choice = chunk.body["choices"][0]
        index, delta = choice["index"], choice["delta"]
        is_last = bool(choice.get("finish_reason"))
        if is_last:
            self._finished.add(index)
        stripper = self._strippers.get(index)
        if stripper is not None:
            stripper.see(chunk.tokens)
            text = stripper.feed(delta.get("content") or "") + (stripper.flush() if is_last else "")
            if text:
                delta["content"] = text
            elif not is_last:
                delta.pop("content", None)
            elif delta.get("content"):
                delta["content"] = ""
        return is_last or bool(delta) or choice.get("logprobs") is not None


def _call(request: ChatRequest, resolution: Resolution, request_id: str) -> ChatCall:
    return ChatCall(request_id=request_id, fields=request.engine_fields(), samples=request.n or 1, plan=resolution.plan)


def _attach(body: dict[str, Any], resolution: Resolution, verdicts: list[Verdict]) -> None:
    """Put the `steering` object of design §6 into an answer or a last chunk, unless the client wants none."""
    if resolution.report is Report.NONE:
        return
    plan = resolution.plan
    steering: dict[str, Any] = {
        "applied": plan is not None,
        "profile": resolution.profile.name,
        "bundle": resolution.bundle.label,
        "decision": resolution.decision.value,
        "category": resolution.category,
        "edit": plan.edit if plan else None,
        "strength": plan.strength if plan else None,
        "scope": plan.scope.value if plan else None,
        "verdict": verdicts[0].to_json(),
    }
    if len(verdicts) > 1:
        steering["verdicts"] = [verdict.to_json() for verdict in verdicts]
    if resolution.bundle.is_transferred:
        steering["transferred"] = True
    body["steering"] = steering


def _check_outcome(plan: Plan, outcome: Outcome) -> None:
    """The engine must have done what the plan says, not merely something."""
    if (
        not outcome.applied
        or outcome.edit != plan.edit
        or outcome.scope != plan.scope
        or not math.isclose(outcome.strength, plan.strength, rel_tol=1e-5)
    ):
        raise EditNotApplied(
            f"the engine reports edit {outcome.edit!r} at strength {outcome.strength} (applied: {outcome.applied}) "
            f"where {plan.edit!r} at {plan.strength} was asked; the answer is withheld"
        )


async def _within(limit: float, work: Awaitable[T], what: str) -> T:
    try:
        async with asyncio.timeout(limit):
            return await work
    except TimeoutError:
        raise EngineTimeout(f"the engine did not give {what} within {limit:g} s; the request was given up") from None
