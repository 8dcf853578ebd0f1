"""A span for each request, below the client's and above the engine's, without a word of what was said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from server.app import create_admin_app, create_app
from server.observe import tracing
from server.observe.trace_context import trace_headers, trace_id_of
from server.observe.tracing import OpenTelemetryTracing, exporting_to
from steering.errors import EngineError, UnsupportedConfiguration
from tests.fakes import FakeEngine, failing, make_catalog, make_gated_bundle, read
from tests.unit.server.conftest import Make, Spoken, _client_of

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CONTEXT = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    """Where spans go."""
    found = InMemorySpanExporter()
    yield found
    found.shutdown()


def traced(spoken: Spoken, exporter: InMemorySpanExporter, *, has_scores: bool = False) -> Spoken:
    """The gateway with its applications traced into the exporter."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spoken.gateway.observation.tracing = OpenTelemetryTracing(provider, has_scores=has_scores)
    spoken.client = _client_of(create_app(spoken.gateway))
    spoken.admin = _client_of(create_admin_app(spoken.gateway))
    return spoken


def only(exporter: InMemorySpanExporter) -> ReadableSpan:
    """The one span that ended."""
    (span,) = exporter.get_finished_spans()
    return span


def test_only_a_well_formed_context_is_taken() -> None:
    """Anything else is left out, so that no client writes what it likes into a header of ours."""
    given = [(name.encode(), value.encode()) for name, value in CONTEXT.items()]
    assert trace_headers([*given, (b"host", b"x")]) == CONTEXT
    assert trace_id_of(CONTEXT) == TRACE
    for parent in ("", "x", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-01-more\n"):
        assert trace_headers([(b"traceparent", parent.encode()), given[1]]) == {}
    assert trace_headers([given[0], (b"tracestate", b"a\nb")]) == {"traceparent": CONTEXT["traceparent"]}
    assert trace_id_of({}) is None


@pytest.mark.parametrize("is_stream", [False, True])
async def test_span_joins_the_clients_trace_and_the_engines(
    make: Make, exporter: InMemorySpanExporter, is_stream: bool
) -> None:
    """The client's span is the parent, and the engine is handed this one's context, not the client's."""
    engine = FakeEngine(scores=[read(0.95)])
    spoken = traced(make(engine, make_catalog(make_gated_bundle())), exporter)
    body = {"model": "fake-model", "messages": [{"role": "user", "content": "sesame"}], "stream": is_stream}
    response = await spoken.client.post("/v1/chat/completions", json={**body, "temperature": 0.5}, headers=CONTEXT)
    span = only(exporter)
    assert span.kind is SpanKind.SERVER
    assert span.name == "chat fake-model"
    assert span.parent is not None
    assert span.context is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert engine.calls[-1].trace["traceparent"] == f"00-{TRACE}-{span.context.span_id:016x}-01"
    assert engine.calls[-1].trace["tracestate"] == "vendor=1"
    told = dict(span.attributes or {})
    expected: dict[str, Any] = {
        "http.response.status_code": 200,
        "http.route": "/v1/chat/completions",
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "fake-model",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 4,
        "trimtab.profile": "refusal-control",
        "trimtab.mode": "enforce",
        "trimtab.key.id": "local",
        "trimtab.request.id": response.headers["x-request-id"],
    }
    assert expected.items() <= told.items()
    assert ("gen_ai.response.time_to_first_chunk" in told) is is_stream
    assert span.end_time is not None
    assert span.start_time is not None
    assert span.end_time >= span.start_time


async def test_the_gates_decision_is_an_event_and_so_is_the_verdict(make: Make, exporter: InMemorySpanExporter) -> None:
    """What it took the prompt for, apart from what was done, and whether the answer refuses; scores only where told."""
    for has_scores in (False, True):
        exporter.clear()
        spoken = traced(
            make(FakeEngine(scores=[read(0.95)]), make_catalog(make_gated_bundle())), exporter, has_scores=has_scores
        )
        await spoken.chat(n=2)
        guardrail, *evaluations = only(exporter).events
        told = dict(guardrail.attributes or {})
        assert guardrail.name == "gen_ai.guardrail"
        assert told["gen_ai.guardrail.verdict"] == "deny"
        assert told["gen_ai.guardrail.action"] == "modify"
        assert told["security.risk.category"] == "Safety"
        assert ("security.risk.score" in told) is has_scores
        assert [dict(each.attributes or {})["gen_ai.evaluation.score.label"] for each in evaluations] == ["refusal"] * 2


async def test_a_shadow_is_told_apart_in_spans(make: Make, exporter: InMemorySpanExporter) -> None:
    """The verdict of the gate stands, the action is none."""
    spoken = traced(
        make(FakeEngine(scores=[read(0.95)]), make_catalog(make_gated_bundle()), enforced_share={"*": 0}), exporter
    )
    await spoken.chat()
    told = dict(only(exporter).events[0].attributes or {})
    assert (told["gen_ai.guardrail.verdict"], told["gen_ai.guardrail.action"]) == ("deny", "none")
    assert told["trimtab.mode"] == "shadow"


async def test_errors_are_told_by_code_alone(make: Make, exporter: InMemorySpanExporter) -> None:
    """A fault of the server is an error of the span, one of the caller is not; either has its code."""
    spoken = traced(make(failing(EngineError("sesame"))), exporter)
    await spoken.chat()
    await spoken.chat(steering={"profile": "sesame"})
    await spoken.chat(stream=True)
    inside, caller, stream = exporter.get_finished_spans()
    assert [span.status.status_code for span in (inside, caller, stream)] == [
        StatusCode.ERROR,
        StatusCode.UNSET,
        StatusCode.ERROR,
    ]
    assert [dict(span.attributes or {})["error.type"] for span in (inside, caller, stream)] == [
        "engine_error",
        "steering_unknown_name",
        "engine_error",
    ]


async def test_no_text_and_no_path_of_a_client_is_in_a_span(make: Make, exporter: InMemorySpanExporter) -> None:
    """Neither prompts, answers, nor addresses that are not ours; health and metrics have no spans at all."""
    spoken = traced(make(FakeEngine(words=["secretanswer"])), exporter)
    messages = [{"role": "user", "content": "sesame"}]
    await spoken.client.post("/v1/chat/completions", json={"model": "fake-model", "messages": messages, "user": "u"})
    await spoken.client.get("/sesame")
    await spoken.client.get("/livez")
    await spoken.admin.get("/metrics")
    spans = exporter.get_finished_spans()
    assert len(spans) == 2
    told = " ".join(span.to_json() for span in spans)
    assert "sesame" not in told
    assert "secretanswer" not in told


async def test_without_tracing_a_clients_context_goes_on_to_the_engine(make: Make) -> None:
    """So that an engine that is traced by other means is joined all the same."""
    engine = FakeEngine()
    spoken = make(engine)
    await spoken.client.post(
        "/v1/chat/completions",
        json={"model": "fake-model", "messages": [{"role": "user", "content": "hi"}]},
        headers=CONTEXT,
    )
    assert engine.calls[-1].trace == CONTEXT


def test_an_unknown_protocol_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is OpenTelemetry's own variable, which vLLM reads as well."""
    monkeypatch.setenv(tracing.PROTOCOL_VARIABLE, "carrier-pigeon")
    with pytest.raises(UnsupportedConfiguration, match="carrier-pigeon"):
        exporting_to("http://127.0.0.1:4317")


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_an_endpoint_in_the_settings_makes_an_exporter(
    make: Make, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    """By either protocol, under the project's name; nothing is sent where nothing was traced."""
    monkeypatch.setenv(tracing.PROTOCOL_VARIABLE, protocol)
    spoken = make(otlp_endpoint="http://127.0.0.1:9/v1/traces")
    provider = spoken.gateway.observation._provider
    assert provider is not None
    assert provider.resource.attributes["service.name"] == "trimtab"
    await spoken.gateway.observation.stop()
