"""The server process: bundles checked, engine started, self-check passed, requests served, streams drained.

Knows vLLM only through `server/vllm_engine.py`, imported once the cheap checks have passed.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
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

from server.access.admission import Admission
from server.app import create_admin_app, create_app, create_gateway
from server.bundles import Check, unchecked
from server.catalog import BundleView, Catalog, view_of
from server.connections import Patience, protocol_of
from server.engine import Engine
from server.gateway import Gateway
from server.observe.log import configure_log
from server.readiness import self_check
from server.settings import Settings, check_reach
from steering.errors import BundleFormatError, EngineDied, TrimtabError, UnsupportedConfiguration

TICK = 0.05
"""Seconds between looks at what is still in flight while draining."""

GRACE = 5
"""Seconds for the last bytes of answers to be sent, when all of them are ready."""

FORCED_END = 5.0
"""Seconds from the order to end at once until this process ends, whatever it waits for."""


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
    check_reach(settings)
    Admission(settings.access).close()  # files that cannot be used are found before vLLM is started
    check = bundle_check(order.model, settings)
    catalog = load_catalog(order.bundles, check)
    configure_log(settings.log_format)
    disable_created_metrics()  # type: ignore[no-untyped-call] # nothing here reads them, vLLM's included
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, _stop_loading)
    import uvloop

    uvloop.run(_serve(order, settings, catalog, check, on_ready))


def bundle_check(model: Path, settings: Settings) -> Check:
    """How a bundle is checked before it is served, at the start and later: all of it, and that it belongs to the model.

    Raises:
        OperatorError: the model's folder cannot be read.
    """
    from steering.bundle import load_bundle
    from steering.fingerprint import fingerprint_of
    from steering.signature import check_signature

    if settings.require_signature != (settings.signature_key is not None):
        raise UnsupportedConfiguration(
            "--require-signature and --signature-key go together: the key says whose signature is required"
        )
    found = fingerprint_of(model)

    def check(path: Path) -> BundleView:
        bundle = load_bundle(path)
        if settings.signature_key is not None:
            check_signature(bundle, settings.signature_key)
        is_own = bundle.manifest.model.check(
            found, bundle=bundle.manifest.name, accept_transfer=settings.accept_transfer
        )
        return view_of(bundle, is_transferred=not is_own)

    return check


def load_catalog(bundles: Sequence[Path], check: Check) -> Catalog:
    """Check every bundle.

    Raises:
        OperatorError: names the bundle, the field, what was found and what is needed.
    """
    if not bundles:
        raise BundleFormatError("no bundle is given; a steering server needs one: --bundle FOLDER")
    return Catalog(bundles=tuple(check(path) for path in bundles))


class AdminServer(uvicorn.Server):
    """Uvicorn for operators: it lives as long as the other and leaves signals to it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none."""
        yield


class DrainingServer(uvicorn.Server):
    """Uvicorn, with an end that lets answers finish.

    SIGTERM or SIGINT: `/readyz` answers 503, and requests are still taken while load balancers get time to see it; then
    new ones are refused, those in flight get time to finish, those left get an error, and the process ends with 0. A
    second signal ends it at once.

    Args:
        config: uvicorn's.
        gateway: that is served.
        admin: ends with this one.
    """

    def __init__(self, config: uvicorn.Config, gateway: Gateway, admin: AdminServer) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._admin = admin
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """Begin the end; unlike uvicorn's, does not let the signal kill the process afterwards."""
        if self._gateway.service.is_leaving:
            self._gateway.service.abort_all()
            self.should_exit = self.force_exit = self._admin.force_exit = True
            _end_within(FORCED_END)
            return
        self._gateway.service.is_leaving = True
        self._drain = asyncio.get_running_loop().create_task(self._let_finish(), name="drain")

    async def _let_finish(self) -> None:
        settings, service = self._gateway.settings, self._gateway.service
        await asyncio.sleep(settings.drain_delay)
        service.is_draining = True
        end = time.monotonic() + settings.drain_grace
        while service.inflight and time.monotonic() < end:  # noqa: ASYNC110 - a deadline beside the condition
            await asyncio.sleep(TICK)
        service.abort_all()
        self.should_exit = True


COLLECTED_AFTER = (20_000, 20, 50)
"""Of `gc.set_threshold`; with Python's own, one answer in a hundred is ten milliseconds late at 200 streams."""


async def _serve(
    order: Order, settings: Settings, catalog: Catalog, check: Check, on_ready: Callable[[str, str], None]
) -> None:
    from server.vllm_engine import started
    from server.vllm_options import parse_options, versions
    from steering.engine.compat import set_environment

    set_environment()
    defaults = dict(order.defaults)
    if settings.otlp_endpoint is not None:  # vLLM's spans go below those of the gateway, under the same name
        defaults["otlp_traces_endpoint"] = settings.otlp_endpoint
        os.environ.setdefault("OTEL_SERVICE_NAME", "trimtab")
    arguments = parse_options(order.model, order.name, order.options, defaults)
    chosen: dict[str, Any] = {"layers": order.layers, "check_finite": order.check_finite}
    async with started(arguments, order.bundles, **chosen) as engine:
        await serve_engine(engine, catalog, settings, on_ready=on_ready, check=check, engine_version=versions())


async def serve_engine(
    engine: Engine,
    catalog: Catalog,
    settings: Settings,
    *,
    on_ready: Callable[[str, str], None],
    check: Check = unchecked,
    engine_version: str = "",
) -> None:
    """Serve over an engine that runs, until told to stop; see `serve`.

    Args:
        engine: stays the caller's to end.
        catalog: of the bundles that it was started with.
        settings: how.
        on_ready: called with the addresses for clients and for operators once requests are taken.
        check: of bundles that are to be loaded later.
        engine_version: for the metrics.
    """
    gateway = create_gateway(engine, catalog, settings, engine_version=engine_version, check=check)
    admin = AdminServer(_uvicorn_config(create_admin_app(gateway), settings.admin_host, settings.admin_port, gateway))
    server = DrainingServer(_uvicorn_config(create_app(gateway), settings.host, settings.port, gateway), gateway, admin)
    administration = asyncio.create_task(_listen(admin), name="administration")
    armed = asyncio.create_task(_arm(server, admin, gateway, on_ready), name="self-check")
    watch = asyncio.create_task(_end_with_the_engine(server, gateway), name="engine")
    heart = asyncio.create_task(gateway.heartbeat.run(), name="heartbeat")
    try:
        await _listen(server)
    finally:
        for task in (armed, watch, heart):
            task.cancel()
        await gateway.observation.stop()
        await gateway.admission.stop()
        admin.should_exit = True
        await administration
    for task in (armed, watch):
        if task.done() and not task.cancelled():
            task.result()


async def _end_with_the_engine(server: uvicorn.Server, gateway: Gateway) -> None:
    """End this process when only a restart can help, once balancers have seen it and what was in flight is told.

    Raises:
        EngineDied: then.
    """
    while True:
        try:
            gateway.check_live()
        except EngineDied as error:
            logging.getLogger("trimtab").critical("%s; ending in %g s", error.message, gateway.settings.death_delay)
            await asyncio.sleep(gateway.settings.death_delay)
            _end_within(FORCED_END + GRACE)
            gateway.service.abort_all()
            server.should_exit = True
            raise
        await asyncio.sleep(TICK)


def _end_within(seconds: float) -> None:
    """Whatever still waits for something then, an engine that does not answer above all, is left behind."""
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()


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
    _keep_what_there_is()
    gateway.is_armed = True
    on_ready(_address(server), _address(admin))


def _keep_what_there_is() -> None:
    """Spare the garbage collector what start-up made, which lives as long as the process: to look through all of vLLM
    and torch again and again would stop every stream meanwhile. VLLM's own server does the same. What requests make is
    looked through less often than Python would, since nearly all of it is freed without the collector.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTED_AFTER)


def _address(server: uvicorn.Server) -> str:
    address = server.servers[0].sockets[0].getsockname()
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"http://{host}:{address[1]}"


def _uvicorn_config(app: ASGIApp, host: str, port: int, gateway: Gateway) -> uvicorn.Config:
    settings = gateway.settings
    patience = Patience(
        headers=settings.header_timeout,
        write=settings.write_timeout,
        header_bytes=settings.max_header_bytes,
        header_fields=settings.max_header_fields,
        connections=settings.max_connections,
        on_stall=gateway.metrics.stalls.inc,
        on_surplus=gateway.metrics.connections_refused.inc,
    )
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=protocol_of(patience),
        loop="uvloop",
        lifespan="off",
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=settings.keep_alive_timeout,
        timeout_graceful_shutdown=GRACE,
    )


def _stop_loading(_signal: int, _frame: FrameType | None) -> None:
    """Told to stop before anything was served: ends at once, and the engine's processes with it."""
    raise SystemExit(0)
