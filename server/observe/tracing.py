"""Tracing: a span for every request, joined with the client's above it and the engine's below it.

OpenTelemetry is imported only where an endpoint is configured. What a span says is in `conventions.py`, and holds no
text. Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from server.observe.conventions import attributes_of, events_of, name_of, request_attributes
from server.observe.events import Ended
from steering import __version__
from steering.errors import UnsupportedConfiguration

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

PROTOCOL_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
"""OpenTelemetry's own, which vLLM reads as well: `grpc`, its default, or `http/protobuf`."""


EXPORT_SECONDS = 3.0
"""For a batch of spans, its retries included: a collector that is gone must not keep a server from its end."""


class Trace(Protocol):
    """One request's part of a trace."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Trace context for whoever works on the request; empty where there is none."""
        ...

    def end(self, request_id: str, status: int, error: str | None, event: Ended | None) -> None:
        """The request is over.

        Args:
            request_id: ours.
            status: of HTTP.
            error: code, where there was one.
            event: what is known of it where it reached the engine.
        """
        ...


class Tracing(Protocol):
    """Where spans go."""

    def begin(self, endpoint: str, method: str, headers: Mapping[str, str]) -> Trace:
        """A request has come.

        Args:
            endpoint: its path, as a label value.
            method: of HTTP.
            headers: trace context it came with.
        """
        ...


class _Untraced:
    def __init__(self, headers: Mapping[str, str]) -> None:
        self.headers = headers

    def end(self, request_id: str, status: int, error: str | None, event: Ended | None) -> None:
        """Nothing is told."""


class NoTracing:
    """No spans; a client's trace context goes on to the engine as it is."""

    def begin(self, endpoint: str, method: str, headers: Mapping[str, str]) -> Trace:  # noqa: ARG002 - the seam's
        """See `Tracing`."""
        return _Untraced(headers)


class OpenTelemetryTracing:
    """Spans by OpenTelemetry.

    Args:
        provider: exports them; closed by whoever made it.
        has_scores: spans tell what probes read.
    """

    def __init__(self, provider: TracerProvider, *, has_scores: bool = False) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("trimtab", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._has_scores = has_scores

    def begin(self, endpoint: str, method: str, headers: Mapping[str, str]) -> Trace:
        """See `Tracing`."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, set_span_in_context

        # An empty context, not the current one: nothing of one request may become the parent of another.
        above = self._propagator.extract(headers, context=Context())
        span = self._tracer.start_span(
            f"{method} {endpoint}",
            context=above,
            kind=SpanKind.SERVER,
            attributes=request_attributes(endpoint, method),
        )
        carried: dict[str, str] = {}
        self._propagator.inject(carried, context=set_span_in_context(span, Context()))
        return _Spanned(span, carried, endpoint, has_scores=self._has_scores)


class _Spanned:
    def __init__(self, span: Span, headers: Mapping[str, str], endpoint: str, *, has_scores: bool) -> None:
        self.headers = headers
        self._span = span
        self._endpoint = endpoint
        self._has_scores = has_scores
        self._began = time.time_ns()

    def end(self, request_id: str, status: int, error: str | None, event: Ended | None) -> None:
        """See `Trace`."""
        from opentelemetry.trace import StatusCode

        span = self._span
        span.set_attributes(attributes_of(request_id, status, error, event))
        if event is not None:
            span.update_name(name_of(self._endpoint, event))
            for found in events_of(event, has_scores=self._has_scores):
                span.add_event(found.name, found.attributes, timestamp=self._at(found.seconds))
        if status >= 500 or (error is not None and status < 400):
            span.set_status(StatusCode.ERROR, error)
        span.end()

    def _at(self, seconds: float | None) -> int | None:
        """So long after the request came, in nanoseconds since 1970; None is now."""
        return None if seconds is None else self._began + int(seconds * 1e9)


def exporting_to(endpoint: str) -> TracerProvider:
    """A provider that sends its spans to a collector, batched in a thread of its own.

    Raises:
        UnsupportedConfiguration: OpenTelemetry is not installed, or the protocol is not one of the two.
    """
    protocol = os.environ.get(PROTOCOL_VARIABLE, "grpc")
    timeout = None if "OTEL_EXPORTER_OTLP_TIMEOUT" in os.environ else EXPORT_SECONDS
    exporter: Any
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

            exporter = GrpcExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=timeout)
        elif protocol == "http/protobuf":
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

            exporter = HttpExporter(endpoint=endpoint, timeout=timeout)
        else:
            raise UnsupportedConfiguration(
                f"{PROTOCOL_VARIABLE} is {protocol!r}; vLLM and the gateway send spans by 'grpc' or 'http/protobuf'"
            )
    except ImportError as error:
        raise UnsupportedConfiguration(
            f"TRIMTAB_OTLP_ENDPOINT needs opentelemetry-sdk and opentelemetry-exporter-otlp: {error}"
        ) from error
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    own = {"service.version": __version__} | ({} if named else {"service.name": "trimtab"})
    resource = Resource.create(own)
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
