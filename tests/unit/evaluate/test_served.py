"""Refusal rates over a served API, here the real gateway over a scripted engine."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx2
import pytest
from openai import AsyncOpenAI

from server.app import create_app, create_gateway
from server.settings import Settings
from steering.errors import DatasetMissing, EngineError, UnsupportedConfiguration
from steering.evaluate.served import ARMS, Arm, measure, table
from steering.evaluate.suites import SUITES, find_suite
from steering.fit.datasets import DataDirectory
from tests.fakes import FakeEngine, failing, make_bundle, make_catalog

OWN = [arm for arm in ARMS if arm.profile is None]


@pytest.fixture
async def clients() -> AsyncIterator[list[AsyncOpenAI]]:
    """Clients made by a test, closed at its end."""
    made: list[AsyncOpenAI] = []
    yield made
    for client in made:
        await client.close()


def client_of(engine: FakeEngine, made: list[AsyncOpenAI]) -> AsyncOpenAI:
    """The SDK, speaking to a gateway over this engine."""
    gateway = create_gateway(engine, make_catalog(), Settings())
    gateway.is_armed = True
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=create_app(gateway)))
    made.append(AsyncOpenAI(base_url="http://gateway/v1", api_key="x", http_client=http, max_retries=0))
    return made[-1]


async def test_rates_are_counted_by_suite_and_arm(clients: list[AsyncOpenAI]) -> None:
    """The fake refuses unless told to comply: rates, intervals, categories and names come out as asked."""
    report = await measure(client_of(FakeEngine(), clients), {"s": ["a", "b", "c"], "t": ["d"]}, OWN)
    results = report["results"]["s"]
    assert {arm: found["refusals"]["count"] for arm, found in results.items()} == {
        "unsteered": 3,
        "refuse": 3,
        "comply": 0,
    }
    assert results["comply"]["refusals"] == {"rate": 0.0, "low": 0.0, "high": 0.5615, "count": 0, "n": 3}
    assert results["refuse"]["categories"] == {"Safety": 3}
    assert report["bundles"] == [make_bundle().label]
    assert report["prompts"] == {"s": 3, "t": 1}
    assert "| s | 3 | 100.0% (43.9% to 100.0%) |" in table(report)


async def test_unknown_and_failed_are_in_no_rate(clients: list[AsyncOpenAI]) -> None:
    """What no detector tells, and what was not answered, is counted apart."""
    silent = await measure(client_of(FakeEngine(unsteered=1), clients), {"s": ["a"]}, OWN[:1])
    assert silent["results"]["s"]["unsteered"]["unknown"] == 1
    assert silent["results"]["s"]["unsteered"]["refusals"]["n"] == 0
    broken = await measure(client_of(failing(EngineError("x")), clients), {"s": ["a"]}, OWN[:1])
    assert broken["results"]["s"]["unsteered"]["failed"] == {"engine_error": 1}


async def test_server_that_does_something_else_is_an_error(clients: list[AsyncOpenAI]) -> None:
    """An arm is a claim on what was applied; it is checked in every answer."""
    arms = [Arm(name="x", mode="off", profile="refusal-control")]
    client = client_of(FakeEngine(), clients)
    assert (await measure(client, {"s": ["a"]}, arms))["arms"] == {"x": {"mode": "off", "profile": "refusal-control"}}

    class Quiet(Arm):
        def steering(self) -> dict[str, object]:
            return {"mode": "comply", "report": "none"}

    with pytest.raises(UnsupportedConfiguration, match="'x'"):
        await measure(client, {"s": ["a"]}, [Quiet(name="x", mode="comply")])


def test_unknown_suite_lists_those_there_are() -> None:
    """A typing error is answered with the names."""
    with pytest.raises(DatasetMissing, match="xstest-safe"):
        find_suite("xstest")


@pytest.mark.needs_data
def test_suites_hold_test_prompts_only(data_directory: object) -> None:
    """Every suite loads for testing, and a cut one is an even part of the whole, the same every time."""
    directory = DataDirectory.resolve()
    sizes = {"xstest-safe": 250, "xstest-unsafe": 200, "coconot-contrast": 379, "jbb-benign": 100, "jbb-harmful": 100}
    assert {name: len(suite.prompts(directory)) for name, suite in SUITES.items()} == sizes
    whole, cut = (SUITES["xstest-safe"].prompts(directory, most) for most in (None, 100))
    assert len(cut) == 100
    assert set(cut) < set(whole)
    assert cut == SUITES["xstest-safe"].prompts(directory, 100)
