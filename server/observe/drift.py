"""Drift: how far the refusal probabilities that gates read now are from those their probes were calibrated on.

Traffic is no calibration set: a large index says that the two differ, and only a change of it says that something
moved, unless the operator gives a reference of the server's own traffic. Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.catalog import BundleView, LiveCatalog, ProfileView
from server.observe.events import Ended
from server.observe.labels import Labels
from server.observe.reference import BINS

WINDOW = 1000
"""Latest scores of a profile that are looked at."""

FEWEST = 200
"""Scores below which chance alone gives an index that looks like drift: about (groups - 1) / scores."""

GROUPS = 10
"""Bins that the index is taken over, each of two of the reference's."""

SMOOTHING = 0.5
"""Added to each count, so that an empty bin on one side is no infinity."""


def stability_index(reference: Sequence[float], observed: Sequence[float], smoothing: float = SMOOTHING) -> float:
    """Population stability index: the sum over bins of (p - q) ln(p / q), for shares p observed and q of reference.

    0 for equal shares, symmetric, without an upper bound.

    Args:
        reference, observed: counts by bin, of the same bins.
        smoothing: added to every count.
    """
    whole = sum(reference) + smoothing * len(reference)
    seen = sum(observed) + smoothing * len(observed)
    shares = [
        ((there + smoothing) / whole, (here + smoothing) / seen)
        for there, here in zip(reference, observed, strict=True)
    ]
    return sum((here - there) * math.log(here / there) for there, here in shares)


class ProbeDrift(Collector):
    """The latest scores of every gated profile, against their reference; an observer, and a collector of metrics.

    Args:
        catalog: in force.
        labels: of metrics.
        references: of the operator, by profile as `name` or `bundle/name`; they go before those of the bundles.
    """

    def __init__(self, catalog: LiveCatalog, labels: Labels, references: Mapping[str, Sequence[int]]) -> None:
        self._catalog = catalog
        self._labels = labels
        self._references = references
        self._windows: dict[tuple[str, str], deque[int]] = {}

    def ended(self, event: Ended) -> None:
        """Take note of what the gate read of a prompt that was answered, which the server's own and looks at scores
        alone are not.
        """
        first, resolution = event.effects.get(0), event.resolution
        if event.ticket.is_internal or not event.is_complete or first is None or first.scores is None:
            return
        key = (resolution.bundle.digest, resolution.profile.name)
        window = self._windows.setdefault(key, deque(maxlen=WINDOW))
        window.append(min(int(first.scores.refusal * BINS), BINS - 1))

    def collect(self) -> Iterator[Metric]:
        """The index and how many scores it rests on, of loaded profiles that have a reference."""
        index = GaugeMetricFamily(
            "steering_probe_drift_psi",
            "Population stability index of the gate's refusal probabilities against their reference.",
            labels=("profile",),
        )
        samples = GaugeMetricFamily(
            "steering_probe_drift_samples",
            f"Latest scores of a profile that the index rests on, {WINDOW} at most; below {FEWEST} there is none.",
            labels=("profile",),
        )
        loaded = {
            (bundle.digest, profile.name): (bundle, profile)
            for bundle in self._catalog.now.bundles
            for profile in bundle.profiles.values()
            if profile.gate is not None
        }
        self._windows = {key: window for key, window in self._windows.items() if key in loaded}
        told: set[str] = set()
        for key, (bundle, profile) in loaded.items():
            reference, label = self._reference(bundle, profile), self._labels.profile(profile.name)
            if not any(reference) or label in told:  # of two bundles' profiles of one name, the first
                continue
            told.add(label)
            window = self._windows.get(key, ())
            samples.add_metric((label,), len(window))
            if len(window) >= FEWEST:
                observed = [0] * BINS
                for bin_ in window:
                    observed[bin_] += 1
                index.add_metric((label,), stability_index(_grouped(reference), _grouped(observed)))
        yield index
        yield samples

    def _reference(self, bundle: BundleView, profile: ProfileView) -> Sequence[int]:
        for name in (f"{bundle.name}/{profile.name}", profile.name):
            if name in self._references:
                return self._references[name]
        return bundle.references.get(profile.gate.probe.name, ()) if profile.gate else ()


def _grouped(counts: Sequence[int]) -> list[int]:
    width = BINS // GROUPS
    return [sum(counts[start : start + width]) for start in range(0, BINS, width)]
