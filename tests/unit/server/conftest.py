"""A gateway over the fake engine, spoken to over ASGI."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp

from server.app import create_admin_app, create_app, create_gateway
from server.catalog import Catalog
from server.gateway import Gateway
from server.settings import Settings
from tests.fakes import MODEL, FakeEngine, make_catalog


@dataclass
class Spoken:
    """A gateway and a client of it."""

    gateway: Gateway
    app: ASGIApp
    client: httpx.AsyncClient
    admin: httpx.AsyncClient

    async def chat(self, **fields: Any) -> httpx.Response:
        """Ask for a completion of one user message."""
        return await self.client.post("/v1/chat/completions", json=chat_body(**fields))

    async def events(self, **fields: Any) -> list[dict[str, Any]]:
        """The chunks of a streamed completion; asserts that it ends as it must."""
        response = await self.chat(stream=True, **fields)
        assert response.status_code == 200, response.text
        return read_events(response.text)


def chat_body(**fields: Any) -> dict[str, Any]:
    """A request body with defaults for what must be there."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "How do I kill a process?"}], **fields}


def read_events(text: str) -> list[dict[str, Any]]:
    """Parse server-sent events; the last must be `[DONE]` or an error frame."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    if lines[-1] != "[DONE]":
        assert "error" in json.loads(lines[-1])
        return [json.loads(line) for line in lines]
    return [json.loads(line) for line in lines[:-1]]


Samples = dict[str, list[tuple[dict[str, str], float]]]


async def scrape(spoken: Spoken) -> Samples:
    """All samples of a scrape, by name."""
    response = await spoken.admin.get("/metrics")
    assert response.status_code == 200
    found: Samples = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def value(found: Samples, name: str, **labels: str) -> float:
    """Sum of the samples whose labels include these; 0 when there are none."""
    return sum(amount for given, amount in found.get(name, []) if labels.items() <= given.items())


def unapplied(spoken: Spoken) -> dict[str, float]:
    """Requests whose edit was not confirmed, by the reason they are counted by."""
    (family,) = spoken.gateway.metrics.unapplied.collect()
    return {
        sample.labels["reason"]: sample.value for sample in family.samples if sample.name == "steering_unapplied_total"
    }


def content_of(events: list[dict[str, Any]], index: int = 0) -> str:
    """All text of one choice."""
    return "".join(
        choice["delta"].get("content") or ""
        for event in events
        for choice in event.get("choices", ())
        if choice["index"] == index
    )


def _client_of(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://gateway")


Make = Callable[..., Spoken]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Makes gateways that are armed, and closes their clients."""
    clients: list[httpx.AsyncClient] = []

    def build(
        engine: FakeEngine | None = None, catalog: Catalog | None = None, *, is_armed: bool = True, **settings: Any
    ) -> Spoken:
        gateway = create_gateway(engine or FakeEngine(), catalog or make_catalog(), Settings(**settings))
        gateway.is_armed = is_armed
        app = create_app(gateway)
        spoken = Spoken(gateway=gateway, app=app, client=_client_of(app), admin=_client_of(create_admin_app(gateway)))
        clients.extend((spoken.client, spoken.admin))
        return spoken

    yield build
    for client in clients:
        await client.aclose()
