"""The folder of the bundle that is served: what an evaluation may take from it beside the API.

Token ids, the data it was fitted on, and the pictures of its fit. Knows nothing of HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steering.bundle import Bundle, load_bundle
from steering.errors import OperatorError
from steering.fit.intervals import Rate


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServedBundle:
    """A checked bundle and what its fit reported.

    Attributes:
        bundle: in memory.
        report: its report.json; empty where there is none.
    """

    bundle: Bundle
    report: dict[str, Any]

    @property
    def respond_id(self) -> int | None:
        """Id of `[respond]`; None where the model has none."""
        respond = self.bundle.manifest.respond
        return None if respond is None else respond.token_id

    @property
    def fitted_on(self) -> frozenset[str]:
        """Names of the data sets in the provenance of any edit or probe."""
        manifest = self.bundle.manifest
        told = [record.provenance for record in manifest.edits] + [record.provenance for record in manifest.probes]
        return frozenset(str(file).partition("/")[0] for one in told for file in dict(one.get("data") or {}))

    @property
    def operating_points(self) -> list[dict[str, Any]]:
        """Thresholds of the probes, and what they cost where they were chosen."""
        return [
            {"probe": probe.name, "layer": probe.layer, **point.model_dump()}
            for probe in self.bundle.manifest.probes
            for point in probe.operating_points
        ]


def probe_error(served: ServedBundle) -> dict[str, Any]:
    """How often the response probe errs on held answers, by the labels it was fitted to."""
    told = served.report.get("response", {})
    if "accuracy" not in told:
        return {"error": "a response probe of a bundle without a report of its fit"}
    known = told["refusals_told"]
    return {
        "against": f"held answers of the model it was fitted on, labelled by {told['labels']}",
        "n": told["accuracy"]["n"],
        "accuracy": told["accuracy"],
        "false_positives": told["answers_called_refusals"],
        "false_negatives": Rate(count=known["n"] - known["count"], n=known["n"]).to_json(),
    }


def open_served(path: Path, labels: Sequence[str]) -> ServedBundle:
    """Read the folder and make sure that a server has it loaded.

    Args:
        labels: of the bundles a server says it has.

    Raises:
        OperatorError: the server has another bundle.
        BundleError: the folder holds no valid bundle.
    """
    bundle = load_bundle(path)
    if bundle.label not in labels:
        raise OperatorError(
            f"the bundle in {path} is {bundle.label}, the server has {list(labels)}: give the one it serves"
        )
    file = path / "report.json"
    report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return ServedBundle(bundle=bundle, report=report if isinstance(report, dict) else {})
