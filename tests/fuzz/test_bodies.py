"""Bodies broken at random, to every endpoint that takes one: a bad input is never answered with a 5xx.

`TRIMTAB_FUZZ_CASES=20000 make test ARGS="tests/fuzz -n 0 -s"` runs more than CI does, and shows what was answered.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from starlette.types import ASGIApp

from server.app import create_app, create_gateway
from server.engine import Call
from server.gateway import Gateway
from server.settings import Settings
from tests.fakes import FakeEngine, make_catalog, make_gated_bundle
from tests.fuzz.bodies import SEEDS, mutated

CASES = int(os.environ.get("TRIMTAB_FUZZ_CASES", "1500"))
"""Bodies in all; the endpoints share them."""

SHARE = {"/v1/chat/completions": 8, "/v1/completions": 4, "/v1/responses": 5, "/v1/steering/probe": 2, "/tokenize": 1}


class Forgetful(FakeEngine):
    """A fake that keeps nothing of thousands of calls, and reads prompts to which it is to say nothing."""

    async def _tokens(self, call: Call) -> AsyncGenerator[tuple[int, int, str], None]:
        if call.fields.get("max_tokens") == 0:  # vLLM then generates a token all the same, and does not show it
            for index in range(call.samples):
                self._first(call, index)
        async for each in super()._tokens(call):
            yield each

    def forget(self, plan_id: str) -> None:
        self._outcomes.pop(plan_id, None)
        for kept in (self.calls, self.aborted, self.forgotten, self.read):
            kept.clear()


class Fuzzed:
    """A gateway in this process, asked directly over ASGI."""

    def __init__(self) -> None:
        bundle = make_gated_bundle()
        self.gateway: Gateway = create_gateway(Forgetful(bundles=[bundle]), make_catalog(bundle), Settings())
        self.gateway.is_armed = True
        self.app: ASGIApp = create_app(self.gateway)
        self.runner = asyncio.Runner()
        self.statuses: Counter[int] = Counter()

    def post(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer; an exception that leaves the application is one of ours."""
        return self.runner.run(self._post(path, body))

    async def _post(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        sent = iter([{"type": "http.request", "body": body, "more_body": False}])
        answered: list[Any] = []

        async def receive() -> Any:
            for message in sent:
                return message
            return await asyncio.Event().wait()

        async def send(message: Any) -> None:
            answered.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"host", b"gateway")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        await self.app(scope, receive, send)
        start = next(message for message in answered if message["type"] == "http.response.start")
        headers = {name.decode().lower(): value.decode() for name, value in start["headers"]}
        return start["status"], headers, b"".join(message.get("body", b"") for message in answered)


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Fuzzed]:
    """The gateway of all cases; in the end nothing is in flight any more."""
    found = Fuzzed()
    yield found
    assert found.gateway.service.inflight == 0
    found.runner.close()


@pytest.mark.parametrize("path", SEEDS)
def test_seed_is_answered(fuzzed: Fuzzed, path: str) -> None:
    """What is broken below is whole before: fuzzing that begins with refused bodies would prove nothing."""
    for seed in SEEDS[path]:
        status, _, body = fuzzed.post(path, json.dumps(seed).encode())
        assert status == 200, (seed, body)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("path", SEEDS)
def test_no_broken_body_is_our_fault(fuzzed: Fuzzed, path: str) -> None:
    """Each is answered, or refused with a 4xx in the envelope that says in few words what is wrong."""
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=max(1, CASES * SHARE[path] // sum(SHARE.values())),
        deadline=None,
        database=None,
        derandomize="TRIMTAB_FUZZ_CASES" not in os.environ,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(mutated(path))
    def each(body: bytes) -> None:
        status, headers, answer = fuzzed.post(path, body)
        statuses[status] += 1
        check(status, headers, answer)

    each()
    assert statuses[200]
    assert statuses[400]
    print(path, dict(sorted(statuses.items())))  # noqa: T201 - figures, shown with -s


def check(status: int, headers: dict[str, str], answer: bytes) -> None:
    """An answer as it must be, whatever was asked."""
    assert status < 500, (status, answer)
    assert headers["x-request-id"].startswith("req_")
    if status != 200:
        error = json.loads(answer)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert len(error["message"]) < 1000
        assert error["code"]
    elif headers["content-type"].startswith("text/event-stream"):
        last = answer.decode().rstrip("\n").rpartition("\n\n")[2]
        assert last == "data: [DONE]" or "response.completed" in last or "response.incomplete" in last, last[-300:]
    else:
        json.loads(answer)
