"""Metrics of the gateway: prefix `steering_`, base units, labels from closed sets only.

`steered` is true where something was edited, which is not so where a gate abstained. Labels never hold what a client
wrote: profiles and categories come from the loaded bundles, statuses are numbers.
Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from server.catalog import Catalog
from steering import __version__

NONE = "none"
"""Label value where there is no category or no profile."""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_PROBABILITIES = tuple(step / 20 for step in range(21))


class Metrics:
    """The gateway's own registry and what is counted in it.

    Args:
        catalog: names the bundles for `steering_bundle_info`.
        engine_version: of vLLM, for `steering_build_info`.
    """

    def __init__(self, catalog: Catalog, *, engine_version: str) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "steering_requests",
            "Requests answered, by status; profile is none where none was resolved.",
            ("endpoint", "profile", "status"),
            registry=registry,
        )
        self.decisions = Counter(
            "steering_decisions",
            "Requests by what was decided for them: refuse, comply, abstain or off; category is none for off.",
            ("category", "decision"),
            registry=registry,
        )
        self.probe_score = Histogram(
            "steering_probe_score",
            "Refusal probabilities that gates read, by profile.",
            ("profile",),
            buckets=_PROBABILITIES,
            registry=registry,
        )
        self.categories = Counter(
            "steering_probe_categories",
            "Requests whose gate decided, by what it took them for and by who named the category.",
            ("category", "source"),
            registry=registry,
        )
        self.category_passes = Counter(
            "steering_category_passes",
            "Passes of one token that asked a model's own refusal tokens for the category.",
            registry=registry,
        )
        self.outcomes = Counter(
            "steering_outcomes",
            "Choices by what their answer turned out to be; category is the refusal's own where a detector names one.",
            ("category", "decision", "outcome", "detector"),
            registry=registry,
        )
        self.tokens = Counter("steering_tokens", "Tokens read and written.", ("kind", "steered"), registry=registry)
        self.duration = Histogram(
            "steering_request_duration_seconds",
            "From the first byte of a request to the last byte of its answer.",
            ("endpoint", "steered"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "steering_time_to_first_token_seconds",
            "From an admitted streamed request to its first confirmed token.",
            ("steered",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.unapplied = Counter(
            "steering_unapplied",
            "Requests whose edit or gate the engine did not confirm; their answers were withheld. Must stay 0.",
            registry=registry,
        )
        self.disconnects = Counter(
            "steering_client_disconnects", "Clients that left before their answer was complete.", registry=registry
        )
        self.inflight = Gauge("steering_inflight_requests", "Requests being answered.", registry=registry)
        self.ready = Gauge("steering_ready", "1 while /readyz answers 200.", registry=registry)
        bundles = Gauge(
            "steering_bundle_info", "Bundles loaded.", ("bundle", "version", "transferred"), registry=registry
        )
        for bundle in catalog.bundles:
            bundles.labels(bundle.label, bundle.version, flag(bundle.is_transferred)).set(1)
        build = Gauge("steering_build_info", "Versions.", ("version", "vllm"), registry=registry)
        build.labels(__version__, engine_version).set(1)

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


def flag(value: bool) -> str:
    """A boolean as a label value."""
    return "true" if value else "false"
