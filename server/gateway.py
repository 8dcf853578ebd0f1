"""The gateway: what every route works with.

Knows nothing of vLLM or torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from server.access.caller import LOCAL, Caller
from server.catalog import LiveCatalog
from server.engine import Engine
from server.observe.metrics import Metrics
from server.observe.observation import Observation
from server.service import Service
from server.settings import Settings
from steering.errors import EngineDied, EngineOverloaded


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
    observation: Observation
    is_armed: bool = False

    def admit(self, request: Request) -> Caller:
        """Who sent a request, where whoever it was may send one now; notes it in the request's facts."""
        caller = LOCAL
        request.scope["trimtab"].key_id = caller.key_id
        return caller

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
