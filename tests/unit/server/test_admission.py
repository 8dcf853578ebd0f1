"""Who is let in over HTTP: keys on every route, before the body; permissions and limits as answers and headers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.routing import Route

from server.app import create_admin_app
from server.edge import Edge
from tests.fakes import MODEL, FakeEngine, make_catalog, make_gated_bundle
from tests.unit.server.conftest import Make, Spoken, chat_body
from tests.unit.server.keyed import KEYS, bearer_of, record, write_keys

OPEN = {"/livez", "/health", "/readyz", "/metrics"}
LIMITS = {"requests_per_minute": 60, "tokens_per_minute": 600, "concurrent": 1, "max_tokens": 3}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A file of keys, one of each kind."""
    return write_keys(
        tmp_path / "keys.json",
        record("plain"),
        record("user", permissions=["steer:use"]),
        record("relax", permissions=["steer:use", "steer:relax"], profiles="*", categories="*"),
        record("operator", permissions=["admin"]),
        record("limited", limits=LIMITS),
        record("neighbour", tenant="plain"),
    )


@pytest.fixture
def keyed(make: Make, keys: Path, tmp_path: Path) -> Spoken:
    """A gateway that knows these keys."""
    return make(FakeEngine(), make_catalog(make_gated_bundle()), keys_file=keys, audit_log=tmp_path / "audit.jsonl")


def routes_of(app: object) -> Iterator[tuple[str, str]]:
    """Every path of an application with a method that it takes."""
    assert isinstance(app, Edge)
    found: Any = app._app
    for route in found.routes:
        if isinstance(route, Route):
            for method in route.methods or ():
                yield method, re.sub(r"{[^}]*}", "x", route.path)


@pytest.mark.parametrize("authorization", [None, "Bearer tt-guess", "Bearer", "Basic dHQ6dHQ=", KEYS["plain"]])
async def test_every_route_wants_a_key(keyed: Spoken, authorization: str | None) -> None:
    """Of both applications, all but health and metrics; the answer is OpenAI's, and says how to come back."""
    headers = {} if authorization is None else {"authorization": authorization}
    asked = [(keyed.client, each) for each in routes_of(keyed.app)]
    asked += [(keyed.admin, each) for each in routes_of(create_admin_app(keyed.gateway))]
    closed = 0
    for client, (method, path) in asked:
        answer = await client.request(method, path, headers=headers)
        if path in OPEN:
            assert answer.status_code == 200, path
            continue
        closed += 1
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
        if method != "HEAD":
            error = answer.json()["error"]
            assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
    assert closed >= 10


async def test_the_key_is_looked_at_before_the_body(keyed: Spoken) -> None:
    """Whoever has no key cannot make the server read: not one message of the body is taken."""
    taken: list[str] = []
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        taken.append("message")
        return {"type": "http.request", "body": b"", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": []}
    await keyed.app({**scope, "http_version": "1.1", "scheme": "http", "server": ("g", 1)}, receive, send)
    assert sent[0]["status"] == 401
    assert taken == []


async def test_a_key_opens_what_it_may(keyed: Spoken) -> None:
    """The default with any key, steering with permission for it; who was let in is in the log alone."""
    for name, steering, status in (
        ("plain", None, 200),
        ("plain", {"mode": "auto"}, 403),
        ("user", {"mode": "auto"}, 200),
        ("user", {"mode": "comply"}, 403),
        ("user", False, 403),
        ("user", "manual", 403),
        ("relax", {"mode": "comply"}, 200),
        ("relax", "manual", 200),
        ("relax", {"strength": 0.5}, 403),
        ("relax", {"report": "full"}, 403),
    ):
        answer = await keyed.client.post(
            "/v1/chat/completions", json=chat_body(steering=steering), headers=bearer_of(name)
        )
        assert answer.status_code == status, (name, steering, answer.text)
        if status == 403:
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("permission_error", "permission_denied")
            assert f"'{name}'" in error["message"]
    told = (await keyed.admin.get("/metrics")).text
    assert 'steering_rejections_total{reason="scope"} 5.0' in told
    assert 'steering_rejections_total{reason="profile"} 1.0' in told


async def test_a_key_is_told_which_profiles_it_may_ask_for(keyed: Spoken, keys: Path) -> None:
    """The default always, others where they are listed, by short name or long, and may be named at all."""
    write_keys(
        keys,
        record("plain", profiles="*"),
        record("user", permissions=["steer:use"], profiles=["gated-bundle/manual"]),
        record("relax", permissions=["steer:use"], profiles=["nowhere"]),
    )
    ring = keyed.gateway.admission._keys
    assert ring is not None
    ring._looked -= 2
    told = {}
    for name in ("plain", "user", "relax"):
        answer = await keyed.client.get("/v1/steering", headers=bearer_of(name))
        told[name] = answer.json()["key"]["profiles"]
    assert told == {"plain": ["refusal-control"], "user": ["refusal-control", "manual"], "relax": ["refusal-control"]}


async def test_administration_wants_its_own_permission(keyed: Spoken) -> None:
    """A key that may lower refusals may not load bundles."""
    assert (await keyed.admin.get("/admin/bundles", headers=bearer_of("operator"))).status_code == 200
    for name in ("plain", "relax"):
        answer = await keyed.admin.get("/admin/bundles", headers=bearer_of(name))
        assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error")


async def test_limits_are_told_with_every_answer_and_refused_with_429(keyed: Spoken, make: Make) -> None:
    """OpenAI's headers on what is answered, on what is refused for other reasons, and on what is over the limit."""
    headers = bearer_of("limited")
    names = [
        f"x-ratelimit-{what}-{unit}" for what in ("limit", "remaining", "reset") for unit in ("requests", "tokens")
    ]
    good = await keyed.client.post("/v1/chat/completions", json=chat_body(), headers=headers)
    bad = await keyed.client.post("/v1/chat/completions", content=b"{", headers=headers)
    assert (good.status_code, bad.status_code) == (200, 415)
    assert all(name in answer.headers for name in names for answer in (good, bad))
    assert (good.headers["x-ratelimit-limit-requests"], good.headers["x-ratelimit-remaining-requests"]) == ("60", "59")
    assert bad.headers["x-ratelimit-remaining-tokens"] == str(600 - 5 - 3)
    plain = await keyed.client.get("/v1/models", headers=bearer_of("plain"))
    assert not [name for name in plain.headers if name.startswith("x-ratelimit")]
    for _ in range(58):
        assert (await keyed.client.get("/v1/models", headers=headers)).status_code == 200
    over = await keyed.client.get("/v1/models", headers=headers)
    assert (over.status_code, over.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert over.headers["retry-after"] == "1"
    assert over.headers["x-ratelimit-remaining-requests"] == "0"
    told = (await keyed.admin.get("/metrics")).text
    assert 'steering_rejections_total{reason="requests"} 1.0' in told


async def test_a_place_is_taken_until_the_answer_is_sent_or_given_up(make: Make, keys: Path, tmp_path: Path) -> None:
    """A second request of a key for one at a time is refused while the first is answered, streamed or not, and let in
    after it, also where its client left.
    """
    engine = FakeEngine(gate=asyncio.Event())
    spoken = make(engine, keys_file=keys, audit_log=tmp_path / "audit.jsonl")
    headers = bearer_of("limited")

    async def ask(**fields: Any) -> int:
        answer = await spoken.client.post("/v1/chat/completions", json=chat_body(**fields), headers=headers)
        return answer.status_code

    assert engine.gate is not None
    for is_stream in (False, True):
        for leaves in (False, True):
            engine.gate.clear()
            begun = len(engine.calls)
            first = asyncio.create_task(ask(stream=is_stream))
            while len(engine.calls) == begun:
                await asyncio.sleep(0.01)
            assert await ask() == 429
            if leaves:
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)
            engine.gate.set()
            if not leaves:
                assert await first == 200
            assert await ask() == 200


async def test_an_answer_is_no_longer_than_the_key_allows(keyed: Spoken) -> None:
    """What asks for no length gets the key's, whatever the endpoint; what asks for more is refused."""
    engine = keyed.gateway.engine
    assert isinstance(engine, FakeEngine)
    headers = bearer_of("limited")
    answer = await keyed.client.post("/v1/chat/completions", json=chat_body(), headers=headers)
    assert answer.json()["usage"]["completion_tokens"] == 3
    assert engine.calls[-1].fields["max_tokens"] == 3
    await keyed.client.post("/v1/chat/completions", json=chat_body(max_completion_tokens=2), headers=headers)
    assert "max_tokens" not in engine.calls[-1].fields
    await keyed.client.post("/v1/responses", json={"model": MODEL, "input": "Hello"}, headers=headers)
    assert engine.calls[-1].fields["max_tokens"] == 3
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 4}
    refused = await keyed.client.post("/v1/completions", json=body, headers=headers)
    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "max_tokens")


@pytest.mark.parametrize(("allowed", "given"), [(3, 3), (16, 16), (200, 16)])
async def test_a_completion_without_a_length_gets_openais_unless_the_key_allows_less(
    make: Make, keys: Path, allowed: int, given: int
) -> None:
    """Whoever names no number is not refused for one: the least of both counts."""
    write_keys(keys, record("plain", limits={"max_tokens": allowed}))
    engine = FakeEngine()
    spoken = make(engine, keys_file=keys)
    body = {"model": MODEL, "prompt": "Hello"}
    answer = await spoken.client.post("/v1/completions", json=body, headers=bearer_of("plain"))
    assert answer.status_code == 200
    assert engine.calls[-1].fields["max_tokens"] == given


async def test_a_key_that_allows_more_than_the_context_can_be_used(make: Make, keys: Path) -> None:
    """What asks for no length gets what the model has room for, and no number that the engine would refuse; also more
    than the server's own.
    """
    write_keys(keys, record("plain", limits={"max_tokens": 100_000}), record("user", limits={"max_tokens": 200}))
    engine = FakeEngine()
    spoken = make(engine, keys_file=keys, default_max_tokens=100)
    for name in ("plain", "user"):
        answer = await spoken.client.post("/v1/chat/completions", json=chat_body(), headers=bearer_of(name))
        assert answer.status_code == 200
    assert [call.fields["max_tokens"] for call in engine.calls] == [512, 200]


async def test_a_graded_strength_tells_its_share_to_those_who_may_read_scores(
    make: Make, keys: Path, tmp_path: Path
) -> None:
    """The share of a graded gate's strength is a score in other words."""
    write_keys(keys, record("plain"), record("user", permissions=["scores:read"]))
    spoken = make(FakeEngine(), make_catalog(make_gated_bundle(is_graded=True)), keys_file=keys)
    told = {}
    for name in ("plain", "user"):
        answer = await spoken.client.post("/v1/chat/completions", json=chat_body(), headers=bearer_of(name))
        told[name] = answer.json()["steering"]
    assert told["plain"]["strength"] is None
    assert told["user"]["strength"] == pytest.approx(0.875)
    assert told["plain"]["applied"]
    assert "scores" not in told["plain"]


async def test_keys_come_and_go_while_requests_run(keyed: Spoken, keys: Path) -> None:
    """A key that is revoked is refused from the next look at the file on, and a broken file is counted."""
    ring = keyed.gateway.admission._keys
    assert ring is not None

    async def status(name: str) -> int:
        ring._looked -= 2  # as if so many seconds had passed
        return (await keyed.client.get("/v1/models", headers=bearer_of(name))).status_code

    assert (await status("plain"), await status("user")) == (200, 200)
    write_keys(keys, record("user"))
    assert (await status("plain"), await status("user")) == (401, 200)
    keys.write_text("{")
    assert (await status("plain"), await status("user")) == (401, 200)
    told = (await keyed.admin.get("/metrics")).text
    assert 'steering_key_loads_total{result="done"} 1.0' in told
    assert 'steering_key_loads_total{result="failed"} 1.0' in told
    assert 'steering_rejections_total{reason="wrong_key"} 2.0' in told


async def test_openais_client_reads_what_it_is_told(keyed: Spoken) -> None:
    """Each refusal is the exception that the SDK has for it; a key is sent as the SDK sends it."""

    async def ask(key: str, **fields: Any) -> object:
        client = openai.AsyncOpenAI(api_key=key, base_url="http://gateway/v1", http_client=keyed.client, max_retries=0)
        return await client.chat.completions.create(**chat_body(), **fields)

    assert await ask(KEYS["plain"])
    with pytest.raises(openai.AuthenticationError) as unknown:
        await ask("tt-guess")
    assert unknown.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError, match="steer:use"):
        await ask(KEYS["plain"], extra_body={"steering": {"mode": "refuse"}})


class TestTenants:
    """The prefix cache is shared within a tenant, and with nobody else."""

    async def salt(self, spoken: Spoken, name: str | None, **fields: Any) -> str | None:
        """What the engine is told to keep the request's cache apart by."""
        engine = spoken.gateway.engine
        assert isinstance(engine, FakeEngine)
        headers = {} if name is None else bearer_of(name)
        answer = await spoken.client.post("/v1/chat/completions", json=chat_body(**fields), headers=headers)
        assert answer.status_code == 200, answer.text
        found: str | None = engine.calls[-1].fields.get("cache_salt")
        return found

    async def test_tenants_are_kept_apart(self, keyed: Spoken) -> None:
        """Keys of one tenant have one salt, those of two have two, and none can be guessed from a name."""
        plain, user = await self.salt(keyed, "plain"), await self.salt(keyed, "user")
        assert plain is not None
        assert plain == await self.salt(keyed, "neighbour") == await self.salt(keyed, "plain")
        assert plain != user
        assert re.fullmatch("[0-9a-f]{64}", plain)

    async def test_a_clients_own_salt_counts_within_its_tenant(self, keyed: Spoken) -> None:
        """It separates further, is never sent on as it is, and cannot be made another tenant's."""
        own = await self.salt(keyed, "plain", cache_salt="mine")
        assert own == await self.salt(keyed, "neighbour", cache_salt="mine")
        theirs = await self.salt(keyed, "user")
        salts = {own, theirs, await self.salt(keyed, "plain"), await self.salt(keyed, "user", cache_salt="mine")}
        assert len(salts) == 4
        assert own is not None
        assert "mine" not in own
        assert theirs is not None
        assert await self.salt(keyed, "plain", cache_salt=theirs) != theirs

    async def test_a_salt_without_a_tenant_is_refused(self, make: Make) -> None:
        """Where there are no keys everyone shares, and nothing is sent to the engine."""
        spoken = make()
        assert await self.salt(spoken, None) is None
        answer = await spoken.chat(cache_salt="mine")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cache_salt")

    async def test_every_endpoint_and_pass_is_salted(self, keyed: Spoken) -> None:
        """Completions, responses, and the pass that asks the model's own tokens for a category."""
        engine = keyed.gateway.engine
        assert isinstance(engine, FakeEngine)
        salt = await self.salt(keyed, "relax")
        engine.calls.clear()
        source = {"category_source": "refusal_tokens"}
        for path, fields in (
            ("/v1/chat/completions", {**chat_body(), "steering": source}),
            ("/v1/completions", {"model": MODEL, "prompt": ["One", "Two"]}),
            ("/v1/responses", {"model": MODEL, "input": "One", "store": False}),
        ):
            answer = await keyed.client.post(path, json=fields, headers=bearer_of("relax"))
            assert answer.status_code == 200, answer.text
        assert len(engine.calls) == 5
        assert {call.fields["cache_salt"] for call in engine.calls} == {salt}
