"""The service: one chat completion from a checked request to a confirmed answer.

Nothing of a steered answer leaves before the engine has confirmed the edit. Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from server.catalog import Catalog
from server.effects import Effect, attach, effect_of
from server.engine import ChatCall, Chunk, Completion, Engine
from server.metrics import NONE, Metrics, flag
from server.policy import Resolution, resolve
from server.verdicts import UNKNOWN, MarkerStripper, Verdict, VerdictTable, read_verdict
from server.wire import ChatRequest
from steering.errors import (
    EditNotApplied,
    EngineDied,
    EngineError,
    EngineOverloaded,
    EngineTimeout,
    TrimtabError,
    UnknownModel,
)

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
        verdict: from the last token of an answer to what the response probe read of it; then it is unknown.
    """

    inflight: int = 1024
    outcome: float = 5.0
    first_token: float = 120.0
    between: float = 60.0
    total: float = 600.0
    verdict: float = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer: a `chat.completion` object with its `steering`, and what was done to its first sample."""

    body: dict[str, Any]
    effect: Effect


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenStream:
    """A streamed answer whose first piece is confirmed.

    Attributes:
        effect: what was done to the first sample.
        first: the first `chat.completion.chunk`.
        rest: those after it; to be closed by whoever reads it.
    """

    effect: Effect
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
        with self._in_flight(resolution):
            narrowed, completion = await _within(
                self._limits.total, self._whole(request, resolution, request_id), "the answer"
            )
            effects = await self._confirm(narrowed, range(request.samples))
            verdicts = [self._tables[narrowed.bundle.name].verdict(tokens) for tokens in completion.tokens]
            verdicts = await self._read(narrowed, verdicts, [len(tokens) for tokens in completion.tokens])
            body = self._reported(completion, narrowed, [effects[index] for index in range(request.samples)], verdicts)
            return Answer(body=body, effect=effects[0])

    async def open_stream(self, request: ChatRequest, resolution: Resolution, request_id: str) -> OpenStream:
        """Answer piece by piece; returns once the first piece is confirmed.

        Raises:
            TrimtabError: before the first piece, so that it can still be answered with a status.
        """
        progress = _Progress(self._tables[resolution.bundle.name], request.samples)
        chunks = self._chunks(request, resolution, request_id, progress)
        try:
            first = await anext(chunks)
        except StopAsyncIteration:
            first = {}
        if 0 not in progress.effects:
            raise EngineDied("the engine ended the answer before it began")
        return OpenStream(effect=progress.effects[0], first=first, rest=chunks)

    def abort_all(self) -> None:
        """End every request in flight with an error; for the end of a drain."""
        self._is_aborting = True
        for task in tuple(self._tasks):
            task.cancel()

    async def _whole(
        self, request: ChatRequest, resolution: Resolution, request_id: str
    ) -> tuple[Resolution, Completion]:
        resolution = await self._categorised(request, resolution, request_id)
        return resolution, await self._engine.complete(_call(request, resolution, request_id))

    async def _categorised(self, request: ChatRequest, resolution: Resolution, request_id: str) -> Resolution:
        """P1.4's first pass, where it is asked for: the most likely refusal token names the category of the gate."""
        candidates = resolution.candidates
        if not candidates:
            return resolution
        self._metrics.category_passes.inc()
        fields = request.prompt_fields() | {"max_tokens": 1, "temperature": 0.0, "allowed_token_ids": [*candidates]}
        completion = await self._engine.complete(ChatCall(request_id=f"{request_id}-category", fields=fields))
        (tokens,) = completion.tokens
        if len(tokens) != 1 or tokens[0] not in candidates:
            raise EngineError(f"the engine chose tokens {list(tokens)}, where one of {sorted(candidates)} was allowed")
        return resolution.narrowed(candidates[tokens[0]])

    async def _chunks(
        self, request: ChatRequest, resolution: Resolution, request_id: str, progress: _Progress
    ) -> AsyncGenerator[dict[str, Any], None]:
        began = asyncio.get_running_loop().time()
        wants_usage = bool(request.stream_options and request.stream_options.include_usage)
        held: list[dict[str, Any]] = []  # chunks before the first confirmed token: roles, which hold no text
        with self._in_flight(resolution):
            wait = min(self._limits.first_token, self._limits.total)
            resolution = await _within(wait, self._categorised(request, resolution, request_id), "the category")
            source = self._engine.stream(_call(request, resolution, request_id))
            async with aclosing(source), aclosing(self._in_time(source, began)) as timely:
                async for chunk in timely:
                    body = chunk.body
                    if not body["choices"]:
                        if progress.begun:
                            self._count_tokens(body.get("usage"), progress.effects[0])
                            if wants_usage:
                                yield body
                        continue
                    if progress.begins(chunk):
                        await self._confirm_begun(resolution, progress, body["choices"][0]["index"], began)
                    if wants_usage:
                        body["usage"] = None
                    kept = progress.cleaned(chunk)
                    if progress.is_finished:
                        effects = [progress.effects[index] for index in range(request.samples)]
                        verdicts = await self._read(resolution, progress.verdicts, progress.lengths)
                        self._count(resolution, effects, verdicts)
                        attach(body, resolution, effects, verdicts)
                    if kept:
                        held.append(body)
                    if progress.begun:
                        for ready in held:
                            yield ready
                        held.clear()

    async def _in_time(self, source: AsyncGenerator[Chunk, None], began: float) -> AsyncGenerator[Chunk, None]:
        """`source`, given up when it is silent for too long or goes on for too long."""
        clock = asyncio.get_running_loop().time
        end = began + self._limits.total
        deadline, has_begun = began + self._limits.first_token, False
        while True:
            try:
                async with asyncio.timeout_at(min(deadline, end)):
                    chunk = await anext(source)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise EngineTimeout("the engine was silent for too long; the request was given up") from None
            yield chunk
            has_begun = has_begun or bool(chunk.tokens)
            if has_begun:
                deadline = clock() + self._limits.between

    async def _confirm_begun(self, resolution: Resolution, progress: _Progress, index: int, began: float) -> None:
        """Confirm the sample that begins, and before anything else the first, which the header tells of."""
        is_first = not progress.effects
        progress.effects |= await self._confirm(resolution, sorted({0, index} if is_first else {index}))
        if is_first:
            self._metrics.first_token.labels(flag(progress.effects[0].applied)).observe(
                asyncio.get_running_loop().time() - began
            )

    async def _confirm(self, resolution: Resolution, samples: Sequence[int]) -> dict[int, Effect]:
        """What was done to these samples.

        Raises:
            EditNotApplied: the engine does not say so in time, or says something that the plan does not allow.
        """
        plan = resolution.plan
        if plan is None:
            return {sample: effect_of(resolution, None) for sample in samples}
        try:
            outcomes = await self._engine.outcomes(plan.id, samples, self._limits.outcome)
            return {sample: effect_of(resolution, outcomes[sample]) for sample in samples}
        except EditNotApplied:
            self._metrics.unapplied.inc()
            raise

    async def _read(self, resolution: Resolution, verdicts: Sequence[Verdict], lengths: Sequence[int]) -> list[Verdict]:
        """The verdicts, with those of the response probe where no token told; an answer never waits for one for long.

        Args:
            lengths: tokens of each answer; the last of them is not fed back, and so cannot be read.
        """
        reader, order = resolution.bundle.reader, resolution.order
        if reader is None or order is None:
            return list(verdicts)
        wanted = {sample: min(reader.tokens, length - 1) for sample, length in enumerate(lengths) if length > 1}
        read = await self._engine.responses(order.id, wanted, self._limits.verdict)
        return [
            verdict if verdict.refused is not None else read_verdict(reader, read.get(sample))
            for sample, verdict in enumerate(verdicts)
        ]

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
                resolution.category or NONE, resolution.mode.value, "error", UNKNOWN.detector
            ).inc()
            raise
        finally:
            self._tasks.discard(task)
            self._metrics.inflight.dec()
            if resolution.order is not None:
                self._engine.forget(resolution.order.id)

    def _reported(
        self, completion: Completion, resolution: Resolution, effects: Sequence[Effect], verdicts: Sequence[Verdict]
    ) -> dict[str, Any]:
        table, body = self._tables[resolution.bundle.name], completion.body
        for tokens, choice in zip(completion.tokens, body["choices"], strict=True):
            if content := choice["message"].get("content"):
                stripper = MarkerStripper(table)
                stripper.see(tokens)
                choice["message"]["content"] = stripper.feed(content) + stripper.flush()
        self._count_tokens(body.get("usage"), effects[0])
        self._count(resolution, effects, verdicts)
        attach(body, resolution, effects, verdicts)
        return body

    def _count_tokens(self, usage: dict[str, Any] | None, effect: Effect) -> None:
        steered = flag(effect.applied)
        if usage:
            self._metrics.tokens.labels("prompt", steered).inc(usage["prompt_tokens"])
            self._metrics.tokens.labels("completion", steered).inc(usage["completion_tokens"])

    def _count(self, resolution: Resolution, effects: Sequence[Effect], verdicts: Sequence[Verdict]) -> None:
        first = effects[0]
        self._metrics.decisions.labels(first.category or NONE, first.decision).inc()
        if first.scores is not None and resolution.category_source is not None:
            self._metrics.probe_score.labels(resolution.profile.name).observe(first.scores.refusal)
            self._metrics.categories.labels(first.category or NONE, resolution.category_source.value).inc()
        for effect, verdict in zip(effects, verdicts, strict=True):
            category = verdict.category or effect.category or NONE
            self._metrics.outcomes.labels(category, effect.decision, verdict.outcome, verdict.detector).inc()


class _Progress:
    """What is known of a streamed answer so far, by choice; `effects` holds those of choices that have begun, `lengths`
    the tokens of each.
    """

    def __init__(self, table: VerdictTable, samples: int) -> None:
        self._table = table
        self._strippers: dict[int, MarkerStripper] = {}
        self._verdicts = [UNKNOWN] * samples
        self._finished: set[int] = set()
        self.effects: dict[int, Effect] = {}
        self.lengths = [0] * samples

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
        self.lengths[index] += len(chunk.tokens)
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
    return ChatCall(
        request_id=request_id, fields=request.engine_fields(), samples=request.samples, plan=resolution.order
    )


async def _within(limit: float, work: Awaitable[T], what: str) -> T:
    try:
        async with asyncio.timeout(limit):
            return await work
    except TimeoutError:
        raise EngineTimeout(f"the engine did not give {what} within {limit:g} s; the request was given up") from None
