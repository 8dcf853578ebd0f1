"""Counts that a proof came to, kept as a file where the operator names a folder.

Knows nothing of engines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.bench.report import load, machine

FOLDER_VARIABLE = "TRIMTAB_RESULTS"
"""Environment variable that names the folder; without it nothing is written."""


def keep(name: str, what: str, counts: Mapping[str, Any]) -> Path | None:
    """Write the counts, and what they were counted on, as the benches write theirs; returns the file."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return None
    now = datetime.now(UTC)
    document = {
        "measured": now.isoformat(timespec="seconds"),
        "what": what,
        "machine": machine(),
        "load": load(),
        **counts,
    }
    path = Path(folder) / f"{now:%Y-%m-%dT%H%M%SZ}-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
