"""The applications: wiring only. One for clients, and one for operators on a port of its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from server.access.admission import Admission
from server.answers import error_answer
from server.body import ClientGone
from server.bundles import BundleFolder, Bundles, Check, unchecked
from server.catalog import Catalog, LiveCatalog
from server.edge import Edge
from server.engine import Engine
from server.errors import Rejection, UnknownRoute, WrongMethod
from server.gateway import Gateway
from server.heartbeat import Heartbeat
from server.observe.build import commit_of
from server.observe.metrics import Metrics, Phase
from server.observe.observation import Observation
from server.observe.stages import Stage
from server.rollout import Rollout
from server.routes import admin, chat, completions, health, metrics, models, responses, steering, tokenize
from server.service import Service
from server.settings import Settings
from steering import __version__
from steering.errors import CallerError, EngineError, InvalidSpec, TrimtabError, UnsupportedConfiguration

_log = logging.getLogger("trimtab")


def create_gateway(
    engine: Engine, catalog: Catalog, settings: Settings, *, engine_version: str = "", check: Check = unchecked
) -> Gateway:
    """What the routes share, not yet armed.

    Args:
        engine: generates.
        catalog: what is loaded.
        settings: how all of it is run.
        engine_version: of vLLM.
        check: of bundles that are to be loaded later.

    Raises:
        OperatorError: the settings do not go with the model, the bundles or each other.
    """
    if settings.canary_interval and not engine.model.is_chat:
        raise UnsupportedConfiguration(
            f"TRIMTAB_CANARY_INTERVAL asks in messages, and model {engine.model.name!r} has no chat template"
        )
    rollout = Rollout(shares=settings.enforced_share)
    rollout.check(catalog)
    live = LiveCatalog(catalog)
    counted = Metrics(
        live,
        engine_version=engine_version,
        commit=settings.commit or commit_of(),
        rollout=rollout,
        has_exemplars=settings.otlp_endpoint is not None,
    )
    admission = Admission(settings.access, counted)
    observation = Observation(settings, counted, live)
    folder = BundleFolder(settings.bundle_folder)
    bundles = Bundles(engine=engine, catalog=live, metrics=counted, folder=folder, check=check)
    heartbeat = Heartbeat(
        engine,
        live,
        interval=settings.heartbeat_interval,
        timeout=settings.heartbeat_timeout,
        failures=settings.heartbeat_failures,
    )
    service = Service(
        engine=engine,
        catalog=live,
        metrics=counted,
        limits=settings.limits,
        observers=[*observation.observers, *admission.observers, heartbeat],
        rollout=rollout,
        audit=admission.audit,
    )
    return Gateway(
        engine=engine,
        catalog=live,
        service=service,
        metrics=counted,
        settings=settings,
        admission=admission,
        observation=observation,
        bundles=bundles,
        heartbeat=heartbeat,
    )


def create_app(gateway: Gateway) -> ASGIApp:
    """What clients reach."""
    keyed = (chat.router, completions.router, responses.router, tokenize.router, models.router, steering.router)
    return _application(gateway, health.router, keyed=keyed)


def create_admin_app(gateway: Gateway) -> ASGIApp:
    """What operators and their monitoring reach."""
    return _application(gateway, health.router, metrics.router, admin.router)


def _application(gateway: Gateway, *routers: APIRouter, keyed: Sequence[APIRouter] = ()) -> ASGIApp:
    """An ASGI application of these routes; serves no documentation pages, and no path but its own.

    Those of `keyed` are reached with an API key alone, where there are keys: it is looked at before the route is.
    """
    app = FastAPI(title="Trimtab", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.gateway = gateway
    app.router.redirect_slashes = False
    for router in routers:
        app.include_router(router)
    for router in keyed:
        app.include_router(router, dependencies=[Depends(_admitted)])
    app.add_exception_handler(TrimtabError, _on_error)
    app.add_exception_handler(ClientGone, _on_client_gone)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(Exception, _on_bug)
    observation = gateway.observation
    return Edge(
        app,
        gateway.metrics,
        observation.ledger,
        tracing=observation.tracing,
        logs_scores=gateway.settings.log_scores,
        hash_of=None if gateway.audit is None else gateway.audit.hash_of,
    )


async def _admitted(request: Request) -> None:
    gateway: Gateway = request.app.state.gateway
    with request.scope["trimtab"].stages.timed(Stage.AUTH):
        gateway.admit(request)


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TrimtabError)
    facts = request.scope["trimtab"]
    facts.error = error.code
    if isinstance(error, Rejection):
        gateway: Gateway = request.app.state.gateway
        gateway.metrics.rejections.labels(error.reason).inc()
    if not isinstance(error, CallerError):
        # What vLLM says of a fault of its own may quote a prompt; what the project's other errors say does not.
        said = "the engine's own log says why" if type(error) is EngineError else error.message
        _log.warning("request id=req_%s failed: %s: %s", facts.request_id, error.code, said)
    return error_answer(error)


async def _on_client_gone(request: Request, _error: Exception) -> Response:
    """Nobody reads this; 499 is what the metric counts."""
    gateway: Gateway = request.app.state.gateway
    gateway.metrics.left(Phase.BEFORE_FIRST_BYTE)
    return Response(status_code=499)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, in the envelope."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow")
        return _noted(
            request,
            WrongMethod(f"method {request.method[:20]} is not allowed here; allowed: {allowed}"),
            error.headers,
        )
    return _noted(request, UnknownRoute("no such path; see GET /v1/models and GET /v1/steering"))


async def _on_validation_error(request: Request, _error: Exception) -> Response:
    """FastAPI's 422, which only path and query parameters could raise here."""
    return _noted(request, InvalidSpec("a parameter of the address is not valid"))


async def _on_bug(request: Request, _error: Exception) -> Response:
    """A bug of ours: logged with its traceback by the server, told without it."""
    message = f"internal error; quote request id req_{request.scope['trimtab'].request_id}"
    # Uvicorn closes the connection after a bug; a client that is not told would send its next request into that.
    return _noted(request, EngineError(message, code="internal_error"), {"connection": "close"})


def _noted(request: Request, error: TrimtabError, headers: Mapping[str, str] | None = None) -> Response:
    """The error as an answer; its code goes to the request's facts."""
    request.scope["trimtab"].error = error.code
    return error_answer(error, headers)
