"""Steering: what may be asked for in the `steering` field."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from server.answers import JsonAnswer
from server.catalog import BundleView, GateView
from server.gateway import GatewayDep
from server.policy import Report
from steering import __version__
from steering.plan import CategorySource, Mode, Scope

router = APIRouter()


@router.get("/v1/steering")
async def describe_steering(gateway: GatewayDep) -> Response:
    """What may be asked for in the `steering` field."""
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
            "bundles": [_bundle(bundle) for bundle in catalog.bundles],
        }
    )


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
