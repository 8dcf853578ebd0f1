"""The pictures of an evaluation's report, from its numbers.

Each takes what `report.json` holds and gives an SVG element, or an empty string where the numbers are not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steering.evaluate.svg import COLOURS, Frame, Point, box, drawing, text

PERCENT = (0.0, 20.0, 40.0, 60.0, 80.0, 100.0)
UNIT = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
MUTED = "var(--muted)"
DECISIONS = (("refuse", COLOURS[1]), ("abstain", "var(--pale)"), ("comply", COLOURS[2]), ("off", MUTED))


def rate_of(tallied: Mapping[str, Any] | None, judge: str) -> dict[str, Any] | None:
    """The refusal rate of one tally under one judge."""
    found = (tallied or {}).get("judges", {}).get(judge)
    return None if found is None else dict(found["refused"])


def plane(report: Mapping[str, Any], *, lowest: float = 0.0) -> tuple[str, list[str]]:
    """Over-refusal against refusal of harmful prompts, one numbered point per arm, and the names by number.

    Curves: the gate over all thresholds (hard sign; comply only) and R1's first-token threshold.

    Args:
        lowest: refusal in percent at which the vertical axis begins; what lies below is not drawn.
    """
    edge = (100 - lowest) / 40
    frame = Frame(x=(-2.5, 102.5), y=(lowest - edge, 100 + edge), width=640, height=460)
    ticks = PERCENT if lowest == 0 else [lowest + step * (100 - lowest) / 4 for step in range(5)]
    frame.axes("over-refusal of safe prompts, %", "refusal of harmful prompts, %", PERCENT, ticks)
    frame.marks.append(text(*_shifted(frame.at((0, 100)), 14, 22), "better", kind="hint"))
    curve = report["curve"]
    for name, points, colour in (
        ("hard sign at every threshold", curve["composed"].get("hard_sign", ()), COLOURS[0]),
        ("comply only, at every threshold", curve["composed"].get("comply_only", ()), COLOURS[2]),
        ("R1: first token forced at every threshold", curve["forced"], COLOURS[6]),
    ):
        kept = [place for place in _plane_points(points) if place[1] >= lowest]
        frame.path(kept, colour, dashed=True, tip=name)
    for point in curve["asked"]:
        for x, y in _plane_points([point]):
            tip = f"thresholds {point['comply_below']:g} / {point['refuse_above']:g}: {x:.1f} %, {y:.1f} %"
            if y >= lowest:
                frame.dot((x, y), COLOURS[0], radius=3.2, tip=tip)
    names = []
    points = []
    for arm, by_group in report["pooled"].items():
        over, harmful = (rate_of(by_group.get(group), report["judge"]) for group in ("over-refusal", "refusal"))
        if over is None or harmful is None:
            continue
        names.append(arm)
        if 100 * harmful["rate"] >= lowest:
            points.append((arm, len(names), over, harmful))
    # The two that matter most lie on top of the others.
    for arm, number, over, harmful in sorted(points, key=lambda point: ("auto", "unsteered").count(point[0])):
        colour = COLOURS[1] if arm == "auto" else COLOURS[4] if arm == "unsteered" else MUTED
        place = (100 * over["rate"], 100 * harmful["rate"])
        upright = (max(lowest, 100 * harmful["low"]), 100 * harmful["high"])
        frame.cross(place, (100 * over["low"], 100 * over["high"]), upright, colour)
        frame.dot(place, colour, radius=9, label=str(number), tip=f"{arm}: {place[0]:.1f} %, {place[1]:.1f} %")
    return frame.done("over-refusal against refusal, per arm") if names else "", names


def histograms(by_suite: Mapping[str, Sequence[int]], groups: Mapping[str, str]) -> str:
    """A row of bars per suite: how its prompts' probabilities of refusal spread over 0…1."""
    if not by_suite:
        return ""
    colours = {
        "over-refusal": COLOURS[2],
        "refusal": COLOURS[1],
        "attacks": COLOURS[3],
        "topic": COLOURS[4],
        "ability": COLOURS[0],
    }
    left, width, row = 150.0, 460.0, 34.0
    marks = []
    for index, (suite, counts) in enumerate(by_suite.items()):
        foot = 10 + (index + 1) * row
        marks.append(text(left - 8, foot - 6, suite, anchor="end", kind="tick"))
        most, total, step = max(counts) or 1, sum(counts), width / len(counts)
        for place, count in enumerate(counts):
            height = (row - 8) * count / most
            low, high = place / len(counts), (place + 1) / len(counts)
            tip = f"{suite}: {count} of {total} prompts at {low:.2f} to {high:.2f}"
            colour = colours.get(groups.get(suite, ""), MUTED)
            marks.append(box(left + place * step, foot - height, step - 1, height, colour, tip))
    bottom = 10 + len(by_suite) * row
    marks += [text(left + width * tick, bottom + 16, f"{tick:g}", anchor="middle", kind="tick") for tick in UNIT]
    marks.append(text(left + width / 2, bottom + 34, "probability of refusal", anchor="middle", kind="axis"))
    return drawing(left + width + 20, bottom + 42, marks, "probe scores by suite")


def roc_curves(curves: Mapping[str, Mapping[str, Any]]) -> str:
    """True against false positives of the probe."""
    known = {name: curve for name, curve in curves.items() if curve["points"]}
    if not known:
        return ""
    frame = Frame(x=(0, 1), y=(0, 1), width=430, height=380)
    frame.axes("false positive rate", "true positive rate", UNIT, UNIT)
    frame.path([(0, 0), (1, 1)], MUTED, dashed=True)
    for index, (name, curve) in enumerate(known.items()):
        colour = COLOURS[index]
        frame.path([(alarms, hits) for _, alarms, hits in curve["points"]], colour, tip=name)
        y = frame.height - frame.bottom - 14 - 17 * (len(known) - 1 - index)
        frame.marks.append(box(frame.left + 96, y - 9, 12, 4, colour))
        frame.marks.append(text(frame.left + 114, y - 4, f"{name}: {curve['auc']:.3f}", kind="tick"))
    return frame.done("ROC of the probe")


def calibration_curve(bins: Sequence[Mapping[str, float]]) -> str:
    """Mean probability against the share to be refused."""
    if not bins:
        return ""
    frame = Frame(x=(0, 1), y=(0, 1), width=430, height=380)
    frame.axes("mean probability in the bin", "share to be refused", UNIT, UNIT)
    frame.path([(0, 0), (1, 1)], MUTED, dashed=True)
    frame.path([(entry["mean"], entry["share"]) for entry in bins], COLOURS[0])
    most = max(entry["n"] for entry in bins)
    for entry in bins:
        tip = f"{entry['n']:g} prompts: mean {entry['mean']:.2f}, share {entry['share']:.2f}"
        frame.dot((entry["mean"], entry["share"]), COLOURS[0], radius=3 + 7 * (entry["n"] / most) ** 0.5, tip=tip)
    return frame.done("calibration of the probe")


def decisions(by_suite: Mapping[str, Mapping[str, int]]) -> str:
    """What the gate decided, as a bar per suite."""
    if not by_suite:
        return ""
    left, width, row = 150.0, 460.0, 26.0
    marks = []
    known = {suite: counts for suite, counts in by_suite.items() if counts}
    for index, (suite, counts) in enumerate(known.items()):
        top, total, x = 12 + index * row, sum(counts.values()), left
        marks.append(text(left - 8, top + 14, suite, anchor="end", kind="tick"))
        for name, colour in DECISIONS:
            share = counts.get(name, 0) / total
            marks.append(
                box(x, top, width * share, row - 8, colour, f"{suite}: {name} {counts.get(name, 0)} of {total}")
            )
            if share > 0.07:
                kind = "cell" if name == "abstain" else "onbar"
                label = f"{100 * share:.0f} %"
                marks.append(text(x + width * share / 2, top + 13, label, anchor="middle", kind=kind))
            x += width * share
    bottom = 12 + len(known) * row
    for index, (name, colour) in enumerate(DECISIONS[:3]):
        marks += [box(left + 110 * index, bottom + 6, 12, 12, colour), text(left + 110 * index + 18, bottom + 16, name)]
    return drawing(left + width + 20, bottom + 26, marks, "the gate's decisions by suite")


def curves(
    series: Mapping[str, Sequence[Point]],
    x_label: str,
    y_label: str,
    *,
    is_percent: bool = True,
    floor: float = 0.0,
    label: str = "",
) -> str:
    """Lines with dots over numbers, such as layers or strengths; `floor` is where the vertical axis begins."""
    known = {name: sorted(points) for name, points in series.items() if points}
    if not known:
        return ""
    xs = [x for points in known.values() for x, _ in points]
    ys = [y for points in known.values() for _, y in points]
    top = 100.0 if is_percent else 1.0 if max(ys) <= 1 else max(ys)
    low = 0.0 if is_percent else min(floor, *ys)
    frame = Frame(x=(min(xs), max(xs)), y=(low, top), width=680, height=330, right=270)
    ticks = sorted(set(xs)) if len(set(xs)) <= 12 else _even(min(xs), max(xs))
    frame.axes(x_label, y_label, ticks, PERCENT if is_percent else _even(low, top))
    for index, (name, points) in enumerate(known.items()):
        colour = COLOURS[index % len(COLOURS)]
        frame.path(points, colour, tip=name)
        for x, y in points:
            frame.dot((x, y), colour, radius=2.6, tip=f"{name}: {x:g} → {y:.3g}")
        y = frame.top + 10 + 17 * index
        frame.marks += [box(frame.width - 255, y - 6, 12, 4, colour), text(frame.width - 237, y, name, kind="tick")]
    return frame.done(label or y_label)


def heatmap(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], *, is_signed: bool = False
) -> str:
    """A table of numbers as colours; counts are shaded by row, signed numbers by size and sign."""
    if not rows or not columns:
        return ""
    left, top, cell, high = 210.0, 132.0, 62.0, 30.0
    marks = []
    for column, name in enumerate(columns):
        x = left + (column + 0.5) * cell
        marks.append(
            f'<g transform="rotate(-38 {x:.1f} {top - 8:.1f})">{text(x, top - 8, _short(name), kind="tick")}</g>'
        )
    for row, name in enumerate(rows):
        y = top + row * high
        marks.append(text(left - 8, y + 19, _short(name), anchor="end", kind="tick"))
        total = sum(map(abs, values[row])) or 1
        for column, value in enumerate(values[row]):
            strength = min(1.0, abs(value)) if is_signed else abs(value) / total
            colour = COLOURS[1] if is_signed and value < 0 else COLOURS[0]
            tip = f"{name} × {columns[column]}: {value:g}"
            marks.append(box(left + column * cell, y, cell - 2, high - 2, colour, tip, 0.08 + 0.72 * strength))
            shown = f"{value:.2f}" if is_signed else f"{value:g}"
            marks.append(text(left + (column + 0.5) * cell - 1, y + 19, shown, anchor="middle", kind="cell"))
    return drawing(left + len(columns) * cell + 70, top + len(rows) * high + 6, marks, "table of counts or cosines")


def differences(
    entries: Sequence[tuple[str, Mapping[str, Any]]], unit: str = "points", *, is_more_better: bool = False
) -> str:
    """Differences with their intervals around zero, one row each; coloured by whether they are for the better."""
    if not entries:
        return ""
    ends = [abs(100 * facts[name]) for _, facts in entries for name in ("low", "high")]
    reach = max(5.0, *ends) * 1.08
    frame = Frame(x=(-reach, reach), y=(0, len(entries)), width=640, height=44 + 24 * len(entries) + 46, left=250)
    frame.axes(f"difference in {unit}", "", _even(-reach, reach), ())
    frame.path([(0, 0), (0, len(entries))], MUTED)
    for index, (name, facts) in enumerate(entries):
        y = len(entries) - index - 0.5
        low, high, middle = (100 * facts[key] for key in ("low", "high", "difference"))
        colour = MUTED if low <= 0 <= high else COLOURS[2] if (middle > 0) == is_more_better else COLOURS[1]
        frame.path([(low, y), (high, y)], colour)
        tip = f"{name}: {middle:+.1f} [{low:+.1f}, {high:+.1f}], n={facts['n']}"
        frame.dot((middle, y), colour, tip=tip)
        place = frame.at((0, y))
        frame.marks.append(text(frame.left - 10, place[1] + 4, name, anchor="end", kind="tick"))
    return frame.done("differences with intervals")


def _plane_points(points: Sequence[Mapping[str, Any]]) -> list[Point]:
    return [
        (100 * groups["over-refusal"]["rate"], 100 * groups["refusal"]["rate"])
        for point in points
        if {"over-refusal", "refusal"} <= set(groups := point["groups"])
    ]


def _even(low: float, high: float) -> list[float]:
    """About five round ticks between two numbers, zero among them where it is inside."""
    span = high - low or 1.0
    step = next(size for size in _sizes() if span / size <= 6)
    first = int(low // step)
    found = [round(step * place, 10) for place in range(first, int(high // step) + 1)]
    return [tick for tick in found if low <= tick <= high]


def _sizes() -> list[float]:
    return [base * 10.0**power for power in range(-6, 7) for base in (1, 2, 5)]


def _shifted(point: Point, x: float, y: float) -> Point:
    return point[0] + x, point[1] + y


def _short(name: str) -> str:
    return name if len(name) <= 30 else name[:29] + "…"
