"""Routes: wire in, one call, wire out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.answers import DECISION_HEADER, EventStream, JsonAnswer
from server.body import read_json_body, unless_disconnected
from server.catalog import BundleView, Catalog, GateView
from server.engine import Engine
from server.metrics import Metrics
from server.parsing import parse_chat_request
from server.policy import Report
from server.service import ChatService
from server.settings import Settings
from server.wire import ChatRequest
from steering import __version__
from steering.errors import EngineDied, EngineOverloaded, TrimtabError, UnknownModel
from steering.plan import CategorySource, Mode, Scope

router = APIRouter()


@dataclass(slots=True, kw_only=True)
class Gateway:
    """What the routes share: one engine, one catalog, one service.

    Attributes:
        is_armed: the self-check has passed.
    """

    engine: Engine
    catalog: Catalog
    service: ChatService
    metrics: Metrics
    settings: Settings
    is_armed: bool = False

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


@router.post(
    "/v1/chat/completions",
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/json": {"schema": ChatRequest.model_json_schema()}}}
    },
)
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, steered as its `steering` field says."""
    gateway = gateway_of(request)
    settings, service = gateway.settings, gateway.service
    body = await read_json_body(
        request.headers, request.receive, limit=settings.max_body_bytes, wait=settings.body_timeout
    )
    order = parse_chat_request(body)
    resolution = service.resolve(order)
    facts = request.scope["trimtab"]
    facts.profile, facts.decision = resolution.profile.name, resolution.mode.value
    gateway.check_ready()
    if order.stream:
        opened = await unless_disconnected(request.receive, service.open_stream(order, resolution, facts.request_id))
        facts.decision, facts.is_steered = opened.effect.decision, opened.effect.applied
        return EventStream(opened, on_disconnect=gateway.metrics.disconnects.inc)
    answer = await unless_disconnected(request.receive, service.complete(order, resolution, facts.request_id))
    facts.decision, facts.is_steered = answer.effect.decision, answer.effect.applied
    return JsonAnswer(answer.body, headers={DECISION_HEADER: answer.effect.decision})


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


@router.get("/v1/steering")
async def describe_steering(gateway: GatewayDep) -> Response:
    """What may be asked for in the `steering` field."""
    catalog = gateway.catalog
    _, profile = catalog.default
    has_gate = bool(catalog.gated_profile_names)
    can_tell = has_gate or any(bundle.reader is not None for bundle in catalog.bundles)
    return JsonAnswer(
        {
            "object": "steering",
            "version": __version__,
            "default_profile": profile.name,
            "default_mode": profile.default_mode.value,
            "modes": [mode.value for mode in Mode if has_gate or mode is not Mode.AUTO],
            "scopes": [scope.value for scope in Scope],
            "reports": [report.value for report in Report if can_tell or report is not Report.FULL],
            "category_sources": [source.value for source in CategorySource] if has_gate else [],
            "has_gate": has_gate,
            "profiles": list(catalog.profile_names),
            "bundles": [_bundle(bundle) for bundle in catalog.bundles],
        }
    )


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


@router.get("/metrics")
async def metrics(gateway: GatewayDep) -> Response:
    """The gateway's metrics, then the engine's."""
    gateway.metrics.ready.set(int(gateway.is_armed and gateway.engine.is_alive and not gateway.service.is_draining))
    return Response(
        gateway.metrics.exposition() + gateway.engine.exposition(),
        media_type="text/plain; version=1.0.0; charset=utf-8",
    )


def _model(gateway: Gateway) -> dict[str, Any]:
    model = gateway.engine.model
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "trimtab",
        "max_model_len": model.context,
        "steering": {"profiles": list(gateway.catalog.profile_names)},
    }


def _bundle(bundle: BundleView) -> dict[str, Any]:
    return {
        "name": bundle.name,
        "version": bundle.version,
        "label": bundle.label,
        "digest": bundle.digest,
        "transferred": bundle.is_transferred,
        "default_profile": bundle.default_profile,
        "categories": [{"name": category.name, "token": category.token} for category in bundle.categories.values()],
        "profiles": [
            {
                "name": profile.name,
                "description": profile.description,
                "refuse": dict(profile.refuse),
                "comply": dict(profile.comply),
                "default_category": profile.default_category,
                "strength": profile.strength,
                "scope": profile.scope.value,
                "default_mode": profile.default_mode.value,
                "modes": [mode.value for mode in profile.modes],
                "gate": None if profile.gate is None else _gate(profile.gate),
            }
            for profile in bundle.profiles.values()
        ],
        "probes": [dataclasses.asdict(probe) for probe in bundle.probes.values()],
        "response_probe": None if bundle.response is None else dataclasses.asdict(bundle.response),
        "edits": [
            {
                "name": edit.name,
                "purpose": edit.purpose,
                "category": edit.category,
                "layers": list(edit.layers),
                "dose": edit.dose,
                "strength": {"minimum": edit.minimum, "maximum": edit.maximum, "measured": edit.measured},
            }
            for edit in bundle.edits.values()
        ],
    }


def _gate(gate: GateView) -> dict[str, Any]:
    return {
        "probe": gate.probe.name,
        "categories": list(gate.probe.categories),
        "thresholds": {"comply_below": gate.comply_below, "refuse_above": gate.refuse_above},
        "graded": gate.is_graded,
        "category_source": gate.category_source.value,
    }
