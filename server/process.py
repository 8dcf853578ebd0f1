"""The server process: bundles checked, engine started, self-check passed, requests served, streams drained.

Knows vLLM only through `server/vllm_engine.py`, imported once the cheap checks have passed.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import uvicorn
from prometheus_client import disable_created_metrics
from starlette.types import ASGIApp

from server.app import create_admin_app, create_app, create_gateway
from server.catalog import Catalog, catalog_of
from server.gateway import Gateway
from server.observe.log import configure_log
from server.readiness import self_check
from server.settings import Settings, check_host
from steering.errors import BundleFormatError, TrimtabError

TICK = 0.05
"""Seconds between looks at what is still in flight while draining."""

KEEP_ALIVE = 75
"""Seconds; longer than the 60 of common proxies, which otherwise send into a connection that is being closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is to be served.

    Attributes:
        model: local folder.
        name: what clients send as `model`.
        bundles: folders, the default one first.
        options: vLLM's own, as given.
        defaults: vLLM's own, where none were given.
        layers: armed beside those the bundles need.
        check_finite: steered requests whose residuals are not finite are ended.
    """

    model: Path
    name: str
    bundles: tuple[Path, ...]
    options: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] | Literal["all"] = ()
    check_finite: bool = False


def serve(order: Order, settings: Settings, *, on_ready: Callable[[str, str], None]) -> None:
    """Serve until told to stop; returns after a clean end.

    Args:
        order: what is to be served.
        settings: how.
        on_ready: called with the addresses for clients and for operators once requests are taken.

    Raises:
        OperatorError: the set-up is at fault; before vLLM is started wherever that can be known.
        EngineError: the engine did not start, or the self-check failed.
    """
    check_host(settings.host)
    catalog = load_catalog(order.model, order.bundles, accept_transfer=settings.accept_transfer)
    configure_log(settings.log_format)
    disable_created_metrics()  # type: ignore[no-untyped-call] # nothing here reads them, vLLM's included
    signal.signal(signal.SIGTERM, _stop_loading)
    import uvloop

    uvloop.run(_serve(order, settings, catalog, on_ready))


def load_catalog(model: Path, bundles: Sequence[Path], *, accept_transfer: bool) -> Catalog:
    """Check every bundle, and that it belongs to the model.

    Raises:
        OperatorError: names the bundle, the field, what was found and what is needed.
    """
    from steering.bundle import load_bundle
    from steering.fingerprint import fingerprint_of

    if not bundles:
        raise BundleFormatError("no bundle is given; a steering server needs one: --bundle FOLDER")
    found = fingerprint_of(model)
    loaded = []
    for path in bundles:
        bundle = load_bundle(path)
        is_own = bundle.manifest.model.check(found, bundle=bundle.manifest.name, accept_transfer=accept_transfer)
        loaded.append((bundle, not is_own))
    return catalog_of(loaded)


class AdminServer(uvicorn.Server):
    """Uvicorn for operators: it lives as long as the other and leaves signals to it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none."""
        yield


class DrainingServer(uvicorn.Server):
    """Uvicorn, with an end that lets answers finish.

    SIGTERM or SIGINT: `/readyz` and new requests answer 503, load balancers get time to see it, requests in flight get
    time to finish, those left get an error, and the process ends with 0. A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """Begin the end; unlike uvicorn's, does not let the signal kill the process afterwards."""
        if self._gateway.service.is_draining:
            self.should_exit = self.force_exit = True
            return
        self._gateway.service.is_draining = True
        self._drain = asyncio.get_running_loop().create_task(self._let_finish(), name="drain")

    async def _let_finish(self) -> None:
        settings, service = self._gateway.settings, self._gateway.service
        await asyncio.sleep(settings.drain_delay)
        end = time.monotonic() + settings.drain_grace
        while service.inflight and time.monotonic() < end:  # noqa: ASYNC110 - a deadline beside the condition
            await asyncio.sleep(TICK)
        service.abort_all()
        self.should_exit = True


async def _serve(order: Order, settings: Settings, catalog: Catalog, on_ready: Callable[[str, str], None]) -> None:
    from server.vllm_engine import parse_options, started, versions
    from steering.engine.compat import set_environment

    set_environment()
    arguments = parse_options(order.model, order.name, order.options, order.defaults)
    chosen: dict[str, Any] = {"layers": order.layers, "check_finite": order.check_finite}
    async with started(arguments, order.bundles, **chosen) as engine:
        gateway = create_gateway(engine, catalog, settings, engine_version=versions())
        server = DrainingServer(_uvicorn_config(create_app(gateway), settings.host, settings.port), gateway)
        admin = AdminServer(_uvicorn_config(create_admin_app(gateway), settings.admin_host, settings.admin_port))
        administration = asyncio.create_task(_listen(admin), name="administration")
        check = asyncio.create_task(_arm(server, admin, gateway, on_ready), name="self-check")
        try:
            await _listen(server)
        finally:
            check.cancel()
            await gateway.observation.stop()
            admin.should_exit = True
            await administration
        if check.done() and not check.cancelled():
            check.result()


async def _listen(server: uvicorn.Server) -> None:
    try:
        await server.serve()
    except SystemExit as error:  # how uvicorn says that the address is taken; it has logged why
        raise TrimtabError(f"cannot listen on {server.config.host} port {server.config.port}") from error


async def _arm(
    server: DrainingServer, admin: AdminServer, gateway: Gateway, on_ready: Callable[[str, str], None]
) -> None:
    try:
        await self_check(gateway.engine, gateway.catalog.now)
    except BaseException:
        server.should_exit = True
        raise
    while not (server.started and admin.started):
        if admin.should_exit:  # its address is taken, which `_serve` tells
            server.should_exit = True
            return
        await asyncio.sleep(TICK)
    await gateway.observation.start(gateway.engine, gateway.service, gateway.catalog)
    gateway.is_armed = True
    on_ready(_address(server), _address(admin))


def _address(server: uvicorn.Server) -> str:
    address = server.servers[0].sockets[0].getsockname()
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"http://{host}:{address[1]}"


def _uvicorn_config(app: ASGIApp, host: str, port: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http="httptools",
        loop="uvloop",
        lifespan="off",
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=5,
    )


def _stop_loading(_signal: int, _frame: FrameType | None) -> None:
    """Told to stop before anything was served: ends at once, and the engine's processes with it."""
    raise SystemExit(0)
