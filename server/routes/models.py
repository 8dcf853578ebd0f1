"""Models: the one that is served."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from server.answers import JsonAnswer
from server.gateway import Gateway, GatewayDep
from steering.errors import UnknownModel

router = APIRouter()


@router.get("/v1/models")
async def list_models(gateway: GatewayDep) -> Response:
    """The model that is served."""
    return JsonAnswer({"object": "list", "data": [_model(gateway)]})


@router.get("/v1/models/{name:path}")
async def retrieve_model(name: str, gateway: GatewayDep) -> Response:
    """One model by name."""
    served = gateway.engine.model.name
    if name != served:
        raise UnknownModel(f"model {name[:200]!r} is not served here; models: [{served!r}]", parameter="model")
    return JsonAnswer(_model(gateway))


def _model(gateway: Gateway) -> dict[str, Any]:
    model = gateway.engine.model
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "trimtab",
        "max_model_len": model.context,
        "steering": {"profiles": list(gateway.catalog.now.profile_names)},
    }
