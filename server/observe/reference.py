"""Reference scores: how the refusal probabilities of a probe were spread where it was calibrated, or where an operator
looked at them.

Knows nothing of bundles in memory, HTTP, vLLM or torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from steering.errors import OperatorError

BINS = 20
"""Of equal width from 0 to 1: those of a fit's report. The metric `steering_probe_score` has their edges, too."""

REPORT = "report.json"

Counts = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=BINS, max_length=BINS)]

_REFERENCES: TypeAdapter[dict[str, Counts]] = TypeAdapter(
    dict[str, Counts],
    config=ConfigDict(allow_inf_nan=False),
)


def fit_reference(bundle: Path | None, layer: int) -> tuple[int, ...]:
    """How many prompts of a fit's calibration scored in each bin; empty where the bundle's report does not tell.

    A report is for people: one that cannot be read keeps no bundle from being used.

    Args:
        bundle: folder.
        layer: of the gate's probe; a report about another one is not taken.
    """
    try:
        report: Any = json.loads((bundle / REPORT).read_bytes()) if bundle else {}
        probe = report["probe"]
        groups = [group["counts"] for group in probe["histograms"].values()]
        if probe["layer"] != layer or not groups or any(len(counts) != BINS for counts in groups):
            return ()
        return tuple(sum(int(count) for count in column) for column in zip(*groups, strict=True))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ()


def read_references(path: Path) -> Mapping[str, tuple[int, ...]]:
    """The counts of an operator's file, by profile.

    Raises:
        OperatorError: the file cannot be read or is no JSON object of profiles with a count for each bin.
    """
    try:
        return _REFERENCES.validate_json(path.read_bytes(), strict=True)
    except (OSError, ValidationError) as error:
        why = error.strerror if isinstance(error, OSError) else error.errors(include_input=False)[0]["msg"]
        raise OperatorError(
            f"drift reference {path}: {why}; it has to hold {{profile: [{BINS} counts]}}, as `trimtab bundle "
            "reference-scores` writes it"
        ) from None


def references_of(exposition: str) -> dict[str, tuple[int, ...]]:
    """The scores that a server has counted in `steering_probe_score` since it started, by profile."""
    from prometheus_client.parser import text_string_to_metric_families

    below: dict[str, dict[float, float]] = {}
    for family in text_string_to_metric_families(exposition):
        if family.name == "steering_probe_score":
            for sample in family.samples:
                if sample.name.endswith("_bucket"):
                    found = below.setdefault(sample.labels["profile"], {})
                    found[float(sample.labels["le"])] = sample.value
    return {profile: _differences(found) for profile, found in below.items()}


def _differences(below: Mapping[float, float]) -> tuple[int, ...]:
    """Counts of the bins from the counts below their upper edges; a score of 0 belongs to the first bin."""
    edges = [below[round(step / BINS, 2)] for step in range(1, BINS + 1)]
    return tuple(int(high - low) for low, high in zip([0.0, *edges[:-1]], edges, strict=True))
