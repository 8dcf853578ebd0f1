"""Health: whether this server lives, and whether it takes requests."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from server.answers import JsonAnswer
from server.gateway import GatewayDep

router = APIRouter()


@router.get("/livez")
@router.get("/health")
async def live(gateway: GatewayDep) -> Response:
    """503 once only a restart can heal this server."""
    gateway.check_live()
    return JsonAnswer({"status": "live"})


@router.get("/readyz")
async def ready(gateway: GatewayDep) -> Response:
    """200 while requests are taken."""
    gateway.metrics.ready.set(int(gateway.is_ready))
    gateway.check_healthy()
    return JsonAnswer({"status": "ready"})
