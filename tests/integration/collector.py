"""A collector of spans in the test's own process, by gRPC: what OpenTelemetry and vLLM speak unless told otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

PATIENCE = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A span as it arrived: ids in hexadecimal digits, and `service` is what whoever sent it calls itself."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]
    raw: str


@dataclass
class Collector(TraceServiceServicer):  # type: ignore[misc] # generated, without annotations
    """Takes every span that is sent.

    Attributes:
        url: where to send them.
        spans: in the order in which they came.
    """

    url: str = ""
    spans: list[Span] = field(default_factory=list)

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the service's own name
        """The service's one method."""
        for sender in request.resource_spans:
            service = _read(sender.resource.attributes).get("service.name", "")
            for scope in sender.scope_spans:
                self.spans.extend(_span(service, each) for each in scope.spans)
        return ExportTraceServiceResponse()

    def wait_for(self, count: int, wanted: Callable[[Span], bool]) -> list[Span]:
        """The spans that are wanted, once there are so many."""
        deadline = time.monotonic() + PATIENCE
        while len(found := [span for span in self.spans if wanted(span)]) < count:
            assert time.monotonic() < deadline, f"of {count} spans came {found}; in all {[s.name for s in self.spans]}"
            time.sleep(0.05)
        return found


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port of this machine, until the block ends."""
    server = grpc.server(ThreadPoolExecutor(2))
    port = server.add_insecure_port("127.0.0.1:0")
    collector = Collector(url=f"http://127.0.0.1:{port}")
    add_TraceServiceServicer_to_server(collector, server)
    server.start()
    try:
        yield collector
    finally:
        server.stop(grace=1).wait()


def _span(service: str, span: Any) -> Span:
    return Span(
        service=service,
        name=span.name,
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        attributes=_read(span.attributes),
        raw=str(span),
    )


def _read(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value") or "string_value") for each in attributes}
