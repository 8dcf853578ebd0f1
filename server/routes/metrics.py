"""Metrics in Prometheus' text format; on the admin port."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from server.gateway import GatewayDep

router = APIRouter()


@router.get("/metrics")
async def metrics(gateway: GatewayDep) -> Response:
    """The gateway's metrics, then the engine's."""
    gateway.metrics.ready.set(int(gateway.is_ready))
    return Response(
        gateway.metrics.exposition() + gateway.engine.exposition(),
        media_type="text/plain; version=1.0.0; charset=utf-8",
    )
