"""What is counted, read by Prometheus' own parser."""

from __future__ import annotations

import logging

import pytest

from steering.errors import EngineError
from tests.fakes import FakeEngine, failing, make_bundle
from tests.unit.server.conftest import Make, scrape, value


async def test_decisions_outcomes_and_tokens_are_counted(make: Make) -> None:
    """Refusals by category come from refusal tokens, decisions from what was done, tokens by steered or not."""
    spoken = make()
    await spoken.chat()
    await spoken.chat(n=2, steering={"mode": "comply"})
    await spoken.chat(steering={"mode": "refuse", "category": "Political"}, stream=True)
    await spoken.chat(n=0)
    found = await scrape(spoken)
    assert value(found, "steering_decisions_total", decision="off", category="none") == 1
    assert value(found, "steering_decisions_total", decision="comply", category="Safety") == 1
    assert value(found, "steering_decisions_total", decision="refuse", category="Political") == 1
    refusal = {"outcome": "refusal", "detector": "refusal_token", "category": "Safety"}
    assert value(found, "steering_outcomes_total", decision="off", **refusal) == 1
    assert value(found, "steering_outcomes_total", decision="refuse", **refusal) == 1
    assert value(found, "steering_outcomes_total", decision="comply", outcome="comply") == 2
    assert value(found, "steering_tokens_total", kind="completion", steered="true") == 12
    assert value(found, "steering_tokens_total", kind="prompt", steered="false") == 5
    assert value(found, "steering_tokens_total", kind="completion", decision="comply") == 8
    assert value(found, "steering_tokens_total", kind="completion", decision="refuse", steered="true") == 4
    assert value(found, "steering_tokens_total", kind="prompt", decision="off") == 5
    assert value(found, "steering_requests_total", endpoint="/v1/chat/completions", status="200") == 3
    assert value(found, "steering_requests_total", profile="none", status="400") == 1
    assert value(found, "steering_time_to_first_token_seconds_count", steered="true") == 1
    assert value(found, "steering_time_to_first_token_seconds_count", endpoint="/v1/chat/completions") == 1
    assert value(found, "steering_request_duration_seconds_count", endpoint="/v1/chat/completions") == 4
    assert value(found, "steering_inflight_requests") == 0


async def test_versions_bundles_and_the_engines_own_metrics_are_there(make: Make) -> None:
    """One scrape shows what is loaded, and vLLM's series beside ours."""
    found = await scrape(make())
    assert value(found, "steering_bundle_info", bundle=make_bundle().label, transferred="false") == 1
    assert value(found, "steering_build_info") == 1
    assert value(found, "steering_ready") == 1
    assert value(found, "steering_unapplied_total") == 0
    assert "vllm:num_requests_running" in found


async def test_errors_are_outcomes_too(make: Make) -> None:
    """A request that fails inside is an outcome of its own, so that rates keep their denominator."""
    spoken = make(failing(EngineError("x")))
    await spoken.chat(steering={"mode": "comply"})
    found = await scrape(spoken)
    assert value(found, "steering_outcomes_total", decision="comply", outcome="error") == 1
    assert value(found, "steering_requests_total", profile="refusal-control", status="500") == 1


async def test_nothing_a_client_writes_becomes_a_label(make: Make) -> None:
    """Unknown profiles, categories and paths make no new series."""
    spoken = make()
    await spoken.chat(steering={"profile": "evil"})
    await spoken.chat(steering={"mode": "refuse", "category": "evil"})
    await spoken.client.get("/evil")
    await spoken.client.get("/v1/models/evil")
    assert "evil" not in (await spoken.admin.get("/metrics")).text


async def test_log_line_names_the_request_and_holds_no_text(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """One line per request, with the client's own id where it is harmless, and never a prompt or an answer."""
    spoken = make(FakeEngine())
    with caplog.at_level(logging.INFO, logger="trimtab"):
        await spoken.client.post(
            "/v1/chat/completions",
            json={"model": "fake-model", "messages": [{"role": "user", "content": "sesame"}], "steering": "x"},
            headers={"X-Request-Id": "abc-1"},
        )
        await spoken.client.get("/v1/models", headers={"X-Request-Id": "a b;c"})
    first, second = [record.getMessage() for record in caplog.records if record.name == "trimtab"]
    assert "client_id=abc-1" in first
    assert "status=400" in first
    assert "sesame" not in first
    assert "client_id=- " in second
