"""The gateway: what every route works with.

Knows nothing of vLLM or torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from server.access.admission import Admission
from server.access.audit import AuditLog
from server.access.caller import Caller
from server.bundles import Bundles
from server.catalog import LiveCatalog
from server.engine import Engine
from server.heartbeat import Heartbeat
from server.observe.metrics import Metrics
from server.observe.observation import Observation
from server.service import Service
from server.settings import Settings
from steering.errors import EngineDied, EngineOverloaded, TrimtabError


@dataclass(slots=True, kw_only=True)
class Gateway:
    """What the routes share: one engine, one catalog, one service.

    Attributes:
        is_armed: the self-check has passed.
    """

    engine: Engine
    catalog: LiveCatalog
    service: Service
    metrics: Metrics
    settings: Settings
    admission: Admission
    observation: Observation
    bundles: Bundles
    heartbeat: Heartbeat
    is_armed: bool = False

    def admit(self, request: Request) -> Caller:
        """Who sent a request, where whoever it was may send one now; notes it in the request's facts.

        Costs the key one request, however often it is called for the same one.

        Raises:
            Rejection: without a known key, or with one whose limits are used up.
        """
        return self.admission.admit(request.headers.getlist("authorization"), request.scope["trimtab"])

    def admit_operator(self, request: Request) -> Caller:
        """Who sent a request for administration, where whoever it was may administrate."""
        return self.admission.admit_operator(request.headers.getlist("authorization"), request.scope["trimtab"])

    @property
    def audit(self) -> AuditLog | None:
        """Where acts of administration are put on record before they are done; None for nowhere."""
        return self.admission.audit

    @property
    def signature_state(self) -> str:
        """Of every bundle that passed the checks: `verified`, or `unchecked` where no signature is asked for."""
        return "verified" if self.settings.require_signature else "unchecked"

    @property
    def is_ready(self) -> bool:
        """Whether `check_healthy` passes."""
        try:
            self.check_healthy()
        except TrimtabError:
            return False
        return True

    def check_healthy(self) -> None:
        """Raise what keeps balancers from sending requests here: as `check_ready`, or the engine gives no tokens.

        Requests that come all the same are taken: each finds out for itself.

        Raises:
            EngineDied: the engine is gone.
            EngineOverloaded: still checking itself, about to shut down, or waiting for a token.
        """
        self.check_ready()
        if self.service.is_leaving:
            raise EngineOverloaded("this server is shutting down", code="draining")
        if self.heartbeat.failure is not None:
            raise EngineOverloaded(
                f"the engine does not answer this server's own requests: {self.heartbeat.failure.message}",
                code="not_ready",
            )

    def check_live(self) -> None:
        """Raise what only a restart can heal.

        Raises:
            EngineDied: the engine is gone, or has given no token for long.
        """
        if not self.engine.is_alive:
            raise EngineDied("the engine is gone; this server must be started again")
        if self.heartbeat.is_lost:
            raise EngineDied("the engine has given no token for long; this server must be started again")

    def check_ready(self) -> None:
        """Raise what keeps this server from taking requests.

        Raises:
            EngineDied: the engine is gone.
            EngineOverloaded: still checking itself, or shutting down.
        """
        if not self.engine.is_alive:
            raise EngineDied("the engine is gone; this server must be started again")
        if not self.is_armed:
            raise EngineOverloaded("this server is still checking that its edits work", code="not_ready")
        if self.service.is_draining:
            raise EngineOverloaded("this server is shutting down", code="draining")


def gateway_of(request: Request) -> Gateway:
    """The gateway of the application that serves this request."""
    gateway: Gateway = request.app.state.gateway
    return gateway


GatewayDep = Annotated[Gateway, Depends(gateway_of)]
