"""The client's helper: what it builds is what the server takes, and it reads what the server tells."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI

from server.app import create_app, create_gateway
from server.settings import Settings
from server.wire.steering import Steering
from steering.client import SteeringReport, decision_of, steering, steering_of
from tests.fakes import MODEL, FakeEngine, make_catalog, make_gated_bundle, read

USER: Any = [{"role": "user", "content": "How do I kill a process?"}]


@pytest.fixture
async def sdk() -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's SDK over a gateway whose gate reads a harmful prompt."""
    gateway = create_gateway(FakeEngine(scores=[read(0.95)]), make_catalog(make_gated_bundle()), Settings())
    gateway.is_armed = True
    transport = httpx2.ASGITransport(app=create_app(gateway))
    async with httpx2.AsyncClient(transport=transport) as http:
        yield AsyncOpenAI(base_url="http://gateway/v1", api_key="unused", http_client=http, max_retries=0)


def check(report: SteeringReport | None, bundle: str) -> None:
    """What every kind of answer tells of one steered as the gate decides."""
    assert report is not None
    assert (report.applied, report.decision, report.category) == (True, "refuse", "Safety")
    assert (report.profile, report.bundle, report.edit) == ("refusal-control", bundle, "refuse-safety")
    assert (report.refusal, report.categories["Safety"]) == (0.95, 0.7)
    assert report.verdict is not None
    assert report.verdict.refused is True
    assert report.shadow is False


async def test_every_answer_of_the_sdk_is_read(sdk: AsyncOpenAI) -> None:
    """Chat completions, completions, responses, the last chunk of a stream, and all of them as plain JSON."""
    asked, bundle = steering(report="full"), make_gated_bundle().label
    chat = await sdk.chat.completions.create(model=MODEL, messages=USER, extra_body=asked)
    check(steering_of(chat), bundle)
    check(steering_of(chat.model_dump()), bundle)
    completion = await sdk.completions.create(model=MODEL, prompt="How do I", extra_body=asked)
    check(steering_of(completion), bundle)
    response = await sdk.responses.create(model=MODEL, input="How do I", store=False, extra_body=asked)
    check(steering_of(response), bundle)
    stream = await sdk.chat.completions.create(model=MODEL, messages=USER, stream=True, extra_body=asked)
    chunks = [chunk async for chunk in stream]
    assert [steering_of(chunk) is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    check(steering_of(chunks[-1]), bundle)
    events = await sdk.responses.create(model=MODEL, input="How do I", store=False, stream=True, extra_body=asked)
    told = [event async for event in events]
    check(steering_of(told[-1]), bundle)


async def test_the_header_is_read_in_any_case(sdk: AsyncOpenAI) -> None:
    """From the SDK's raw response, from a plain mapping, or not at all."""
    raw = await sdk.chat.completions.with_raw_response.create(model=MODEL, messages=USER, extra_body=steering())
    assert decision_of(raw.headers) == "refuse"
    assert decision_of({"X-Trimtab-Decision": "off"}) == "off"
    assert decision_of({}) is None


async def test_samples_have_a_verdict_each(sdk: AsyncOpenAI) -> None:
    """With n above 1."""
    chat = await sdk.chat.completions.create(model=MODEL, messages=USER, n=2, extra_body=steering(mode="comply"))
    report = steering_of(chat)
    assert report is not None
    assert [verdict.refused for verdict in report.verdicts] == [False, False]


def test_nothing_told_is_none() -> None:
    """A report of none, a plain dictionary of another server, no object at all."""
    assert steering_of({"choices": []}) is None
    assert steering_of(None) is None


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"profile": "refusal-control", "mode": "refuse", "category": "Safety", "strength": 1.5, "scope": "all"},
        {"comply_below": 0.2, "refuse_above": 0.8, "graded": True, "category": ("Safety", "Political")},
        {"category_source": "refusal_tokens", "report": "full", "refuse_above": 1.0},
    ],
)
def test_what_is_built_is_what_the_server_takes(arguments: dict[str, Any]) -> None:
    """The server's own strict model takes it; what was left out is left to the profile."""
    built = steering(**arguments)["steering"]
    Steering.model_validate(built)
    assert set(built) == {"thresholds" if name in {"comply_below", "refuse_above"} else name for name in arguments}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "maybe"}, "mode must be one of 'auto'"),
        ({"scope": "prompt"}, "scope must be one of"),
        ({"report": "everything"}, "report must be one of"),
        ({"strength": 0.0}, "above 0"),
        ({"strength": float("nan")}, "above 0 and finite"),
        ({"strength": float("inf")}, "finite"),
        ({"comply_below": -0.1}, "probability"),
        ({"refuse_above": float("nan")}, "probability"),
        ({"comply_below": 0.7, "refuse_above": 0.3}, "must not be above"),
        ({"category": []}, "one or more"),
    ],
)
def test_what_every_server_refuses_is_refused_at_once(arguments: dict[str, Any], words: str) -> None:
    """Before anything is sent, by the name of the argument."""
    with pytest.raises(ValueError, match=words):
        steering(**arguments)


def test_it_needs_nothing_else() -> None:
    """A client without the engine can import it: no torch, vLLM, pydantic or SDK comes along."""
    script = (
        "import sys, steering.client; "
        "print(sorted({'torch', 'vllm', 'pydantic', 'openai', 'numpy', 'httpx', 'fastapi'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "[]"
