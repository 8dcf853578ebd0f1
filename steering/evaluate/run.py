"""Asking a served API every prompt of every suite under every arm, concurrently, going on where a run stopped.

Prompts too long for the server's context are kept as such and not asked again; requests that fail for another reason
are asked again by the SDK where it passes, and by the next run. Knows nothing of judging.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from openai import APIConnectionError, APIError, APIStatusError, AsyncOpenAI

from steering.errors import OperatorError, UnsupportedConfiguration
from steering.evaluate.arms import Arm
from steering.evaluate.journal import Answer, Journal, prompt_digest, request_digest
from steering.evaluate.server import Server
from steering.evaluate.suites import Group, Suite
from steering.fit.datasets import Record, thinned

TOO_LONG = "context_length_exceeded"
MOST_LOST = 20
"""Connections lost in a row, each after the SDK's own retries, after which the server counts as gone."""

_OF_THE_CALLER = {401, 403}
"""Statuses that say nothing of a prompt: a key that is unknown or lacks a permission."""

_OF_THE_SERVER = 404
"""Another server at this address, or one that has another model or bundle by now."""

_TOP = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How answers are asked for.

    Attributes:
        max_tokens: of a whole answer.
        texts: evenly spaced prompts of a suite whose whole answer is asked for under arms that are not `is_whole`,
            where the model decides by its first token; None for all.
        concurrency: requests at once; arms are mixed.
    """

    max_tokens: int = 24
    texts: int | None = None
    concurrency: int = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One prompt under one arm, and what came of it.

    Attributes:
        has_text: a whole answer was asked for, so that judges of text apply.
    """

    suite: Suite
    arm: str
    record: Record
    answer: Answer
    has_text: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    suite: Suite
    arm: Arm
    record: Record
    request: dict[str, Any]
    has_text: bool
    key: str
    digest: str


async def ask_all(
    client: AsyncOpenAI,
    server: Server,
    prompts: Mapping[Suite, Sequence[Record]],
    arms: Sequence[Arm],
    journal: Journal,
    settings: Settings,
    *,
    on_progress: Callable[[int], object] = lambda _: None,
) -> list[Asked]:
    """Ask what is not in the journal yet.

    Args:
        prompts: by suite.
        on_progress: called with how many answers are there, those that need no asking first.

    Returns:
        Every prompt under every arm that asks its group; failed ones carry an error.

    Raises:
        OperatorError: the server is gone, or does not let this caller ask what an arm asks.
        UnsupportedConfiguration: it did something else than was asked.
    """
    jobs = list(_jobs(server, prompts, arms, settings))
    missing = {(job.key, job.digest): job for job in jobs if _kept(journal, job) is None}
    on_progress(len(jobs) - len(missing))
    waiting = iter(missing.values())
    failed: dict[tuple[str, str], Answer] = {}
    lost = 0

    async def work() -> None:
        nonlocal lost
        for job in waiting:
            answer, is_final = await _ask(client, job, server)
            lost = lost + 1 if answer.error == APIConnectionError.__name__ else 0
            if lost >= MOST_LOST:
                raise OperatorError(
                    f"the server at {client.base_url} is gone; start it and the same command again: answers so far are "
                    f"kept in {journal.path}"
                )
            if is_final:
                journal.keep(job.key, job.digest, answer)
            else:
                failed[job.key, job.digest] = answer
            on_progress(1)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(settings.concurrency, len(missing))):
                group.create_task(work())
    except* (OperatorError, UnsupportedConfiguration) as errors:
        raise _first(errors) from None
    return [
        Asked(
            suite=job.suite,
            arm=job.arm.name,
            record=job.record,
            answer=_kept(journal, job) or failed[job.key, job.digest],
            has_text=job.has_text,
        )
        for job in jobs
    ]


def _kept(journal: Journal, job: _Job) -> Answer | None:
    """What is known of a job already; errors other than a prompt's length are asked again."""
    found = journal.find(job.key, job.digest)
    return None if found is None or found.error not in ("", TOO_LONG) else found


def count(prompts: Mapping[Suite, Sequence[Record]], arms: Sequence[Arm]) -> int:
    """How many answers there will be."""
    return sum(len(found) for arm in arms for suite, found in prompts.items() if suite.group in arm.groups)


def _jobs(
    server: Server, prompts: Mapping[Suite, Sequence[Record]], arms: Sequence[Arm], settings: Settings
) -> Iterator[_Job]:
    for suite, records in prompts.items():
        sample = records if settings.texts is None else thinned(records, settings.texts)
        sampled = {record.key for record in sample}
        for arm in arms:
            if suite.group not in arm.groups:
                continue
            for record in records:
                is_sampled = not arm.is_short and (arm.is_whole or record.key in sampled)
                has_text = is_sampled or not server.has_decision_tokens
                request = _request(server, suite, arm, record, settings.max_tokens if has_text else 1)
                yield _Job(
                    suite=suite,
                    arm=arm,
                    record=record,
                    request=request,
                    has_text=has_text,
                    key=f"{record.key}#{prompt_digest(record.prompt)}",
                    digest=request_digest(request, server.identity),
                )


def _request(server: Server, suite: Suite, arm: Arm, record: Record, max_tokens: int) -> dict[str, Any]:
    request: dict[str, Any] = {
        "model": server.model,
        "messages": [{"role": "user", "content": record.prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "extra_body": {"steering": arm.steering_for(record.key)},
    }
    if arm.logit_bias:
        request["logit_bias"] = dict(arm.logit_bias)
    if arm.reads_first:
        request.update(logprobs=True, top_logprobs=_TOP)
    elif arm.reads_loss and suite.group is Group.ABILITY:
        request["logprobs"] = True
    return request


async def _ask(client: AsyncOpenAI, job: _Job, server: Server) -> tuple[Answer, bool]:
    """The answer, and whether asking again would bring the same."""
    try:
        completion = await client.chat.completions.create(**job.request)
    except APIStatusError as error:
        if error.status_code == _OF_THE_SERVER:
            raise OperatorError(
                f"the server answers arm {job.arm.name!r} with status 404: {error.message}; with the server, model and "
                "bundle that were there when this began the same command goes on"
            ) from error
        if error.status_code in _OF_THE_CALLER:
            raise OperatorError(
                f"the server answers arm {job.arm.name!r} with status {error.status_code}: {error.message}; with "
                "another TRIMTAB_API_KEY (one with steer:use, steer:custom, steer:relax and scores:read may ask all "
                "arms), or with --only for fewer arms, the same command goes on"
            ) from error
        code = error.code or f"http_{error.status_code}"
        return Answer(error=code), code == TOO_LONG
    except APIConnectionError:
        return Answer(error=APIConnectionError.__name__), False
    except APIError as error:
        return Answer(error=error.code or type(error).__name__), False
    answer = _read(completion, server)
    asked = job.request["extra_body"]["steering"].get("mode")
    if asked not in (None, "auto") and answer.decision != asked:
        raise UnsupportedConfiguration(
            f"arm {job.arm.name!r} asked for mode {asked}, the server says it decided {answer.decision!r}"
        )
    if asked == "auto" and answer.decision not in ("refuse", "comply", "abstain"):
        raise UnsupportedConfiguration(
            f"arm {job.arm.name!r} asked for mode auto, the server says {answer.decision!r}: its gate did not decide"
        )
    return answer, True


def _read(completion: Any, server: Server) -> Answer:
    choice = completion.choices[0]
    told = (completion.model_extra or {}).get("steering") or {}
    verdict = told.get("verdict") or {}
    scores = told.get("scores") or {}
    shares = scores.get("categories")
    answer = Answer(
        text=choice.message.content or "",
        refused=verdict.get("refused"),
        verdict_category=verdict.get("category"),
        detector=str(verdict.get("detector") or ""),
        decision=str(told.get("decision", "")),
        category=told.get("category"),
        edit=told.get("edit"),
        strength=told.get("strength"),
        score=scores.get("refusal"),
        categories=None if not shares else {name: round(share, 6) for name, share in shares.items()},
        tokens=completion.usage.completion_tokens if completion.usage else 0,
    )
    places = choice.logprobs.content if choice.logprobs and choice.logprobs.content else []
    if not places:
        return answer
    likely = {entry.token: math.exp(entry.logprob) for entry in places[0].top_logprobs}
    return replace(
        answer,
        first={token: round(likely[token], 6) for token in server.tokens if token in likely} or None,
        loss=round(-sum(place.logprob for place in places) / len(places), 6),
    )


def _first(errors: BaseExceptionGroup[Exception]) -> Exception:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
