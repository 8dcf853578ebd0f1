"""Rate limits: what a key has left, by a clock that the test sets."""

from __future__ import annotations

from typing import Any

import pytest

from server.access.caller import Allowance, Caller
from server.access.rate_limits import RateLimits, Refusal, duration
from server.generation import Generation, Ticket
from server.observe.events import Ended, Usage
from server.policy import resolve
from steering.errors import EngineDied, EngineTimeout, TrimtabError
from tests.fakes import MODEL, make_catalog


class Clock:
    """Seconds, set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """The clock of the limits."""
    return Clock()


@pytest.fixture
def limits(clock: Clock) -> RateLimits:
    """Limits that go by the clock."""
    return RateLimits(clock)


def caller(key: str = "a", **allowance: int) -> Caller:
    """A caller with this allowance."""
    return Caller(key_id=key, tenant=key, allowance=Allowance(**allowance))


def ended(who: Caller, usage: Usage | None = None, *, is_internal: bool = False, **facts: Any) -> Ended:
    """A request of the caller that has ended; its prompt has 100 bytes of JSON."""
    fields = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 51}], **facts.pop("fields", {})}
    generation = Generation(
        model=MODEL, spec=None, fields=fields, prompt_fields=fields, samples=facts.pop("samples", 1)
    )
    return Ended(
        ticket=Ticket(request_id="r", caller=who, is_internal=is_internal),
        generation=generation,
        resolution=resolve(None, make_catalog(), plan_id="p"),
        usage=usage,
        **facts,
    )


def charged(limits: RateLimits, who: Caller, event: Ended) -> int:
    """Tokens that a request costs its key."""
    before = int(limits.headers(who)["x-ratelimit-remaining-tokens"])
    limits.ended(event)
    return before - int(limits.headers(who)["x-ratelimit-remaining-tokens"])


def test_without_limits_everything_is_let_in_and_nothing_is_told(limits: RateLimits) -> None:
    """A key without limits has no headers either."""
    assert all(limits.enter(caller()) is None for _ in range(1000))
    assert limits.headers(caller()) == {}


def test_requests_fill_evenly_over_a_minute(limits: RateLimits, clock: Clock) -> None:
    """A burst of a minute's worth is let in, then one every so often; the wait that is told is right."""
    who = caller(requests=6)
    assert [limits.enter(who) for _ in range(7)] == [None] * 6 + [Refusal("requests", 10.0)]
    clock.now += 9.9
    assert limits.enter(who) == Refusal("requests", pytest.approx(0.1))
    clock.now += 0.1001
    assert limits.enter(who) is None
    clock.now += 3600
    assert [limits.enter(who) for _ in range(7)].count(None) == 6


def test_headers_are_openais(limits: RateLimits, clock: Clock) -> None:
    """Limit, what remains, and the time until all of it is there again, for what is limited."""
    who = caller(requests=60, tokens=600)
    limits.enter(who)
    limits.ended(ended(who, Usage(prompt=100, completion=50)))
    assert limits.headers(who) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "450",
        "x-ratelimit-reset-tokens": "15s",
    }
    clock.now += 0.5
    assert limits.headers(who)["x-ratelimit-reset-requests"] == "500ms"


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0s"), (0.0004, "1ms"), (0.12, "120ms"), (1, "1s"), (8.64, "8.64s"), (60, "1m0s"), (360, "6m0s"),
     (86.4, "1m26.4s"), (3600, "1h0m0s"), (3661.5, "1h1m1.5s")],
)  # fmt: skip
def test_durations_are_written_as_openai_does(seconds: float, told: str) -> None:
    """As Go prints them, to the millisecond, never shorter than they are."""
    assert duration(seconds) == told


def test_tokens_are_charged_when_a_request_ends_and_debt_is_waited_for(limits: RateLimits, clock: Clock) -> None:
    """What is let in is answered to its end; what it took beyond the limit, the next requests wait for."""
    who = caller(tokens=60)
    assert limits.enter(who) is None
    limits.ended(ended(who, Usage(prompt=100, completion=20)))
    assert limits.headers(who)["x-ratelimit-remaining-tokens"] == "0"
    assert limits.enter(who) == Refusal("tokens", pytest.approx(61.0))
    clock.now += 61.01
    assert limits.enter(who) is None


def test_places_are_given_back(limits: RateLimits) -> None:
    """So many at once, and another once one has left; what is refused takes neither a place nor a request."""
    who = caller(concurrent=2, requests=3)
    assert [limits.enter(who) for _ in range(3)] == [None, None, Refusal("concurrent", 1.0)]
    limits.leave(who)
    assert limits.enter(who) is None
    limits.leave(who)
    limits.leave(who)
    assert limits.enter(who) == Refusal("requests", pytest.approx(20.0))


def test_keys_do_not_share(limits: RateLimits) -> None:
    """One key's use is nothing to another's, of the same tenant or not."""
    assert limits.enter(caller("a", requests=1)) is None
    assert limits.enter(caller("a", requests=1)) is not None
    assert limits.enter(caller("b", requests=1)) is None


def test_a_changed_limit_holds_at_once_and_forgives_nothing(limits: RateLimits) -> None:
    """What was used under the old limit stays used under the new; a key that is none any more is forgotten."""
    for _ in range(5):
        limits.enter(caller(requests=10))
    assert limits.headers(caller(requests=6))["x-ratelimit-remaining-requests"] == "1"
    assert limits.headers(caller(requests=4))["x-ratelimit-remaining-requests"] == "0"
    limits.forget({"b"})
    assert limits.headers(caller(requests=10))["x-ratelimit-remaining-requests"] == "10"


def test_an_abandoned_stream_is_charged_for_what_was_streamed(limits: RateLimits) -> None:
    """The prompt by its length, as nobody counted its tokens, and every token that was sent."""
    who = caller(tokens=10_000)
    assert charged(limits, who, ended(who, generated=40, seconds=1.0)) == 25 + 40
    prompt = {"prompt": [1, 2, 3]}
    assert charged(limits, who, ended(who, generated=40, seconds=1.0, fields=prompt)) == 3 + 40


def test_an_abandoned_answer_is_charged_by_the_pace_of_whole_ones(limits: RateLimits) -> None:
    """Of an answer that is not streamed nothing is seen before its end: what others took in the time is charged, up to
    what was asked for.
    """
    who = caller(tokens=10_000)
    assert charged(limits, who, ended(who, seconds=4.0)) == 25  # nothing is known of the pace yet
    charged(limits, who, ended(who, Usage(prompt=1, completion=200), is_complete=True, seconds=2.0, samples=2))
    assert charged(limits, who, ended(who, seconds=3.0)) == 25 + 150
    assert charged(limits, who, ended(who, seconds=3.0, samples=2)) == 25 + 300
    assert charged(limits, who, ended(who, seconds=3.0, fields={"max_tokens": 10})) > 10
    assert charged(limits, who, ended(who, seconds=3.0, fields={"max_tokens": 10})) < 50


@pytest.mark.parametrize(("error", "cost"), [(EngineDied("gone"), 0), (EngineTimeout("slow"), 25 + 40)])
def test_what_the_server_broke_costs_nothing(limits: RateLimits, error: TrimtabError, cost: int) -> None:
    """A time limit is no fault of the server's: the engine worked for it all the while."""
    who = caller(tokens=10_000)
    assert charged(limits, who, ended(who, generated=40, seconds=1.0, error=error)) == cost


def test_the_servers_own_requests_cost_nothing(limits: RateLimits) -> None:
    """Not even where they would come with a key."""
    who = caller(tokens=10_000)
    assert charged(limits, who, ended(who, Usage(prompt=1, completion=2), is_internal=True)) == 0
