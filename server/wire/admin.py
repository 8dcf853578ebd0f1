"""Wire models of administration: which bundle is meant.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from server.wire.strict import Body


class NamedFolder(Body):
    """A folder in the operator's folder of bundles, by name."""

    name: Annotated[str, Field(min_length=1, max_length=255)]


class LoadedBundle(Body):
    """A bundle that is loaded, by name, label or digest."""

    bundle: Annotated[str, Field(min_length=1, max_length=255)]
