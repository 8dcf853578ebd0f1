"""Permissions: whether a caller may have what a request resolves to.

Knows nothing of HTTP, files, vLLM or torch.
"""

from __future__ import annotations

from server.access.caller import Caller
from server.catalog import Catalog
from server.generation import Generation
from server.policy import Resolution
from steering.errors import NotSupported


def check_permitted(caller: Caller, generation: Generation, resolution: Resolution, _catalog: Catalog) -> Resolution:
    """The resolution, where this caller may have it.

    Raises:
        NotSupported: a salt of its own from a caller without a tenant to keep it apart from others' in.
    """
    if generation.cache_salt is not None and caller.tenant is None:
        raise NotSupported(
            "cache_salt is not accepted: the prefix cache is kept apart by the server, which merges a salt with the "
            "tenant of an API key; this request has none",
            parameter="cache_salt",
        )
    return resolution
