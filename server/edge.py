"""The edge: the outermost ASGI layer, which names, times, traces, counts and logs every request.

Pure ASGI: a framework's middleware base class would stand between a stream and its client's disconnect.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access.caller import Caller
from server.observe.events import Ended
from server.observe.ledger import Ledger
from server.observe.log import FACTS, Line, facts_of
from server.observe.metrics import NONE, Metrics, flag
from server.observe.stages import Stages
from server.observe.trace_context import trace_headers, trace_id_of
from server.observe.tracing import NoTracing, Trace, Tracing

ENDPOINTS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/models",
        "/v1/steering",
        "/v1/steering/probe",
        "/tokenize",
        "/admin/bundles",
        "/admin/bundles/load",
        "/admin/bundles/unload",
        "/admin/bundles/verify",
        "/livez",
        "/health",
        "/readyz",
        "/metrics",
    }
)
"""Paths that are label values of their own."""

QUIET = frozenset({"/livez", "/health", "/readyz", "/metrics"})
"""Those that are asked all the time, and neither logged nor traced."""

_CLIENT_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_log = logging.getLogger("trimtab")


@dataclass(slots=True, kw_only=True)
class Facts:
    """What is known of a request in the end; `scope["trimtab"]`, filled in by the routes.

    Attributes:
        caller: who sent it, once that is known.
        key_id: of the API key it came with.
        decision: as the client is told it.
        error: code of the error it was answered with; None where there was none.
        headers: sent with whatever is answered.
        on_end: called once the answer was sent or given up.
        stages: those outside of the service.
        trace: headers of W3C's trace context for whoever works on the request.
    """

    request_id: str
    caller: Caller | None = None
    key_id: str = NONE
    profile: str = NONE
    decision: str = NONE
    is_steered: bool = False
    status: int = 500
    error: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    on_end: list[Callable[[], None]] = field(default_factory=list)
    stages: Stages = field(default_factory=Stages)
    trace: Mapping[str, str] = field(default_factory=dict)


class Edge:
    """Wraps the application.

    Args:
        app: the application.
        metrics: where requests are counted.
        ledger: what the service tells of them.
        tracing: where spans go.
        logs_scores: lines of requests tell what probes read.
        hash_of: the keyed hash of a prompt, by which lines of one prompt can be told to be of one; None for no hash.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        ledger: Ledger | None = None,
        *,
        tracing: Tracing | None = None,
        logs_scores: bool = False,
        hash_of: Callable[[object], str] | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._ledger = Ledger() if ledger is None else ledger  # an empty one is false
        self._tracing = tracing or NoTracing()
        self._logs_scores = logs_scores
        self._hash_of = hash_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection scope; only HTTP is counted."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        endpoint = endpoint_of(scope["path"])
        facts = Facts(request_id=secrets.token_hex(16))
        trace = None
        if endpoint not in QUIET:
            trace = self._tracing.begin(endpoint, scope["method"], trace_headers(scope["headers"]))
            facts.trace = trace.headers
        scope["trimtab"] = facts
        name = b"req_" + facts.request_id.encode()

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                facts.status = message["status"]
                taken = f"{(time.perf_counter() - began) * 1000:.0f}".encode()
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", name),
                    (b"openai-processing-ms", taken),
                    *((key.encode(), value.encode()) for key, value in facts.headers.items()),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        finally:
            for call in facts.on_end:
                call()
            self._end(scope, facts, endpoint, time.perf_counter() - began, trace)

    def _end(self, scope: Scope, facts: Facts, endpoint: str, seconds: float, trace: Trace | None) -> None:
        event = self._ledger.take(facts.request_id)
        if facts.error is None and event is not None and event.error is not None:
            facts.error = event.error.code
        metrics = self._metrics
        metrics.requests.labels(endpoint, metrics.labels.profile(facts.profile), str(facts.status)).inc()
        took = metrics.duration.labels(endpoint, flag(facts.is_steered))
        took.observe(seconds, metrics.exemplar(facts.trace))
        metrics.took(facts.stages)
        if facts.error is not None:
            metrics.failed(facts.error)
        if trace is None:
            return
        trace.end(facts.request_id, facts.status, facts.error, event)
        if _log.isEnabledFor(logging.INFO):
            told = self._told(scope, facts, endpoint, seconds, event)
            _log.info("%s", Line(told), extra={FACTS: told})

    def _told(self, scope: Scope, facts: Facts, endpoint: str, seconds: float, event: Ended | None) -> dict[str, Any]:
        """What the line of a request tells; never what was asked or answered."""
        told: dict[str, Any] = {
            "event": "request",
            "id": f"req_{facts.request_id}",
            "client_id": _client_id(scope),
            "trace_id": trace_id_of(facts.trace),
            "key": facts.key_id,
            "endpoint": endpoint,
            "status": facts.status,
            "error": facts.error,
            "profile": facts.profile,
            "decision": facts.decision,
        }
        stages = dict(facts.stages)
        if event is not None:
            told |= facts_of(event, has_scores=self._logs_scores)
            if self._hash_of is not None:
                told["prompt_hmac"] = self._hash_of(event.generation.prompt)
            stages |= event.stages
        milliseconds = {stage.value: round(taken * 1000, 2) for stage, taken in stages.items()}
        return told | {"seconds": round(seconds, 4), "stages_ms": milliseconds or None}


def endpoint_of(path: str) -> str:
    """The path as a label value."""
    return path if path in ENDPOINTS else "/v1/models" if path.startswith("/v1/models/") else "other"


def _client_id(scope: Scope) -> str:
    """The client's own X-Request-Id, for the log alone; `-` when there is none, or one that could break a log line."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if _CLIENT_ID.fullmatch(given) else "-"
