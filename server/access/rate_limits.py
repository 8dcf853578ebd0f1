"""Rate limits: how much each key has left of requests, tokens and places.

Requests and tokens are buckets that fill evenly, up to what a minute allows. Tokens are charged when a request ends,
for what it took; a bucket may then be in debt, which the next requests wait for. Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from server.access.caller import MOST_TOKENS, Allowance, Caller
from server.errors import Rejection
from server.observe.events import Ended
from steering.errors import EngineTimeout

MINUTE = 60.0
BYTES_PER_TOKEN = 4
"""By which a prompt is estimated whose tokens nobody has counted; the usual rule of thumb for English."""

_PACE_SHARE = 0.2
"""How much the last complete answer counts in the pace by which abandoned ones are estimated."""


class Bucket:
    """So many units a minute, full at first.

    Args:
        size: units a minute, and most that are saved up.
        now: seconds of a monotonic clock.
    """

    def __init__(self, size: int, now: float) -> None:
        self.size = size
        self._level = float(size)
        self._at = now

    def level(self, now: float) -> float:
        """Units left; below 0 in debt."""
        self._level = min(self.size, self._level + (now - self._at) * self.size / MINUTE)
        self._at = now
        return self._level

    def take(self, units: float, now: float) -> None:
        """Use so many, also more than there are."""
        self._level = self.level(now) - units

    def resize(self, size: int, now: float) -> None:
        """Another number a minute; what was used stays used."""
        used = self.size - self.level(now)
        self.size, self._level = size, size - used

    def until(self, units: float, now: float) -> float:
        """Seconds until there are so many."""
        return max(0.0, units - self.level(now)) * MINUTE / self.size


class Refusal(NamedTuple):
    """Which limit is used up: `requests`, `tokens` or `concurrent`, and after how many seconds it is not."""

    reason: str
    wait: float


class RateLimits:
    """What every key has left; an observer of requests that have ended.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}
        self._running: dict[str, int] = {}
        self._pace = 0.0

    def enter(self, caller: Caller) -> Refusal | None:
        """Let a request in, which counts it and takes a place; None, or which limit keeps it out.

        Whoever lets one in calls `leave` once it has ended.
        """
        now, allowed, key = self._clock(), caller.allowance, caller.key_id
        if allowed.concurrent is not None and self._running.get(key, 0) >= allowed.concurrent:
            return Refusal("concurrent", 1.0)
        requests = _bucket(self._requests, key, allowed.requests, now)
        tokens = _bucket(self._tokens, key, allowed.tokens, now)
        if requests is not None and (wait := requests.until(1, now)):
            return Refusal("requests", wait)
        if tokens is not None and (wait := tokens.until(1, now)):
            return Refusal("tokens", wait)
        if requests is not None:
            requests.take(1, now)
        self._running[key] = self._running.get(key, 0) + 1
        return None

    def leave(self, caller: Caller) -> None:
        """A request that was let in has ended, one way or another."""
        left = self._running.get(caller.key_id, 0) - 1
        if left > 0:
            self._running[caller.key_id] = left
        else:
            self._running.pop(caller.key_id, None)

    def headers(self, caller: Caller) -> dict[str, str]:
        """What is left, in the headers by which OpenAI tells it; none for what is not limited."""
        now, told = self._clock(), {}
        for what, buckets in (("requests", self._requests), ("tokens", self._tokens)):
            size = _limit(caller.allowance, what)
            bucket = _bucket(buckets, caller.key_id, size, now)
            if bucket is None or size is None:
                continue
            told[f"x-ratelimit-limit-{what}"] = str(size)
            told[f"x-ratelimit-remaining-{what}"] = str(max(0, math.floor(bucket.level(now))))
            told[f"x-ratelimit-reset-{what}"] = duration(bucket.until(size, now))
        return told

    def ended(self, event: Ended) -> None:
        """Charge what a request took."""
        caller, now = event.ticket.caller, self._clock()
        if event.is_complete and event.usage is not None and event.seconds > 0:
            pace = event.usage.completion / (event.seconds * event.generation.samples)
            self._pace = pace if self._pace == 0 else self._pace + _PACE_SHARE * (pace - self._pace)
        if event.ticket.is_internal:
            return
        bucket = _bucket(self._tokens, caller.key_id, caller.allowance.tokens, now)
        if bucket is not None:
            bucket.take(self._cost(event), now)

    def forget(self, known: Collection[str]) -> None:
        """Drop what is remembered of keys that are none any more."""
        for buckets in (self._requests, self._tokens):
            for key in set(buckets) - set(known):
                del buckets[key]

    def _cost(self, event: Ended) -> int:
        """Tokens of a request: those the engine counted, or else an estimate of what it had worked on by the end."""
        if event.usage is not None:
            return event.usage.prompt + event.usage.completion
        if event.error is not None and not isinstance(event.error, EngineTimeout | Rejection):
            return 0  # it was not worked on, or failed by no fault of the client's
        generation = event.generation
        written = event.generated or math.ceil(self._pace * event.seconds * generation.samples)
        bounds: list[int | None] = [generation.fields.get(name) for name in MOST_TOKENS]
        if bounds == [None, None]:
            bounds = [generation.default_tokens, event.ticket.caller.allowance.max_tokens]
        written = min([written, *(most * generation.samples for most in bounds if most is not None)])
        return _prompt_tokens(generation.prompt_fields) + written


def duration(seconds: float) -> str:
    """A duration as OpenAI's headers have it: `0s`, `120ms`, `1.5s`, `6m0s`, `1h0m0s`."""
    milliseconds = math.ceil(seconds * 1000)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    told = f"{rest / 1000:g}s"
    if hours:
        return f"{hours}h{minutes}m{told}"
    return f"{minutes}m{told}" if minutes else told


def _limit(allowance: Allowance, what: str) -> int | None:
    return allowance.requests if what == "requests" else allowance.tokens


def _bucket(buckets: dict[str, Bucket], key: str, size: int | None, now: float) -> Bucket | None:
    """The bucket of a key at its present size; None where there is no limit."""
    if size is None:
        buckets.pop(key, None)
        return None
    if key not in buckets:
        buckets[key] = Bucket(size, now)
    elif buckets[key].size != size:
        buckets[key].resize(size, now)
    return buckets[key]


def _prompt_tokens(fields: Mapping[str, object]) -> int:
    """About how many tokens a prompt has that was not counted."""
    prompt = fields.get("prompt")
    if isinstance(prompt, list):
        return len(prompt)
    shown = {name: value for name, value in fields.items() if name in {"prompt", "messages", "tools"}}
    return math.ceil(
        len(json.dumps(shown, ensure_ascii=False, default=str).encode("utf-8", "replace")) / BYTES_PER_TOKEN
    )
