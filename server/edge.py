"""The edge: the outermost ASGI layer, which names, times, counts and logs every request.

Pure ASGI: a framework's middleware base class would stand between a stream and its client's disconnect.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.observe.metrics import NONE, Metrics, flag

ENDPOINTS = frozenset(
    {"/v1/chat/completions", "/v1/models", "/v1/steering", "/livez", "/health", "/readyz", "/metrics"}
)
"""Paths that are label values of their own."""

_CLIENT_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_log = logging.getLogger("trimtab")


@dataclass(slots=True, kw_only=True)
class Facts:
    """What is known of a request in the end; `scope["trimtab"]`, filled in by the routes.

    Attributes:
        key_id: of the API key it came with.
        headers: sent with whatever is answered.
        on_end: called once the answer was sent or given up.
    """

    request_id: str
    key_id: str = NONE
    profile: str = NONE
    decision: str = NONE
    is_steered: bool = False
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    on_end: list[Callable[[], None]] = field(default_factory=list)


class Edge:
    """Wraps the application.

    Args:
        app: the application.
        metrics: where requests are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection scope; only HTTP is counted."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        facts = Facts(request_id=secrets.token_hex(16))
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
            self._count(scope, facts, time.perf_counter() - began)

    def _count(self, scope: Scope, facts: Facts, seconds: float) -> None:
        path = scope["path"]
        endpoint = path if path in ENDPOINTS else "/v1/models" if path.startswith("/v1/models/") else "other"
        self._metrics.requests.labels(endpoint, facts.profile, str(facts.status)).inc()
        self._metrics.duration.labels(endpoint, flag(facts.is_steered)).observe(seconds)
        if _log.isEnabledFor(logging.INFO) and endpoint not in ("/livez", "/health", "/readyz", "/metrics"):
            _log.info(
                "request id=req_%s client_id=%s key=%s endpoint=%s status=%d profile=%s decision=%s seconds=%.3f",
                facts.request_id,
                _client_id(scope),
                facts.key_id,
                endpoint,
                facts.status,
                facts.profile,
                facts.decision,
                seconds,
            )


def _client_id(scope: Scope) -> str:
    """The client's own X-Request-Id, for the log alone; `-` when there is none, or one that could break a log line."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if _CLIENT_ID.fullmatch(given) else "-"
