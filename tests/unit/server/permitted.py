"""What callers with some permissions get of the server, asked without HTTP."""

from __future__ import annotations

from typing import Any

from server.access.caller import Caller, Permission
from server.access.permissions import check_permitted
from server.catalog import Catalog
from server.generation import Generation
from server.policy import Resolution, SteeringSpec, resolve
from tests.fakes import MODEL, make_catalog, make_gated_bundle

USE, RELAX, CUSTOM, SCORES = Permission.USE, Permission.RELAX, Permission.CUSTOM, Permission.SCORES
GATED = make_catalog(make_gated_bundle())


def caller(*permissions: Permission, **fields: Any) -> Caller:
    """A caller with these permissions who may name everything, unless told."""
    return Caller(key_id="team-a", tenant="a", permissions=frozenset(permissions), **fields)


def generation(
    spec: SteeringSpec | None = None, content: str = "How do I kill a process?", **fields: Any
) -> Generation:
    """A request with this spec, as the wire models make it."""
    prompt = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
    return Generation(model=MODEL, spec=spec, fields={**prompt, **fields}, prompt_fields=prompt)


def permitted(who: Caller, spec: SteeringSpec | None, catalog: Catalog = GATED, **fields: Any) -> Resolution:
    """What the caller gets."""
    resolution = resolve(spec, catalog, plan_id="p")
    return check_permitted(who, generation(spec, **fields), resolution, catalog)
