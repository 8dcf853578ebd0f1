"""Steering: what may be asked for in the `steering` field."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.access.caller import Caller
from server.access.permissions import profiles_of
from server.answers import JsonAnswer
from server.body import read_json_body, unless_disconnected
from server.catalog import BundleView, GateView
from server.gateway import Gateway, GatewayDep, gateway_of
from server.generation import Ticket
from server.policy import Report
from server.wire.parsing import parse
from server.wire.probe import NAMES, ProbeRequest
from steering import __version__
from steering.errors import CallerError
from steering.plan import CategorySource, Mode, Scope

router = APIRouter()


@router.post("/v1/steering/probe")
async def probe(request: Request) -> Response:
    """What a gate reads of a prompt, and what it would decide; no answer is generated."""
    gateway, facts = gateway_of(request), request.scope["trimtab"]
    caller = gateway.admit(request)
    body = await read_json_body(
        request.headers,
        request.receive,
        limit=gateway.settings.max_body_bytes,
        wait=gateway.settings.body_timeout,
    )
    generation = parse(ProbeRequest, body).to_generation()
    gateway.check_ready()
    ticket = Ticket(request_id=facts.request_id, caller=caller, endpoint=request.scope["path"], trace=facts.trace)
    try:
        reading = await unless_disconnected(request.receive, gateway.service.probe(generation, caller, ticket))
    except CallerError as error:
        error.parameter = NAMES.get(error.parameter or "", error.parameter)
        raise
    facts.profile, facts.decision = reading.resolution.profile.name, reading.effect.decision
    return JsonAnswer(reading.to_json(gateway.engine.model.name))


@router.get("/v1/steering")
async def describe_steering(request: Request, gateway: GatewayDep) -> Response:
    """What may be asked for in the `steering` field, and what of it this caller's key may ask for."""
    caller = gateway.admit(request)
    catalog = gateway.catalog.now
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
            "bundles": [{**_bundle(bundle), "signature": gateway.signature_state} for bundle in catalog.bundles],
            "key": _key(caller, profiles_of(caller, catalog)),
            "limits": _limits(gateway),
        }
    )


def _key(caller: Caller, profiles: Sequence[str]) -> dict[str, Any]:
    return {
        "id": caller.key_id,
        "permissions": sorted(permission.value for permission in caller.permissions),
        "profiles": list(profiles),
        "categories": None if caller.categories is None else sorted(caller.categories),
        "strength": None if caller.strength is None else {"minimum": caller.strength[0], "maximum": caller.strength[1]},
        "limits": dataclasses.asdict(caller.allowance),
    }


def _limits(gateway: Gateway) -> dict[str, Any]:
    settings = gateway.settings
    return {
        "context": gateway.engine.model.context,
        "body_bytes": settings.max_body_bytes,
        "seconds": {
            "first_token": settings.first_token_timeout,
            "between": settings.between_timeout,
            "total": settings.total_timeout,
        },
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
