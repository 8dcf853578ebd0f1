"""Exemplars: durations name the trace of a request that took as long, where traces go somewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from server.observe.build import UNKNOWN, commit_of
from server.observe.open_metrics import TYPE
from server.observe.trace_context import exemplar_of
from tests.fakes import FakeEngine
from tests.unit.server.conftest import Make, Spoken

TRACE, SPAN = "a" * 32, "b" * 16
CONTEXT = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
SERIES = ("steering_request_duration_seconds", "steering_time_to_first_token_seconds")


async def exemplars(spoken: Spoken) -> dict[str, dict[str, str]]:
    """Those of a scrape that asks for OpenMetrics, by series; asserts that its own parser reads it whole."""
    answer = await spoken.admin.get("/metrics", headers={"accept": f"{TYPE};version=1.0.0,text/plain;q=0.5"})
    assert answer.headers["content-type"].startswith(TYPE)
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert "vllm:num_requests_running" in families
    return {
        name: sample.exemplar.labels
        for name in SERIES
        for sample in families[name].samples
        if sample.exemplar is not None and sample.labels["endpoint"] == "/v1/chat/completions"
    }


async def test_durations_name_a_request_that_took_as_long(make: Make) -> None:
    """By the ids of its trace and span, in the bucket that it fell into; of no request that is not sampled."""
    spoken = make(FakeEngine())
    spoken.gateway.metrics.has_exemplars = True
    body = {"model": "fake-model", "messages": [{"role": "user", "content": "x"}], "stream": True}
    unsampled = {"traceparent": f"00-{'c' * 32}-{SPAN}-00"}
    for headers in (unsampled, {}):
        await spoken.client.post("/v1/chat/completions", json=body, headers=headers)
    assert await exemplars(spoken) == {}
    await spoken.client.post("/v1/chat/completions", json=body, headers=CONTEXT)
    assert await exemplars(spoken) == {name: {"trace_id": TRACE, "span_id": SPAN} for name in SERIES}


@pytest.mark.parametrize(("has_exemplars", "accept"), [(False, TYPE), (True, "text/plain"), (True, "*/*")])
async def test_the_text_format_stays_where_there_is_nothing_to_gain(
    make: Make, has_exemplars: bool, accept: str
) -> None:
    """Without traces, or where it is not asked for; then without exemplars, which it does not have."""
    spoken = make(FakeEngine())
    spoken.gateway.metrics.has_exemplars = has_exemplars
    await spoken.client.get("/v1/models", headers=CONTEXT)
    answer = await spoken.admin.get("/metrics", headers={"accept": accept})
    assert answer.headers["content-type"].startswith("text/plain")
    assert TRACE not in answer.text
    assert "# EOF" not in answer.text


async def test_they_come_with_the_collector(make: Make) -> None:
    """Where spans are sent somewhere, exemplars are on; a sampled trace is the least that one needs."""
    assert make(otlp_endpoint="http://127.0.0.1:9").gateway.metrics.has_exemplars
    assert not make().gateway.metrics.has_exemplars
    assert exemplar_of({"traceparent": "nonsense"}) is None


def test_the_commit_of_a_checkout_is_read(tmp_path: Path) -> None:
    """On a branch, on one whose commit is packed, on none, in another working tree; and nothing that is no commit."""
    first, second = "1" * 40, "2" * 40
    git = tmp_path / ".git"
    assert commit_of(tmp_path) == UNKNOWN
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert commit_of(tmp_path) == UNKNOWN
    (git / "packed-refs").write_text(f"# pack-refs with: peeled\n{first} refs/heads/main\n")
    assert commit_of(tmp_path) == first
    (git / "refs" / "heads" / "main").write_text(f"{second}\n")
    assert commit_of(tmp_path) == second
    (git / "HEAD").write_text(f"{first}\n")
    assert commit_of(tmp_path) == first
    other, kept = tmp_path / "other", git / "worktrees" / "other"
    other.mkdir()
    kept.mkdir(parents=True)
    (other / ".git").write_text(f"gitdir: {kept}\n")
    (kept / "HEAD").write_text("ref: refs/heads/main\n")
    (kept / "commondir").write_text("../..\n")
    assert commit_of(other) == second
    (kept / "HEAD").write_text("ref: refs/heads/<script>\n")
    assert commit_of(other) == UNKNOWN


@pytest.mark.parametrize("told", ["3" * 40, "v1.2-dirty"])
async def test_the_build_is_told(make: Make, told: str) -> None:
    """What an image was made from is a setting of it."""
    spoken = make(commit=told)
    assert f'commit="{told}"' in (await spoken.admin.get("/metrics")).text
