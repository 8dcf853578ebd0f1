"""VLLM's own metrics: as Prometheus reads them, and what they tell of its life.

Names vLLM, which is imported only once they are read.
"""

from __future__ import annotations

from prometheus_client import generate_latest

TOKENS = "vllm:generation_tokens"
"""A counter that grows with every step of the engine, whoever waits for the tokens."""


def exposition() -> bytes:
    """All of them in Prometheus' text format."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    return generate_latest(get_prometheus_registry())


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
