"""Administration: bundles that are loaded, verified and unloaded while the server runs; on the admin port."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.answers import JsonAnswer
from server.body import read_json_body
from server.catalog import BundleView
from server.gateway import Gateway, GatewayDep, gateway_of
from server.wire.admin import LoadedBundle, NamedFolder
from server.wire.parsing import parse
from server.wire.strict import Body

AnyBody = TypeVar("AnyBody", bound=Body)

MOST_BYTES = 64 * 1024
"""Of a body; it holds one name."""

router = APIRouter()


@router.get("/admin/bundles")
async def list_bundles(request: Request, gateway: GatewayDep) -> Response:
    """The bundles that are loaded, the default one first, and the folders that could be."""
    gateway.admit_operator(request)
    return JsonAnswer(
        {
            "object": "list",
            "data": [
                {**_told(gateway, bundle), "is_default": number == 0}
                for number, bundle in enumerate(gateway.catalog.now.bundles)
            ],
            "loadable": list(gateway.bundles.folder.names),
        }
    )


@router.post("/admin/bundles/load")
async def load_bundle(request: Request) -> Response:
    """Offer a bundle of the operator's folder, once it is checked and steers."""
    gateway, asked = await _asked(request, "bundle_load", NamedFolder)
    gateway.check_ready()
    return JsonAnswer({**_told(gateway, await gateway.bundles.load(asked.name)), "status": "loaded"})


@router.post("/admin/bundles/unload")
async def unload_bundle(request: Request) -> Response:
    """Offer a bundle no more; requests taken before are steered to their end."""
    gateway, asked = await _asked(request, "bundle_unload", LoadedBundle)
    return JsonAnswer({**_told(gateway, await gateway.bundles.unload(asked.bundle)), "status": "unloaded"})


@router.post("/admin/bundles/verify")
async def verify_bundle(request: Request) -> Response:
    """Check a bundle of the operator's folder as loading it would, and load nothing."""
    gateway, asked = await _asked(request, "bundle_verify", NamedFolder)
    return JsonAnswer({**_told(gateway, await gateway.bundles.verify(asked.name)), "status": "valid"})


async def _asked(request: Request, act: str, kind: type[AnyBody]) -> tuple[Gateway, AnyBody]:
    """What is asked, by whom may ask it, and on record."""
    gateway = gateway_of(request)
    caller = gateway.admit_operator(request)
    body = await read_json_body(request.headers, request.receive, limit=MOST_BYTES, wait=gateway.settings.body_timeout)
    asked = parse(kind, body)
    if gateway.audit is not None:
        await gateway.audit.admin(caller, request.scope["trimtab"].request_id, act, **asked.model_dump())
    return gateway, asked


def _told(gateway: Gateway, bundle: BundleView) -> dict[str, Any]:
    return {
        "object": "bundle",
        "name": bundle.name,
        "version": bundle.version,
        "label": bundle.label,
        "digest": bundle.digest,
        "transferred": bundle.is_transferred,
        "signature": gateway.signature_state,
        "profiles": list(bundle.profiles),
    }
