"""Pictures of the fit, from the report that a bundle carries: layer sweep, doses, cosines, operating points.

Every part is optional: bundles of other fits lack some.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from steering.evaluate import plots
from steering.evaluate.markup import figure, paragraph, table
from steering.evaluate.svg import Point


def fit_section(report: Mapping[str, Any]) -> str:
    """What of the bundle's own report there is."""
    told = report["bundle_report"]
    if not told:
        return paragraph("Give the served bundle's folder with --bundle to see its layer sweep, doses and cosines.")
    out = ""
    for name, series in _sweeps(told.get("layer_sweep")):
        drawn = plots.curves(series, "layer", "%", label=f"layer sweep {name}")
        out += figure(drawn, f"Layer sweep {name}, measured where the bundle was fitted, on calibration prompts.")
    for name, series in _doses(told):
        drawn = plots.curves(series, "strength", "%", label=f"doses of {name}")
        out += figure(drawn, f"Doses of {name}, on calibration prompts.")
    for purpose, found in (told.get("cosines") or {}).items():
        if {"names", "cosines"} <= set(found):
            drawn = plots.heatmap(found["names"], found["names"], found["cosines"], is_signed=True)
            out += figure(drawn, f"Cosines of the directions that the {purpose} edits add.")
    points = told.get("operating_points") or []
    if points:
        rows = [
            [
                point["probe"],
                point["name"],
                f"{point['threshold']:.3f}",
                f"{100 * point['true_positive_rate']:.1f}",
                f"{100 * point['false_positive_rate']:.1f}",
                f"{point['positives']} / {point['negatives']}",
            ]
            for point in points
        ]
        heads = ["probe", "operating point", "threshold", "true positives, %", "false positives, %", "n of either"]
        out += table(heads, rows)
    return out


def _rate(facts: Any) -> float | None:
    rate = facts.get("rate") if isinstance(facts, Mapping) else facts
    return 100 * float(rate) if isinstance(rate, int | float) else None


def _sweeps(found: Any) -> Iterator[tuple[str, dict[str, list[Point]]]]:
    """Per variant, the best that each side of a dose reached at each layer."""
    if not isinstance(found, Mapping):
        return
    for variant, sweep in found.items():
        layers = sweep.get("layers") if isinstance(sweep, Mapping) else None
        if not isinstance(layers, list):
            continue
        series: dict[str, list[Point]] = {}
        for entry in layers:
            for side, pick in (("refuse", max), ("comply", min)):
                rates = [
                    rate
                    for dose in entry.get(side) or ()
                    if isinstance(dose, Mapping) and (rate := _rate(dose.get("refused"))) is not None
                ]
                if rates:
                    series.setdefault(f"refused, {side}", []).append((entry["layer"], pick(rates)))
        if series:
            yield str(variant), series


def _doses(told: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, list[Point]]]]:
    """Per edit whose strengths were tried: every rate that is given by strength."""
    found = told.get("strength_ranges")
    for edit, facts in (found.get("edits") or found if isinstance(found, Mapping) else {}).items():
        series = {
            name.replace("_", " "): points
            for name, rates in (facts.items() if isinstance(facts, Mapping) else ())
            if (points := _by_number(rates))
        }
        if series:
            yield str(edit), series


def _by_number(rates: Any) -> list[Point]:
    """Points of a mapping from numbers to rates; empty for anything else."""
    if not isinstance(rates, Mapping):
        return []
    points = []
    for key, facts in rates.items():
        try:
            place = float(key)
        except ValueError:
            return []
        rate = _rate(facts)
        if rate is not None:
            points.append((place, rate))
    return points
