"""The edge of the gateway: paths, methods, bodies, headers, states."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server.body import ClientGone, read_json_body
from server.errors import BodyTimeout, BodyTooLarge
from server.settings import Settings, check_reach
from steering.errors import UnsupportedConfiguration
from tests.fakes import MODEL, FakeEngine, make_catalog, make_gated_bundle
from tests.unit.server.conftest import Make, chat_body

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/openapi.json",
        "/v1",
        "/v1/chat/completions/",
        "//v1/chat/completions",
        "/v1/%2e%2e/metrics",
        "/x%2e",
    ],
)
async def test_unknown_paths_are_404_in_the_envelope(make: Make, path: str) -> None:
    """Nothing is served but what the design lists, and FastAPI's own body never shows."""
    response = await make().client.get(path)
    assert response.status_code == 404
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/v1/chat/completions", "POST"), ("POST", "/v1/models", "GET"), ("DELETE", f"/v1/models/{MODEL}", "GET")],
)
async def test_wrong_method_is_405_in_the_envelope(make: Make, method: str, path: str, allowed: str) -> None:
    """The answer also says which method would do."""
    response = await make().client.request(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == allowed
    assert response.json()["error"]["code"] == "method_not_allowed"


async def test_models_are_listed_and_retrieved(make: Make) -> None:
    """The SDK's list and retrieve both find the model, with its profiles; another name is a 404."""
    client = make().client
    listed = (await client.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == [MODEL]
    assert (await client.get(f"/v1/models/{MODEL}")).json() == listed["data"][0]
    assert listed["data"][0]["steering"]["profiles"] == ["refusal-control"]
    missing = await client.get("/v1/models/org/other")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_steering_is_described(make: Make) -> None:
    """A client finds profiles, categories, modes and certified ranges without reading a bundle."""
    found = (await make().client.get("/v1/steering")).json()
    assert (found["default_profile"], found["default_mode"], found["has_gate"]) == ("refusal-control", "off", False)
    assert found["modes"] == ["refuse", "comply", "off"]
    (bundle,) = found["bundles"]
    assert [category["name"] for category in bundle["categories"]] == ["Safety", "Political"]
    assert bundle["edits"][0]["strength"]["maximum"] == 2.0
    assert (bundle["probes"], bundle["profiles"][0]["gate"]) == ([], None)
    assert (found["reports"], found["category_sources"]) == (["none", "decision"], [])


async def test_gates_are_described(make: Make) -> None:
    """Thresholds, what they cost, the categories a gate tells, and which profiles have one."""
    found = (await make(catalog=make_catalog(make_gated_bundle())).client.get("/v1/steering")).json()
    assert (found["default_mode"], found["has_gate"]) == ("auto", True)
    assert found["modes"] == ["auto", "refuse", "comply", "off"]
    assert found["reports"] == ["none", "decision", "full"]
    assert found["category_sources"] == ["probe", "refusal_tokens"]
    (bundle,) = found["bundles"]
    gated, manual = bundle["profiles"]
    assert (gated["default_mode"], manual["default_mode"]) == ("auto", "off")
    assert manual["modes"] == ["refuse", "comply", "off"]
    assert gated["gate"] == {
        "probe": "prompt",
        "categories": ["Safety", "Political"],
        "thresholds": {"comply_below": 0.2, "refuse_above": 0.6},
        "graded": False,
        "category_source": "probe",
    }
    (probe,) = bundle["probes"]
    assert (probe["layer"], probe["categories"]) == (2, ["Safety", "Political"])
    assert probe["operating_points"][0]["false_positive_rate"] == 0.1


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 415),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({**JSON, "content-encoding": "gzip"}, 415),
        ({"content-type": "application/json; charset=utf-8"}, 400),
    ],
)
async def test_only_plain_json_is_read(make: Make, headers: dict[str, str], status: int) -> None:
    """Other media and compressed bodies are refused before a byte is parsed."""
    response = await make().client.post("/v1/chat/completions", content=b"{", headers=headers)
    assert response.status_code == status


async def test_big_body_is_refused_while_it_arrives(make: Make) -> None:
    """The cap counts bytes, not what Content-Length claims."""

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(10_000):
            yield b"x" * 1000

    client = make(max_body_bytes=5000).client
    for content in (b"x" * 6000, endless()):
        response = await client.post("/v1/chat/completions", content=content, headers=JSON)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


async def test_body_reading_stops_at_the_cap_the_clock_and_the_hang_up() -> None:
    """Reading ends at the first of: too many bytes, too long a wait, the client's departure."""
    messages = [{"type": "http.request", "body": b"x" * 60, "more_body": True}] * 2

    def receiver(*script: dict[str, object]) -> object:
        left = iter(script)

        async def receive() -> dict[str, object]:
            for message in left:
                return message
            await asyncio.sleep(3600)
            raise AssertionError

        return receive

    with pytest.raises(BodyTooLarge):
        await read_json_body(JSON, receiver(*messages), limit=100, wait=1)  # type: ignore[arg-type]
    with pytest.raises(BodyTimeout):
        await read_json_body(JSON, receiver(messages[0]), limit=100, wait=0.02)  # type: ignore[arg-type]
    with pytest.raises(ClientGone):
        await read_json_body(JSON, receiver({"type": "http.disconnect"}), limit=100, wait=1)  # type: ignore[arg-type]


async def test_request_ids_are_ours(make: Make) -> None:
    """The client's X-Request-Id is neither echoed nor given to the engine."""
    engine = FakeEngine()
    client = make(engine).client
    sent = [
        await client.post("/v1/chat/completions", json=chat_body(), headers={"X-Request-Id": "mine"}) for _ in range(2)
    ]
    ids = [response.headers["x-request-id"] for response in sent]
    assert len(set(ids)) == 2
    assert "mine" not in ids
    assert [call.request_id for call in engine.calls] == [name.removeprefix("req_") for name in ids]


async def test_states_of_readiness(make: Make) -> None:
    """Not armed, leaving, draining and dead are all not ready; only dead is not live, and one that leaves still answers
    those whom balancers send to it meanwhile.
    """
    engine = FakeEngine()
    spoken = make(engine, is_armed=False)
    gateway, client = spoken.gateway, spoken.client

    async def states() -> tuple[int, int, int]:
        return (
            (await client.get("/livez")).status_code,
            (await client.get("/readyz")).status_code,
            (await spoken.chat()).status_code,
        )

    assert await states() == (200, 503, 503)
    gateway.is_armed = True
    assert await states() == (200, 200, 200)
    gateway.service.is_leaving = True
    assert await states() == (200, 503, 200)
    assert (await client.get("/readyz")).json()["error"]["code"] == "draining"
    gateway.service.is_draining = True
    assert await states() == (200, 503, 503)
    gateway.service.is_leaving = gateway.service.is_draining = False
    engine.is_alive = False
    assert await states() == (503, 503, 503)
    assert (await client.get("/health")).status_code == 503


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_loopback_hosts_are_allowed(host: str) -> None:
    """Only this machine can reach these."""
    check_reach(Settings(host=host, admin_host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])  # noqa: S104 - refused is the point
def test_other_hosts_are_refused_without_keys(host: str) -> None:
    """Whoever reaches the server may lower refusals, so nobody else may reach it."""
    for settings in (Settings(host=host), Settings(admin_host=host)):
        with pytest.raises(UnsupportedConfiguration, match="no API keys"):
            check_reach(settings)
    check_reach(Settings(host=host, admin_host=host, keys_file=Path("keys.json")))
