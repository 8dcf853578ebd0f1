"""The service: one generation from a checked request to a confirmed answer.

Nothing of a steered answer leaves before the engine has confirmed the edit. Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from msgspec import structs

from server.access.audit import AuditLog
from server.access.caller import Caller, answer_tokens
from server.access.permissions import check_permitted, check_permitted_to_probe
from server.access.prompt_tokens import check_prompt
from server.catalog import BundleView, Catalog, LiveCatalog
from server.confirmed import Answer, OpenStream
from server.effects import Effect, attach, effect_of
from server.engine import Completion, Engine, check_prompting
from server.generation import Generation, Ticket
from server.limits import Limits, Places, in_time, within
from server.observe.events import Observer, Usage
from server.observe.metrics import Metrics, flag
from server.observe.stages import Stage
from server.policy import Resolution, resolve
from server.probing import Reading, check_probing, observed
from server.progress import SPOKEN, Progress
from server.rollout import Rollout
from server.run import Run
from server.verdicts import MarkerStripper, Verdict, VerdictTable, read_verdict
from steering.errors import (
    EditNotApplied,
    EngineDied,
    EngineError,
    EngineOverloaded,
    TrimtabError,
    UnknownModel,
)


class Service:
    """Answers generations over one engine.

    Args:
        engine: generates.
        catalog: what may be asked for.
        metrics: what is counted.
        limits: how much, how long.
        observers: told of every request that has ended.
        rollout: which requests are steered; all of them unless told.
        audit: where it is put on record that refusals may be lowered, before the engine is asked; None for nowhere.

    Attributes:
        is_leaving: this server ends soon, which balancers are to see; requests are still taken.
        is_draining: no new request is taken.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        catalog: LiveCatalog,
        metrics: Metrics,
        limits: Limits,
        observers: Sequence[Observer] = (),
        rollout: Rollout | None = None,
        audit: AuditLog | None = None,
    ) -> None:
        self.is_leaving = False
        self.is_draining = False
        self._engine = engine
        self._catalog = catalog
        self._metrics = metrics
        self._limits = limits
        self._observers = list(observers)
        self._rollout = rollout or Rollout()
        self._audit = audit
        self._tables: dict[str, VerdictTable] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._places = Places(limits.inflight, metrics.inflight_answers.set)
        self._is_aborting = False

    @property
    def inflight(self) -> int:
        """Requests being answered now."""
        return len(self._tasks)

    def observe(self, observer: Observer) -> None:
        """Tell one more observer of every request that ends from now on."""
        self._observers.append(observer)

    def resolve(self, generation: Generation, caller: Caller) -> Resolution:
        """What is to be done for this request.

        Raises:
            CallerError: the request asks for what this server does not have, or what this caller may not ask for.
        """
        catalog = self._catalog.now
        return check_permitted(caller, generation, self._resolved(generation, catalog), catalog)

    def _resolved(self, generation: Generation, catalog: Catalog) -> Resolution:
        """What a request asks for, whoever sent it."""
        if generation.model != self._engine.model.name:
            raise UnknownModel(
                f"model {generation.model!r} is not served here; models: [{self._engine.model.name!r}]",
                parameter="model",
            )
        check_prompting(self._engine.model, generation.prompting)
        return resolve(generation.spec, catalog, plan_id=secrets.token_hex(16))

    def check_room(self, answers: int) -> None:
        """Refuse so many answers to one request as there can never be at once; see `Places.check`."""
        self._places.check(answers)

    async def complete(self, generation: Generation, resolution: Resolution, ticket: Ticket) -> Answer:
        """Answer in one piece.

        Raises:
            TrimtabError: see the table in `server/errors.py`; never an unconfirmed answer.
        """
        with self._in_flight(generation, resolution, ticket) as run:
            await self._record(run)
            completion = await within(self._limits.total, self._whole(run), "the answer")
            await self._look_at(run, completion.prompt)
            await self._confirm(run, range(run.samples))
            verdicts = [self._table(run).verdict(tokens) for tokens in completion.tokens]
            run.verdicts = self._read(run, verdicts)
            body = self._reported(completion, run)
            return Answer(body=body, effect=run.effects[0], verdicts=run.verdicts)

    async def open_stream(self, generation: Generation, resolution: Resolution, ticket: Ticket) -> OpenStream:
        """Answer piece by piece; returns once the first piece is confirmed.

        Raises:
            TrimtabError: before the first piece, so that it can still be answered with a status.
        """
        opened: list[Run] = []
        chunks = self._chunks(generation, resolution, ticket, opened)
        try:
            first = await anext(chunks)
        except StopAsyncIteration:
            first = {}
        if not opened or 0 not in opened[0].effects:
            raise EngineDied("the engine ended the answer before it began")
        return OpenStream(effect=opened[0].effects[0], first=first, rest=chunks)

    async def probe(self, generation: Generation, caller: Caller, ticket: Ticket) -> Reading:
        """Read a prompt by the gate of the profile that its spec names, and answer nothing.

        Raises:
            TrimtabError: see the table in `server/errors.py`.
        """
        catalog = self._catalog.now
        check_probing(caller, None if generation.spec is None else generation.spec.profile, catalog)
        resolution = self._resolved(generation, catalog)
        check_permitted_to_probe(caller, generation, resolution, catalog)
        resolution = observed(resolution)
        with self._in_flight(generation, resolution, ticket) as run:
            completion = await within(self._limits.first_token, self._engine.complete(run.call()), "the scores")
            await self._confirm(run, (0,))
            self._count_tokens(completion.body["usage"], run)
            run.is_complete = True
            return Reading(resolution=run.resolution, effect=run.effects[0], usage=completion.body["usage"])

    def abort_all(self) -> None:
        """End every request in flight with an error; for the end of a drain."""
        self._is_aborting = True
        for task in tuple(self._tasks):
            task.cancel()

    async def _whole(self, run: Run) -> Completion:
        await self._categorise(run)
        return await self._engine.complete(run.call())

    async def _record(self, run: Run) -> None:
        """Put on record what may lower refusals.

        Raises:
            AuditUnavailable: it cannot be written down.
        """
        if self._audit is not None and run.resolution.relaxes and not run.ticket.is_internal:
            await self._audit.let_in(run.ticket, run.generation, run.resolution)

    async def _look_at(self, run: Run, prompt: Sequence[int]) -> None:
        """Refuse, or put on record, a prompt that holds what may lower refusals; before any of its answer is given."""
        if run.resolution.relaxes or run.ticket.is_internal:
            return
        if await check_prompt(run.ticket.caller, run.generation, prompt, self._catalog.now, self._engine):
            run.resolution = structs.replace(run.resolution, relaxes=True)
            await self._record(run)

    async def _categorise(self, run: Run) -> None:
        """P1.4's first pass, where it is asked for: the most likely refusal token names the category of the gate."""
        candidates = run.resolution.candidates
        if not candidates:
            return
        self._metrics.category_passes.inc()
        with run.stages.timed(Stage.CATEGORY):
            completion = await self._engine.complete(run.category_call([*candidates]))
        (tokens,) = completion.tokens
        if len(tokens) != 1 or tokens[0] not in candidates:
            raise EngineError(f"the engine chose tokens {list(tokens)}, where one of {sorted(candidates)} was allowed")
        run.resolution = run.resolution.narrowed(candidates[tokens[0]])

    async def _chunks(
        self, generation: Generation, resolution: Resolution, ticket: Ticket, opened: list[Run]
    ) -> AsyncGenerator[dict[str, Any], None]:
        held: list[dict[str, Any]] = []  # chunks before the first confirmed token: roles, which hold no text
        with self._in_flight(generation, resolution, ticket) as run:
            opened.append(run)
            progress = Progress(self._table(run), run.samples)
            progress.effects = run.effects
            await self._record(run)
            wait = min(self._limits.first_token, self._limits.total)
            await within(wait, self._categorise(run), "the category")
            source = self._engine.stream(run.call())
            async with aclosing(source), aclosing(in_time(source, self._limits, run.began)) as timely:
                async for chunk in timely:
                    body = chunk.body
                    run.generated += len(chunk.tokens)
                    if not body["choices"]:
                        if progress.begun:
                            self._count_tokens(body.get("usage"), run)
                            if generation.wants_usage:
                                yield body
                        continue
                    run.prompt = run.prompt or chunk.prompt
                    if progress.begins(chunk):
                        if not run.effects:
                            await self._look_at(run, run.prompt)
                        await self._confirm_begun(run, body["choices"][0]["index"])
                    if generation.wants_usage:
                        body["usage"] = None
                    kept = progress.cleaned(chunk)
                    if progress.is_finished:
                        run.verdicts = self._read(run, progress.verdicts)
                        run.contents, run.is_complete = progress.contents, True
                        self._count(run)
                        attach(body, run.resolution, self._effects(run), run.verdicts)
                    if kept:
                        held.append(body)
                    if progress.begun:
                        for ready in held:
                            yield ready
                        held.clear()
            if progress.begun and not progress.is_finished:
                raise EngineError("the engine ended the answer before it was complete")

    async def _confirm_begun(self, run: Run, index: int) -> None:
        """Confirm the sample that begins, and before anything else the first, which the header tells of."""
        is_first = not run.effects
        clock = asyncio.get_running_loop().time
        if is_first:
            run.stages[Stage.FIRST_TOKEN] = clock() - run.began - run.stages.get(Stage.CATEGORY, 0.0)
        await self._confirm(run, sorted({0, index} if is_first else {index}))
        if is_first:
            run.first_token = clock() - run.began
            if not run.ticket.is_internal:
                took = self._metrics.first_token.labels(run.ticket.endpoint, flag(run.effects[0].applied))
                took.observe(run.first_token, self._metrics.exemplar(run.ticket.trace))

    async def _confirm(self, run: Run, samples: Sequence[int]) -> None:
        """Take note of what was done to these samples.

        Raises:
            EditNotApplied: the engine does not say so in time, or says something that the plan does not allow.
        """
        plan = run.resolution.plan
        if plan is None:
            run.effects |= {sample: effect_of(run.resolution, None) for sample in samples}
            return
        try:
            with run.stages.timed(Stage.CONFIRM):
                outcomes = await self._engine.outcomes(plan.id, samples, self._limits.outcome)
            run.effects |= {sample: effect_of(run.resolution, outcomes[sample]) for sample in samples}
        except EditNotApplied as error:
            self._metrics.unapplied.labels(error.reason).inc()
            raise

    def _read(self, run: Run, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """The verdicts, with those of the response probe where no token told."""
        reader, order = run.resolution.bundle.reader, run.resolution.order
        if reader is None or order is None:
            return list(verdicts)
        read = self._engine.responses(order.id)
        return [
            verdict if verdict.refused is not None else read_verdict(reader, read.get(sample))
            for sample, verdict in enumerate(verdicts)
        ]

    @contextmanager
    def _in_flight(self, generation: Generation, resolution: Resolution, ticket: Ticket) -> Iterator[Run]:
        if self.is_draining:
            raise EngineOverloaded("this server is shutting down; send the request again")
        if not self._engine.is_alive:
            raise EngineDied("the engine is gone; this server must be started again")
        task = asyncio.current_task()
        assert task is not None
        clock = asyncio.get_running_loop().time
        if not ticket.is_internal:  # the server's own requests look at what a profile does
            resolution = self._rollout.apply(resolution, ticket.request_id)
        most = answer_tokens(
            ticket.caller,
            default=self._limits.answer_tokens,
            context=self._engine.model.context,
            usual=generation.default_tokens,
        )
        run = Run(generation=generation, resolution=resolution, ticket=ticket, began=clock(), answer_tokens=most)
        rows = run.samples if resolution.order is not None else 0
        self._places.take(run.samples)
        self._tasks.add(task)
        self._metrics.inflight.inc()
        self._metrics.rows_wanted.inc(rows)
        try:
            yield run
        except asyncio.CancelledError:
            if not self._is_aborting:
                raise
            task.uncancel()
            run.error = EngineOverloaded("this server shut down before the answer was complete")
            raise run.error from None
        except TrimtabError as error:
            run.error = error
            if not ticket.is_internal:
                self._metrics.broke(run.resolution)
            raise
        except Exception:  # no error of ours: whoever finishes the answer tells it; it counts as the engine's
            run.error = EngineError("internal error")
            if not ticket.is_internal:
                self._metrics.broke(run.resolution)
            raise
        finally:
            self._tasks.discard(task)
            self._places.leave(run.samples)
            self._metrics.inflight.dec()
            self._metrics.rows_wanted.dec(rows)
            if resolution.order is not None:
                self._engine.forget(resolution.order.id)
            event = run.end(clock())
            if not ticket.is_internal:
                self._metrics.took(run.stages)
            for observer in self._observers:
                observer.ended(event)

    def _table(self, run: Run) -> VerdictTable:
        bundle: BundleView = run.resolution.bundle
        if bundle.digest not in self._tables:
            self._tables[bundle.digest] = VerdictTable(bundle)
        return self._tables[bundle.digest]

    def _effects(self, run: Run) -> list[Effect]:
        return [run.effects[index] for index in range(run.samples)]

    def _reported(self, completion: Completion, run: Run) -> dict[str, Any]:
        table, body = self._table(run), completion.body
        for tokens, choice in zip(completion.tokens, body["choices"], strict=True):
            for name in SPOKEN:
                if text := choice["message"].get(name):
                    stripper = MarkerStripper(table)
                    stripper.see(tokens)
                    choice["message"][name] = stripper.feed(text) + stripper.flush()
        run.contents = tuple(choice["message"].get("content") or "" for choice in body["choices"])
        run.is_complete = True
        self._count_tokens(body.get("usage"), run)
        self._count(run)
        attach(body, run.resolution, self._effects(run), run.verdicts)
        return body

    def _count_tokens(self, usage: dict[str, Any] | None, run: Run) -> None:
        if not usage:
            return
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        run.usage = Usage(prompt=usage["prompt_tokens"], completion=usage["completion_tokens"], cached=cached)
        if not run.ticket.is_internal:
            decision, steered = run.effects[0].decision, flag(run.effects[0].applied)
            self._metrics.tokens.labels("prompt", decision, steered).inc(run.usage.prompt)
            self._metrics.tokens.labels("completion", decision, steered).inc(run.usage.completion)
            self._metrics.cached.labels(steered).inc(run.usage.cached)

    def _count(self, run: Run) -> None:
        if not run.ticket.is_internal:
            self._metrics.answered(run.resolution, self._effects(run), run.verdicts)
