"""A model as judge, at any OpenAI-compatible endpoint: request and answer in, a verdict with its kind out.

What it said is kept by content, so that nothing is asked twice and a run goes on where it stopped; what it failed to
say is asked again by the next run. Knows nothing of steering.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError, AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam

from steering.errors import OperatorError
from steering.evaluate.journal import Answer, Journal, prompt_digest, request_digest
from steering.evaluate.judge import Evidence, Judged, Pairs, Progress, Verdict, quiet
from steering.evaluate.reasoning import without_reasoning
from steering.evaluate.reply import content_of, read_reply
from steering.evaluate.rubric import INSTRUCTIONS, RESPONSE_FORMAT, VERSION, case_text

MOST_LOST = 16
"""Requests in a row without a usable reply, each after its retries, after which the endpoint counts as gone."""

_PASSING = {408, 409, 425, 429}
_REFUSING = {400, 415, 422, 501}
"""Statuses by which endpoints refuse a parameter."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """In any currency, per million tokens."""

    prompt: float
    completion: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmSettings:
    """Where a model judge is, and how it is asked.

    Attributes:
        url: root of the API, such as `http://host:8000/v1`.
        cache: file that verdicts are kept in; one file serves any number of models and rubrics.
        temperature, top_p, seed: sampling; P2 has 0.6 and 0.95 with gpt-oss-20b, greedy here unless told.
        max_tokens: of a reply, its reasoning included.
        concurrency: requests at once.
        retries: of one request, after 429, 5xx, timeouts and lost connections, with growing, jittered pauses (the
            SDK's, which honours Retry-After).
        timeout: seconds of one attempt.
        prices: for the cost; None tells tokens alone.
        extra: more fields of the request's body, such as `{"top_k": 20}`.
    """

    url: str
    model: str
    cache: Path
    key: str = field(default="unused", repr=False)
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 2048
    concurrency: int = 16
    retries: int = 5
    timeout: float = 120.0
    prices: Prices | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Counts:
    """What judging took so far.

    Attributes:
        requests: sent, without retries.
        retries: of them that are known.
        cached: verdicts that were there already, repeats within a run included.
        empty: answers with nothing to judge, which are broken without asking.
        failed: requests without a usable reply.
        unreadable: replies without a verdict.
        prompt_tokens, completion_tokens: as the endpoint counts them.
    """

    requests: int = 0
    retries: int = 0
    cached: int = 0
    empty: int = 0
    failed: int = 0
    unreadable: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def to_json(self, prices: Prices | None = None) -> dict[str, float | int]:
        """For reports; with the cost where prices are known."""
        told: dict[str, float | int] = dict(asdict(self))
        if prices is not None:
            spent = self.prompt_tokens * prices.prompt + self.completion_tokens * prices.completion
            told["cost"] = round(spent / 1e6, 6)
        return told


class _Reply(NamedTuple):
    """What came of one request.

    Attributes:
        text: what the judge said; None where there was no usable reply.
        why: the reason then.
        is_lost: the endpoint, not this case, is at fault as far as can be told.
    """

    text: str | None
    why: str = ""
    is_lost: bool = False


class LlmJudge:
    """A model judge; see `LlmSettings`.

    Attributes:
        counts: over all calls.

    Args:
        say: is told once of what the endpoint does not support and is left out from then on.
    """

    def __init__(self, settings: LlmSettings, *, say: Callable[[str], object] = _LOG.warning) -> None:
        self.settings = settings
        self.counts = Counts()
        self._say = say
        self._has_replied = False
        # The SDK's timeout starts anew with every byte: this one does not. Its pauses are of at most 8 s, unless the
        # endpoint names a longer one.
        self._longest = (settings.timeout + 8.0) * (settings.retries + 1)
        self._request: dict[str, Any] = {
            "model": settings.model,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_tokens,
            "response_format": RESPONSE_FORMAT,
            **({} if settings.seed is None else {"seed": settings.seed}),
            **({"extra_body": dict(settings.extra)} if settings.extra else {}),
        }
        asked = {name: value for name, value in self._request.items() if name not in ("model", "response_format")}
        self._digest = request_digest({"rubric": VERSION, **asked}, {"model": settings.model})

    @property
    def name(self) -> str:
        """In reports."""
        return "llm"

    def facts(self) -> dict[str, Any]:
        """Who judged, by which words, and what it took."""
        settings = self.settings
        return {
            "model": settings.model,
            "rubric": VERSION,
            "sampling": {"temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed},
            "is_structured": "response_format" in self._request,
            "counts": self.counts.to_json(settings.prices),
        }

    def judge(
        self, pairs: Pairs, on_progress: Progress = quiet, *, evidence: Sequence[Evidence] | None = None
    ) -> list[Judged]:
        """See `Judge`; not for use inside a running event loop, where `judging` is."""
        del evidence
        return asyncio.run(self.judging(pairs, on_progress))

    async def judging(self, pairs: Pairs, on_progress: Progress = quiet) -> list[Judged]:
        """The same as a coroutine.

        Raises:
            OperatorError: the endpoint is out of reach, refuses the key, or does not know the model.
        """
        answers = [without_reasoning(answer) for _, answer in pairs]
        cases = [
            case_text(prompt, answer) if any(map(str.isalnum, answer)) else None
            for (prompt, _), answer in zip(pairs, answers, strict=True)
        ]
        with Journal(self.settings.cache) as journal:
            missing = [case for case in dict.fromkeys(cases) if case is not None and self._kept(journal, case) is None]
            asked = [case for case in cases if case is not None]
            self.counts.empty += len(cases) - len(asked)
            self.counts.cached += len(asked) - len(missing)
            on_progress(len(cases) - len(missing))
            failures = await self._ask_all(missing, journal, on_progress, has_cached=len(asked) > len(missing))
            found = []
            for case in cases:
                if case is None:
                    found.append(Judged(verdict=Verdict.BROKEN, reason="there is no answer"))
                    continue
                kept = self._kept(journal, case)
                found.append(read_reply(kept.text) if kept is not None else failures[case])
        return found

    def _kept(self, journal: Journal, case: str) -> Answer | None:
        return journal.find(prompt_digest(case), self._digest)

    async def _ask_all(
        self, cases: Sequence[str], journal: Journal, on_progress: Progress, *, has_cached: bool
    ) -> dict[str, Judged]:
        """Ask every case and keep what can be read; returns those without a verdict."""
        failures: dict[str, Judged] = {}
        waiting: Iterator[str] = iter(cases)
        lost = in_a_row = 0

        async def work(client: AsyncOpenAI) -> None:
            nonlocal lost, in_a_row
            for case in waiting:
                reply = await self._ask(client, case)
                lost, in_a_row = (lost + 1, in_a_row + 1) if reply.is_lost else (lost, 0)
                if in_a_row >= MOST_LOST:
                    raise self._gone(reply.why)
                judged = self._judged(reply)
                if judged.verdict is Verdict.UNPARSABLE:
                    failures[case] = judged
                else:
                    journal.keep(prompt_digest(case), self._digest, Answer(text=reply.text or ""))
                on_progress(1)
                last.append(reply.why)

        last: list[str] = []
        client = AsyncOpenAI(
            base_url=self.settings.url,
            api_key=self.settings.key,
            max_retries=self.settings.retries,
            timeout=self.settings.timeout,
        )
        async with client:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.settings.concurrency, len(cases))):
                        group.create_task(work(client))
            except* OperatorError as errors:
                raise _first(errors) from None
        # A single case that never gets its reply must not keep a finished run from ending.
        if cases and lost == len(cases) and (lost > 2 or not has_cached):
            raise self._gone(last[-1])
        return failures

    def _judged(self, reply: _Reply) -> Judged:
        if reply.text is None:
            self.counts.failed += 1
            return Judged(verdict=Verdict.UNPARSABLE, reason=reply.why)
        judged = read_reply(reply.text)
        self.counts.unreadable += judged.verdict is Verdict.UNPARSABLE
        return judged

    async def _ask(self, client: AsyncOpenAI, case: str) -> _Reply:
        """One case; parameters that the endpoint refuses are left out, and the case asked again."""
        messages: list[ChatCompletionMessageParam] = [
            {"role": "system", "content": INSTRUCTIONS},
            {"role": "user", "content": case},
        ]
        trying: dict[str, Any] | None = None
        while True:
            request = trying or dict(self._request)
            self.counts.requests += 1
            try:
                async with asyncio.timeout(self._longest):
                    raw = await client.chat.completions.with_raw_response.create(messages=messages, **request)
                self.counts.retries += raw.retries_taken
                said = raw.parse()
            except APIStatusError as error:
                fewer = None
                if error.status_code in _REFUSING:
                    fewer = _without_refused(request, error, has_replied=self._has_replied)
                if fewer is None:
                    return self._answered_by(error)
                trying = fewer
                continue
            except TimeoutError:
                return _Reply(None, f"no whole reply within {self._longest:g} s", is_lost=True)
            except APIConnectionError as error:
                self.counts.retries += self.settings.retries
                is_slow = isinstance(error, APITimeoutError)
                why = f"no reply within {self.settings.timeout:g} s" if is_slow else "no connection"
                return _Reply(None, f"{why} ({_short(error.__cause__ or error)})", is_lost=True)
            except (APIError, ValueError) as error:
                return _Reply(None, f"a reply that is no JSON: {_short(error)}", is_lost=True)
            if trying is not None:
                self._learn(trying)
            content = content_of(said)
            self._has_replied = self._has_replied or not content.is_rude
            self.counts.prompt_tokens += content.prompt_tokens
            self.counts.completion_tokens += content.completion_tokens
            return _Reply(content.text, content.why, is_lost=content.is_rude)

    def _answered_by(self, error: APIStatusError) -> _Reply:
        """What an error means for one case.

        A single case may be forbidden by a filter of the endpoint; where nothing was answered before, all are.
        """
        status = error.status_code
        if status in (401, 404) or (status == 403 and not self._has_replied):
            raise self._refused(error) from error
        is_passing = status in _PASSING or status >= 500
        self.counts.retries += self.settings.retries if is_passing else 0
        return _Reply(None, f"HTTP {status}: {_short(error.message)}", is_lost=is_passing)

    def _learn(self, request: dict[str, Any]) -> None:
        """From now on ask as in the request that went through."""
        for name in sorted(set(self._request) - set(request)):
            self._say(f"the judge at {self.settings.url} refuses {name!r}; asking without it from now on")
        self._request = request

    def _gone(self, why: str) -> OperatorError:
        return OperatorError(
            f"the judge at {self.settings.url} gives no usable reply ({why}); verdicts so far are kept in "
            f"{self.settings.cache}: put it right and run the same command again"
        )

    def _refused(self, error: APIStatusError) -> OperatorError:
        what = {
            401: "refuses the key (TRIMTAB_JUDGE_API_KEY)",
            403: f"forbids the use of the model {self.settings.model!r}",
            404: f"has no model {self.settings.model!r}, or its API is not at this address",
        }[error.status_code]
        return OperatorError(
            f"the judge at {self.settings.url} {what}: {_short(error.message)}; verdicts so far are kept in "
            f"{self.settings.cache}"
        )


def _without_refused(request: Mapping[str, Any], error: APIStatusError, *, has_replied: bool) -> dict[str, Any] | None:
    """The request without what the endpoint names as at fault, or without structured output where it names nothing.

    `max_tokens` goes over into `max_completion_tokens`, as newer APIs call it.

    Args:
        has_replied: requests like this one were answered before, so that an unnamed fault is this case's own.

    Returns:
        None where there is nothing to leave out.
    """
    told = f"{getattr(error, 'param', None) or ''} {error.message}".lower()
    fewer = dict(request)
    if "max_tokens" in request and ("max_completion_tokens" in told or _names(error, "max_tokens")):
        fewer["max_completion_tokens"] = fewer.pop("max_tokens")
        return fewer
    for name in ("temperature", "top_p", "seed"):
        if name in request and _names(error, name):
            del fewer[name]
            return fewer
    is_named = any(word in told for word in ("response_format", "schema", "structured", "guided", "grammar"))
    if "response_format" in request and (is_named or not has_replied):
        del fewer["response_format"]
        return fewer
    return None


def _names(error: APIStatusError, name: str) -> bool:
    return getattr(error, "param", None) == name or f"'{name}'" in error.message


def _short(told: object, most: int = 200) -> str:
    text = " ".join(str(told).split())
    return text if len(text) <= most else f"{text[:most]}..."


def _first(errors: BaseExceptionGroup[Exception]) -> Exception:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
