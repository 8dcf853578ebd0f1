"""VLLM's own metrics: as Prometheus reads them, and what they tell of its life.

Names vLLM, which is imported only once they are read.
"""

from __future__ import annotations

from prometheus_client import generate_latest

from server.observe.open_metrics import open_metrics

TOKENS = "vllm:generation_tokens"
"""A counter that grows with every step of the engine, whoever waits for the tokens."""


def exposition(*, is_open: bool = False) -> bytes:
    """All of them in Prometheus' text format; or in OpenMetrics', but for its last line."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    registry = get_prometheus_registry()
    return open_metrics(registry) if is_open else generate_latest(registry)


def generated_tokens() -> float:
    """Tokens that were generated so far; always 0 with vLLM's `--disable-log-stats`. Takes milliseconds."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    return sum(
        sample.value
        for family in get_prometheus_registry().collect()
        if family.name == TOKENS
        for sample in family.samples
        if sample.name == f"{TOKENS}_total"
    )
