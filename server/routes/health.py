"""Health: whether this server lives, and whether it takes requests."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from server.answers import JsonAnswer
from server.gateway import GatewayDep
from steering.errors import EngineDied, TrimtabError

router = APIRouter()


@router.get("/livez")
@router.get("/health")
async def live(gateway: GatewayDep) -> Response:
    """503 once the engine is gone, which only a restart can heal."""
    if not gateway.engine.is_alive:
        raise EngineDied("the engine is gone; this server must be started again")
    return JsonAnswer({"status": "live"})


@router.get("/readyz")
async def ready(gateway: GatewayDep) -> Response:
    """200 while requests are taken."""
    try:
        gateway.check_ready()
    except TrimtabError:
        gateway.metrics.ready.set(0)
        raise
    gateway.metrics.ready.set(1)
    return JsonAnswer({"status": "ready"})
