"""Pictures of the fit, from the report that a bundle carries: layers, doses, cosines, gates, comparisons.

Everything here was measured on calibration prompts, where the bundle was fitted. Every part is optional: bundles of
other fits lack some.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from steering.evaluate import plots
from steering.evaluate.markup import details, figure, paragraph, table
from steering.evaluate.svg import COLOURS, Point

Facts = Mapping[str, Any]
Series = dict[str, list[Point]]


def fit_section(report: Facts) -> str:
    """What of the bundle's own report there is."""
    told = report["bundle_report"]
    if not told:
        return paragraph("Give the served bundle's folder with --bundle to see its layer sweep, doses and cosines.")
    out = paragraph("From the bundle's own report: measured where it was fitted, on calibration prompts.")
    out += "".join(
        figure(
            plots.curves(series, "layer", "refused, %", label=f"layer sweep {name}"), f"Layer sweep, variant {name}."
        )
        for name, series in _sweeps(_mapping(told.get("layers") or told.get("layer_sweep")))
    )
    out += figure(
        plots.curves(_probe_layers(told), "layer", "area under the ROC curve", is_percent=False, floor=0.5),
        "The probe by layer: against borderline and contrast prompts (contested) and against all.",
    )
    drawn = "".join(
        figure(plots.curves(series, "multiple of the difference of means", "%", label=name), name)
        for name, series in _doses(told)
    )
    out += details("Dose curves", drawn) if drawn else ""
    out += figure(
        plots.curves(_frontiers(told), "over-refusal, %", "refusal, %"),
        "What each family of edits reaches by its thresholds on calibration prompts.",
    )
    cosines = _mapping(told.get("cosines"))
    if {"names", "cosines"} <= set(cosines):
        names = cosines["names"]
        out += figure(plots.heatmap(names, names, cosines["cosines"], is_signed=True), "Cosines of the directions.")
    head = _mapping(told.get("head"))
    if {"categories", "confusion"} <= set(head):
        drawn = plots.heatmap(head["categories"], head["categories"], head["confusion"])
        out += figure(drawn, "The category head on calibration prompts: label by row, answer by column.")
    return out + _points(told) + _rounds(told)


def _mapping(found: Any) -> Facts:
    return found if isinstance(found, Mapping) else {}


def _rate(facts: Any) -> float | None:
    rate = facts.get("rate") if isinstance(facts, Mapping) else facts
    return 100 * float(rate) if isinstance(rate, int | float) else None


def _sweeps(found: Facts) -> Iterator[tuple[str, Series]]:
    """Per variant, what the chosen dose of either side did at each layer."""
    for variant, sweep in found.items():
        series: Series = {}
        for entry in _mapping(sweep).get("layers") or ():
            for side, chosen in _mapping(_mapping(entry).get("chosen")).items():
                rate = _rate(_mapping(chosen).get("refused"))
                if rate is not None:
                    series.setdefault(f"steered to {side}", []).append((entry["layer"], rate))
        if series:
            yield str(variant), series


def _probe_layers(told: Facts) -> Series:
    series: Series = {}
    for entry in _mapping(told.get("probe")).get("layers") or ():
        for name in ("contested", "all"):
            if isinstance(_mapping(entry).get(name), float):
                series.setdefault(name, []).append((entry["layer"], entry[name]))
    return series


def _doses(told: Facts) -> Iterator[tuple[str, Series]]:
    """Charts of what doses did, each of edits of one purpose and few enough to tell their colours apart."""
    edits = _mapping(_mapping(told.get("doses")).get("edits"))
    for what in ("refused", "malformed"):
        for purpose in ("refuse", "comply"):
            series: Series = {}
            for name, facts in edits.items():
                if _mapping(facts).get("purpose") != purpose:
                    continue
                points = [
                    (float(entry["multiple"]), rate)
                    for entry in facts.get("curve") or ()
                    if (rate := _rate(entry.get(what))) is not None
                ]
                if points:
                    series[str(name)] = points
            names = list(series)
            for start in range(0, len(names), len(COLOURS)):
                yield (
                    f"{what} answers under edits to {purpose}",
                    {name: series[name] for name in names[start : start + len(COLOURS)]},
                )


def _frontiers(told: Facts) -> Series:
    """Per family of edits, the best refusal at each over-refusal."""
    series: Series = {}
    for name, facts in _mapping(_mapping(told.get("gate")).get("families")).items():
        rates = [_mapping(point.get("rates")) for point in _mapping(facts).get("frontier") or ()]
        points = [(100 * rate["over"], 100 * rate["refuse"]) for rate in rates if {"over", "refuse"} <= set(rate)]
        if len(points) > 1:
            series[str(name)] = points
    return series


def _points(told: Facts) -> str:
    points = told.get("operating_points") or []
    rows = [
        [
            escape(point["probe"]),
            escape(point["name"]),
            f"{point['threshold']:.3f}",
            f"{100 * point['true_positive_rate']:.1f}",
            f"{100 * point['false_positive_rate']:.1f}",
            f"{point['positives']} / {point['negatives']}",
        ]
        for point in points
    ]
    heads = ["probe", "operating point", "threshold", "true positives, %", "false positives, %", "n of either"]
    return table(heads, rows) if rows else ""


def _rounds(told: Facts) -> str:
    """The comparisons that chose the default profile, and those that only show what settings left out."""
    compared = _mapping(told.get("compare"))
    out = ""
    for title, key, names in (
        ("Comparisons that chose the default", "rounds", ("what", "kept", "lost")),
        ("Shown beside what settings put in place", "beside", ("what", "in_place", "beside", "measured")),
    ):
        rows = [
            [escape(str(one.get(name, ""))) for name in names]
            for one in compared.get(key) or ()
            if isinstance(one, Mapping)
        ]
        if rows:
            out += details(title, table([name.replace("_", " ") for name in names], rows))
    return out
