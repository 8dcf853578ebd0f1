"""Observation: all that looks at requests from beside them, made from the settings and begun with the server.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from server.catalog import LiveCatalog
from server.engine import Engine
from server.observe.events import Observer
from server.observe.ledger import Ledger
from server.observe.metrics import Metrics
from server.observe.tracing import NoTracing, OpenTelemetryTracing, Tracing, exporting_to

if TYPE_CHECKING:
    from server.service import Service
    from server.settings import Settings


class Observation:
    """What observes.

    Args:
        settings: which of it there is.
        metrics: where it counts.

    Attributes:
        ledger: told by the service, read by the edge.
        tracing: where spans go.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.ledger = Ledger()
        self.tracing: Tracing = NoTracing()
        self._metrics = metrics
        self._provider = None
        if settings.otlp_endpoint is not None:
            self._provider = exporting_to(settings.otlp_endpoint)
            self.tracing = OpenTelemetryTracing(self._provider, has_scores=settings.log_scores)

    @property
    def observers(self) -> Sequence[Observer]:
        """Who is to be told of requests that have ended."""
        return (self.ledger,)

    async def start(self, engine: Engine, service: Service, catalog: LiveCatalog) -> None:  # noqa: ARG002
        """Begin; requests are taken from now on."""
        self._metrics.rows_limit.set(min((report.rows for report in await engine.reports()), default=0))

    async def stop(self) -> None:
        """End, and send what is not sent yet."""
        if self._provider is not None:
            self._provider.shutdown()
