"""Files of API keys for tests, and clients that come with one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.access.keys import hash_of

KEYS = {name: f"tt-{name}" for name in ("plain", "user", "relax", "operator", "limited", "neighbour")}


def record(name: str, **fields: Any) -> dict[str, Any]:
    """A key of the file, its tenant being its own name."""
    return {"id": name, "sha256": hash_of(KEYS[name]), "tenant": name, **fields}


def write_keys(path: Path, *records: Mapping[str, Any]) -> Path:
    """The file, in one step, as its owner's alone."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"version": 1, "keys": records}))
    unfinished.chmod(0o600)
    return unfinished.replace(path)


def bearer_of(name: str) -> dict[str, str]:
    """The header that this key comes in."""
    return {"authorization": f"Bearer {KEYS[name]}"}
