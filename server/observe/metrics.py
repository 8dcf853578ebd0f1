"""Metrics of the gateway: prefix `steering_`, base units, labels from closed sets only.

`steered` is true where something was edited, which is not so where a gate abstained or only observed. Labels never hold
what a client wrote: profiles and categories come from the loaded bundles, statuses are numbers. What a judge, a canary
and the drift of probes are counted by is with each of them.
Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.catalog import LiveCatalog
from server.effects import Effect
from server.observe.build import UNKNOWN as UNKNOWN_COMMIT
from server.observe.labels import NONE, Closed, Labels
from server.observe.open_metrics import open_metrics
from server.observe.stages import Stages
from server.observe.trace_context import exemplar_of
from server.policy import Resolution
from server.rollout import Rollout
from server.verdicts import UNKNOWN, Verdict
from steering import __version__
from steering.errors import EditFailed, EditNotApplied, EditNotConfirmed

__all__ = ["NONE", "Metrics", "Phase", "flag"]

MOST_CODES = 64

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STAGE_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, *_SECONDS[:13])
_PROBABILITIES = (0.0, 0.01, *(step / 20 for step in range(1, 20)), 0.99, 1.0)


class Phase(StrEnum):
    """How far an answer had come when its client left."""

    BEFORE_FIRST_BYTE = "before_first_byte"
    STREAMING = "streaming"


class Metrics:
    """The gateway's own registry and what is counted in it.

    Args:
        catalog: in force; names profiles, categories and bundles.
        engine_version: of vLLM, for `steering_build_info`.
        commit: that this server was made from, likewise.
        rollout: for `steering_enforced_share`.
        has_exemplars: durations name the trace of a request that took as long, for whoever asks for OpenMetrics.

    Attributes:
        has_exemplars: as given.
    """

    def __init__(
        self,
        catalog: LiveCatalog,
        *,
        engine_version: str,
        commit: str = UNKNOWN_COMMIT,
        rollout: Rollout | None = None,
        has_exemplars: bool = False,
    ) -> None:
        self.has_exemplars = has_exemplars
        self.labels = Labels(catalog)
        self.registry = registry = CollectorRegistry()
        self._codes = Closed(MOST_CODES)
        self.requests = Counter(
            "steering_requests",
            "Requests answered, by status; profile is none where none was resolved.",
            ("endpoint", "profile", "status"),
            registry=registry,
        )
        self.decisions = Counter(
            "steering_decisions",
            "Requests by what was decided for them: refuse, comply, abstain or off; category is none for off. In mode "
            "shadow it was decided and not done.",
            ("category", "decision", "mode"),
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
            ("category", "decision", "outcome", "detector", "mode"),
            registry=registry,
        )
        self.tokens = Counter(
            "steering_tokens",
            "Tokens read and written, by what was decided for their request and whether anything was edited.",
            ("kind", "decision", "steered"),
            registry=registry,
        )
        self.cached = Counter(
            "steering_prompt_tokens_cached",
            "Prompt tokens among steering_tokens that came from the prefix cache.",
            ("steered",),
            registry=registry,
        )
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
            ("endpoint", "steered"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.stages = Histogram(
            "steering_stage_duration_seconds",
            "Parts of a request's time, up to its first confirmed token and after its last.",
            ("stage",),
            buckets=_STAGE_SECONDS,
            registry=registry,
        )
        self.errors = Counter(
            "steering_errors",
            "Requests that ended in an error, by its code, streams that had begun included.",
            ("code",),
            registry=registry,
        )
        self.unapplied = Counter(
            "steering_unapplied",
            "Requests whose edit or gate the engine did not confirm; their answers were withheld. Must stay 0. It said "
            "nothing in time (unconfirmed), that it could not (failed), or something that the request does not allow "
            "(contradicted).",
            ("reason",),
            registry=registry,
        )
        self.disconnects = Counter(
            "steering_client_disconnects",
            "Clients that left before their answer was complete: before its first byte, or while it was streamed.",
            ("phase",),
            registry=registry,
        )
        self.stalls = Counter(
            "steering_stream_stalls", "Clients cut off for not reading what they asked for.", registry=registry
        )
        self.bundle_loads = Counter(
            "steering_bundle_loads",
            "Bundles that operators had loaded, unloaded or verified, by how it ended: done, refused or failed.",
            ("action", "result"),
            registry=registry,
        )
        self.rejections = Counter(
            "steering_rejections",
            "Requests that their key, or the lack of one, did not allow, by what stood in the way.",
            ("reason",),
            registry=registry,
        )
        self.key_loads = Counter(
            "steering_key_loads",
            "Times that a changed file of keys was read, by whether it could be.",
            ("result",),
            registry=registry,
        )
        self.audit_records = Counter(
            "steering_audit_records", "Records written to the audit log.", ("event",), registry=registry
        )
        self.audit_failures = Counter(
            "steering_audit_failures", "Records that could not be written to the audit log.", registry=registry
        )
        self.inflight = Gauge(
            "steering_inflight_requests", "Requests being answered; each prompt of a request is one.", registry=registry
        )
        self.inflight_answers = Gauge(
            "steering_inflight_answers",
            "Answers being generated, each of the n of a request counted; TRIMTAB_MAX_INFLIGHT bounds them.",
            registry=registry,
        )
        self.connections_refused = Counter(
            "steering_connections_refused",
            "Connections beyond TRIMTAB_MAX_CONNECTIONS, which were told so and closed.",
            registry=registry,
        )
        self.rows_wanted = Gauge(
            "steering_rows_wanted",
            "Answers in flight that are steered or observed, those that wait in the engine's queue included.",
            registry=registry,
        )
        self.rows_limit = Gauge(
            "steering_rows_limit",
            "Rows that the engine has for them: twice as many as it runs at once, so that it never lacks one.",
            registry=registry,
        )
        self.ready = Gauge("steering_ready", "1 while /readyz answers 200.", registry=registry)
        build = Gauge(
            "steering_build_info", "Versions, and the commit.", ("version", "vllm", "commit"), registry=registry
        )
        build.labels(__version__, engine_version, commit).set(1)
        # From 0 on, since Prometheus does not see the first step of a new series.
        for error in (EditNotApplied, EditNotConfirmed, EditFailed):
            self.unapplied.labels(error.reason)
        for phase in Phase:
            self.disconnects.labels(phase)
        registry.register(_Loaded(catalog, self.labels, rollout or Rollout()))

    def exposition(self, *, is_open: bool = False) -> bytes:
        """Prometheus' text format; or OpenMetrics, which has exemplars, but for its end."""
        return open_metrics(self.registry) if is_open else generate_latest(self.registry)

    def exemplar(self, trace: Mapping[str, str]) -> dict[str, str] | None:
        """What joins an observation with the span of its request; None where that is sent nowhere.

        Args:
            trace: context of the request, as headers.
        """
        return exemplar_of(trace) if self.has_exemplars else None

    def left(self, phase: Phase) -> None:
        """Count a client that did not wait for the end of its answer."""
        self.disconnects.labels(phase).inc()

    def failed(self, code: str) -> None:
        """Count a request that ended in an error."""
        self.errors.labels(self._codes(code)).inc()

    def keys_loaded(self, succeeded: bool) -> None:
        """Count a reading of the file of keys."""
        self.key_loads.labels("done" if succeeded else "failed").inc()

    def audit_recorded(self, event: str) -> None:
        """Count a record of the audit."""
        self.audit_records.labels(event).inc()

    def audit_failed(self) -> None:
        """Count a record of the audit that could not be written."""
        self.audit_failures.inc()

    def answered(self, resolution: Resolution, effects: Sequence[Effect], verdicts: Iterable[Verdict]) -> None:
        """Count what was decided for a request whose answer is complete, and what each choice of it was."""
        first, bundle = effects[0], resolution.bundle
        mode = mode_of(resolution)
        self.decisions.labels(self.labels.category(first.category, bundle), first.decision, mode).inc()
        if first.scores is not None and resolution.category_source is not None:
            self.probe_score.labels(self.labels.profile(resolution.profile.name)).observe(first.scores.refusal)
            category = self.labels.category(first.category, bundle)
            self.categories.labels(category, resolution.category_source.value).inc()
        for effect, verdict in zip(effects, verdicts, strict=True):
            category = self.labels.category(verdict.category or effect.category, bundle)
            self.outcomes.labels(category, effect.decision, verdict.outcome, verdict.detector, mode).inc()

    def broke(self, resolution: Resolution) -> None:
        """Count a request that failed in the engine as an outcome, so that rates keep their denominator."""
        category = self.labels.category(resolution.category, resolution.bundle)
        self.outcomes.labels(category, resolution.mode.value, "error", UNKNOWN.detector, mode_of(resolution)).inc()

    def took(self, stages: Stages) -> None:
        """Count how long the stages of a request took."""
        for stage, seconds in stages.items():
            self.stages.labels(stage.value).observe(seconds)


class _Loaded(Collector):
    """What is loaded at the moment of a scrape."""

    def __init__(self, catalog: LiveCatalog, labels: Labels, rollout: Rollout) -> None:
        self._catalog = catalog
        self._labels = labels
        self._rollout = rollout

    def collect(self) -> Iterator[Metric]:
        """One sample a bundle, and one a profile."""
        loaded = self._catalog.now.bundles
        bundles = GaugeMetricFamily(
            "steering_bundle_info", "Bundles loaded.", labels=("bundle", "version", "transferred")
        )
        shares: dict[str, float] = {}
        for bundle in loaded:
            bundles.add_metric((bundle.label, bundle.version, flag(bundle.is_transferred)), 1)
            for profile in bundle.profiles.values():
                shares.setdefault(self._labels.profile(profile.name), self._rollout.share(bundle, profile))
        yield bundles
        enforced = GaugeMetricFamily(
            "steering_enforced_share",
            "Share of a profile's requests that are steered; 0 is shadow.",
            labels=("profile",),
        )
        for name, share in shares.items():
            enforced.add_metric((name,), share)
        yield enforced


def mode_of(resolution: Resolution) -> str:
    """Whether what was decided was done, as a label value."""
    return "shadow" if resolution.is_shadow else "enforce"


def flag(value: bool) -> str:
    """A boolean as a label value."""
    return "true" if value else "false"
