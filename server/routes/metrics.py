"""Metrics in Prometheus' text format; on the admin port."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.gateway import GatewayDep
from server.observe.open_metrics import END, TYPE

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request, gateway: GatewayDep) -> Response:
    """The gateway's metrics, then the engine's; as OpenMetrics where there are exemplars and it is asked for."""
    gateway.metrics.ready.set(int(gateway.is_ready))
    is_open = gateway.metrics.has_exemplars and TYPE in request.headers.get("accept", "")
    told = gateway.metrics.exposition(is_open=is_open) + gateway.engine.exposition(is_open=is_open)
    if is_open:
        return Response(told + END, media_type=f"{TYPE}; version=1.0.0; charset=utf-8")
    return Response(told, media_type="text/plain; version=1.0.0; charset=utf-8")
