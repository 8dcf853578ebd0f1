"""Observation: all that looks at requests from beside them, made from the settings and begun with the server.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from server.catalog import LiveCatalog
from server.engine import Engine
from server.observe.canary import SHIPPED, Canary, CanaryOrder, read_prompts
from server.observe.drift import ProbeDrift
from server.observe.events import Observer
from server.observe.judging import JudgeOrder, Judging, open_judge
from server.observe.ledger import Ledger
from server.observe.metrics import Metrics
from server.observe.reference import read_references
from server.observe.tracing import NoTracing, OpenTelemetryTracing, Tracing, exporting_to
from server.service import Service
from steering.errors import UnsupportedConfiguration

if TYPE_CHECKING:
    from server.settings import Settings


class Observation:
    """What observes.

    Args:
        settings: which of it there is.
        metrics: where it counts.
        catalog: in force.

    Attributes:
        ledger: told by the service, read by the edge.
        tracing: where spans go.
        judging: None where no judge is configured.
        canary: None where none is configured, and before the start.

    Raises:
        OperatorError: a setting or a file that it names cannot be used.
    """

    def __init__(self, settings: Settings, metrics: Metrics, catalog: LiveCatalog) -> None:
        self.ledger = Ledger()
        self.tracing: Tracing = NoTracing()
        self.judging: Judging | None = None
        self.canary: Canary | None = None
        self._metrics = metrics
        self._provider = None
        if settings.otlp_endpoint is not None:
            self._provider = exporting_to(settings.otlp_endpoint)
            self.tracing = OpenTelemetryTracing(self._provider, has_scores=settings.log_scores)
        references = {} if settings.drift_reference is None else read_references(settings.drift_reference)
        self._drift = ProbeDrift(catalog, metrics.labels, references)
        metrics.registry.register(self._drift)
        order = judge_order(settings)
        if order is not None:
            order.check(catalog.now)
            self.judging = Judging(order, open_judge(order), metrics.registry, metrics.labels)
        self._canary_order = canary_order(settings)
        if self._canary_order is not None:
            self._canary_order.check(catalog.now.profile_names)

    @property
    def observers(self) -> Sequence[Observer]:
        """Who is to be told of requests that have ended."""
        found: list[Observer] = [self.ledger, self._drift]
        return found if self.judging is None else [*found, self.judging]

    async def start(self, engine: Engine, service: Service, catalog: LiveCatalog) -> None:
        """Begin; requests are taken from now on."""
        metrics = self._metrics
        metrics.rows_limit.set(min((report.rows for report in await engine.reports()), default=0))
        if self.judging is not None:
            self.judging.start()
        if self._canary_order is not None:
            judge = None if self.judging is None else self.judging.outcome_of
            self.canary = Canary(
                self._canary_order, service, catalog, engine.model.name, metrics.registry, metrics.labels, judge
            )
            self.canary.start()

    async def stop(self) -> None:
        """End, and send what is not sent yet."""
        for part in (self.canary, self.judging):
            if part is not None:
                await part.stop()
        if self._provider is not None:
            await asyncio.to_thread(self._provider.shutdown)  # which waits for the last spans to be sent


def judge_order(settings: Settings) -> JudgeOrder | None:
    """The judge that is configured, if one is.

    Raises:
        UnsupportedConfiguration: half of what names one is missing.
    """
    if (settings.judge_url is None) != (settings.judge_model is None):
        raise UnsupportedConfiguration("TRIMTAB_JUDGE_URL and TRIMTAB_JUDGE_MODEL go together")
    if settings.judge_url is None or settings.judge_model is None:
        return None
    return JudgeOrder(
        url=settings.judge_url,
        model=settings.judge_model,
        key="unused" if settings.judge_api_key is None else settings.judge_api_key.get_secret_value(),
        rates=settings.judge_rates,
        profiles=frozenset(settings.judge_profiles),
        calibration=settings.judge_calibration,
        per_minute=settings.judge_per_minute,
    )


def canary_order(settings: Settings) -> CanaryOrder | None:
    """The canary that is configured, if one is.

    Raises:
        OperatorError: its prompts cannot be used.
    """
    if not settings.canary_interval:
        return None
    return CanaryOrder(
        prompts=read_prompts(settings.canary_prompts or SHIPPED),
        interval=settings.canary_interval,
        profiles=settings.canary_profiles,
        most_inflight=settings.canary_most_inflight,
    )
