"""OpenMetrics: a registry in the format that has exemplars.

Several registries make one exposition, of which the last line is the end.
"""

from __future__ import annotations

from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.registry import Collector

TYPE = "application/openmetrics-text"
END = b"# EOF\n"


def open_metrics(registry: Collector) -> bytes:
    """All metrics of a registry, without the end."""
    told: bytes = generate_latest(registry)  # type: ignore[no-untyped-call]
    return told.removesuffix(END)
