"""The report of a topic fit as one self-contained page: no script, nothing fetched, readable in light and in dark.

Sections take what the bundle's `report.json` holds; one whose stage did not run is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from steering.evaluate import plots
from steering.evaluate.markup import cell, details, figure, list_of, paragraph, table
from steering.evaluate.page_style import STYLE
from steering.evaluate.svg import COLOURS, Frame, Point, box, text
from steering.evaluate.table1_topics import topics_table1

Report = Mapping[str, Any]
ROLES = {"refused": "topic, refused", "safety": "harmful, refused", "answered": "answered prompts, refused"}
_DEEP = 16
"""Layers from which a heat map of all of them would be wider than a page."""


def write_topics_page(report: Report, path: Path) -> None:
    """Draw the report into a file."""
    path.write_text(topics_page(report), encoding="utf-8")


def topics_page(report: Report) -> str:
    """The whole page."""
    title = f"Refusal of a topic: {report['bundle']}"
    body = "".join(
        f"<section><h2>{escape(name)}</h2>{drawn}</section>" for name, section in SECTIONS if (drawn := section(report))
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1>{_lead(report)}</header>{body}</main></body></html>\n"
    )


def table1_topics_section(told: Mapping[str, Any]) -> str:
    """P2's Table 1, two columns for each of its own: paper and here."""
    heads = ["model", "trained on", "configuration"]
    heads += [f"{name}: {which}" for name in told["columns"] for which in ("paper", "here")]
    rows = []
    for row in told["rows"]:
        cells = [f"{escape(row['model'])}: {escape(row['arm'])}", escape(row["trained"]), escape(row["configuration"])]
        for paper, here in zip(row["paper"], row["here"], strict=True):
            cells += [f"{paper:.2f}", "" if here is None else cell(here)]
        rows.append(cells)
    commands = escape("\n".join(told["commands"]))
    return (
        paragraph(f"{told['source']}; percent. “here” is empty where the model or the data set is not at hand.")
        + table(heads, rows)
        + paragraph(told["note"])
        + details("Commands that fill it on a GPU host", f"<pre>{commands}</pre>")
    )


def _lead(report: Report) -> str:
    model, classes = report["model"], report["vectors"]["classes"]
    return paragraph(
        f"{model['architecture']}, {model['layers']} layers of width {model['hidden_size']}. Directions from "
        f"{classes['refused']} refused, {classes['answered']} answered and {classes['neutral']} neutral prompts, "
        f"{report['settings']['samples']} sampled answers to each, judge: {report['judge']['name']}. "
        f"{report['scope_note']} Made with version {report['code']}."
    )


def _compared(report: Report) -> str:
    compared = report.get("compare")
    if not compared:
        return ""
    told = paragraph(f"Default: {report['default']['arm']}. {report['default']['reason']}.")
    for use, title in (("calibrate", "Calibration prompts, on which all was chosen"), ("test", "Test prompts")):
        if not any(facts["n"] for facts in compared["unsteered"][use].values()):
            continue
        rows = [["unsteered", *(cell(compared["unsteered"][use][role]) for role in ROLES), "0", "", ""]]
        rows += [
            [
                f"<b>{escape(arm['name'])}</b>" if arm["name"] == report["default"]["arm"] else escape(arm["name"]),
                *(cell(arm["rates"][use][role]) for role in ROLES),
                f"{arm['shift']:.4f}",
                "" if arm["comply_below"] is None else f"{arm['comply_below']:.3f}",
                '<span class="yes">kept</span>' if arm["is_safe"] else '<span class="no">broken</span>',
            ]
            for arm in compared["arms"]
        ]
        heads = ["arm", *ROLES.values(), "shift, nats a token", "complies at or below", "margins"]
        told += f"<h3>{title}</h3>" + table(heads, rows)
    told += paragraph(
        "Rates in percent with 95 % Wilson intervals; n as tooltip. Gated arms are put together from answers with and "
        "without the edit by each prompt's score, as the gate does; margins are judged on calibration prompts."
    )
    checked = report.get("verify")
    if checked:
        told += paragraph(
            f"The engine's own gate, profile {checked['profile']}: the same decision on {checked['same_decision']} of "
            f"{checked['n']} prompts, the same verdict on {checked['same_verdict']}."
        )
    return told


def _found(report: Report) -> str:
    found = report.get("finder")
    if not found:
        return ""
    told = paragraph(
        f"{len(found['candidates'])} configurations, each screened on {found['screened']} prompts, the shift only of "
        f"those that removed nearly enough. {found['measured']} were measured in full, by rising shift until one "
        f"reached the target of {found['target']:.3f}: removal on {found['prompts']} refused prompts (E[c] = "
        f"{found['unsteered']:.3f} unsteered), the shift on {found['conversations']} answered conversations, without "
        "generation."
    )
    for variant in dict.fromkeys(one["variant"] for one in found["candidates"]):
        told += figure(_plane(found, variant), f"{variant}: shift against removal; hollow ones were only screened.")
    rows = [
        [
            escape(row["method"]),
            escape(row["variant"]),
            ", ".join(map(str, found["candidates"][row["candidate"]]["layers"])),
            f"{found['candidates'][row['candidate']]['alpha']:g}",
            "reposition" if found["candidates"][row["candidate"]]["is_reposition"] else "add",
            f"{row['removal']:.3f}",
            f"{row['shift']:.4f}",
            "yes" if row["is_met"] else "no",
        ]
        for row in found["chosen"]
    ]
    heads = ["method", "variant", "layers", "α", "form", "removal", "shift", "target reached"]
    return told + table(heads, rows)


def _plane(found: Mapping[str, Any], variant: str) -> str:
    mine = [
        (index, one)
        for index, one in enumerate(found["candidates"])
        if one["variant"] == variant and one["shift"] is not None
    ]
    chosen = {row["candidate"] for row in found["chosen"]}
    heights = [_height(one) for _, one in mine]
    # Doses beyond reason would press all others into a corner.
    shifts = sorted(one["shift"] for _, one in mine)
    most = max(shifts[int(0.8 * (len(shifts) - 1))], *(one["shift"] for index, one in mine if index in chosen), 1e-6)
    low, high = min(0.0, *heights), max(found["target"], *heights)
    frame = Frame(x=(0.0, most * 1.02), y=(low, high * 1.05), width=680, height=360, right=150)
    frame.axes(
        "shift L, nats a token",
        "removal Δc",
        [round(most * step / 4, 4) for step in range(5)],
        [round(low + (high - low) * step / 4, 2) for step in range(5)],
    )
    frame.path([(0.0, found["target"]), (most, found["target"])], "var(--muted)", dashed=True, tip="target")
    methods = list(dict.fromkeys(one["method"] for _, one in mine))
    for index, one in mine:
        if one["shift"] > most:
            continue
        colour = COLOURS[methods.index(one["method"])] if one["removal"] is not None else "var(--pale)"
        form = "reposition" if one["is_reposition"] else "add"
        tip = f"{one['method']} {form}, layers {one['layers']}, α {one['alpha']:g}"
        tip += f": {one['shift']:.4f}, {_height(one):.3f}"
        frame.dot((one["shift"], _height(one)), colour, radius=7 if index in chosen else 3.4, tip=tip)
    for number, method in enumerate(methods):
        y = frame.top + 10 + 17 * number
        frame.marks += [box(frame.width - 135, y - 6, 12, 4, COLOURS[number]), text(frame.width - 117, y, method)]
    return frame.done(f"finder, {variant}")


def _height(one: Mapping[str, Any]) -> float:
    return float(one["screened_removal"] if one["removal"] is None else one["removal"])


def _induced(report: Report) -> str:
    found = report.get("induction")
    if not found:
        return ""
    told = paragraph(
        "Refusals of chosen prompts against general ones by α, with the same vectors as for removal; P2 reports 25/2 % "
        "unsteered, then 40/2, 46/3, 48/3, 66/6, 68/7, 72/9 and 100/73 % by rising α (values read off its Fig. 4)."
    )
    base = found["unsteered"]["calibrate"]
    for variant, best in found["chosen"].items():
        count = found["curve"][best["candidate"]]["count"]
        rows = [row for row in found["curve"] if row["variant"] == variant and row["count"] == count]
        series: dict[str, list[Point]] = {
            name: [(0.0, 100 * base[name]["rate"])]
            + [(row["alpha"], 100 * row["rates"]["calibrate"][name]["rate"]) for row in rows]
            for name in ("topic", "general")
        }
        told += figure(plots.curves(series, "α", "refused, %", label=variant), f"{variant}, {count} layers.")
    rows_told = [
        [
            escape(row["variant"]),
            str(row["count"]),
            f"{row['alpha']:g}",
            cell(row["rates"]["calibrate"]["topic"]),
            cell(row["rates"]["calibrate"]["general"]),
            cell(row["rates"]["test"]["topic"]),
            cell(row["rates"]["test"]["general"]),
        ]
        for row in found["curve"]
    ]
    heads = ["variant", "layers", "α", "topic", "general", "topic, test", "general, test"]
    return told + details("Every configuration", table(heads, rows_told))


def _layers(report: Report) -> str:
    rows = report["layers"]["layers"]

    def series(key: str) -> dict[str, list[Point]]:
        return {
            method: [(float(row["layer"]), row[key]) for row in by_layer if row[key] is not None]
            for method, by_layer in rows.items()
        }

    return (
        figure(
            plots.curves(series("correlation"), "layer", "Pearson's r", is_percent=False),
            "Correlation of projections with the refusal confidence, calibration prompts (P2: peak 0.834 at layer 42 "
            "of 48).",
        )
        + figure(
            plots.curves(series("score"), "layer", "r - RMSE", is_percent=False),
            "The score that ranks layers. The RMSE is over projections of the wrong sign, in units of confidence.",
        )
        + paragraph("Ranking: " + "; ".join(f"{name} {order}" for name, order in report["layers"]["ranking"].items()))
    )


def _analysis(report: Report) -> str:
    found = report.get("analysis")
    if not found:
        return ""
    spread: dict[str, list[Point]] = {
        method: [(float(layer), 100 * row["largest"]) for layer, row in enumerate(rows)]
        for method, rows in found["spread"].items()
    }
    told = figure(
        plots.curves(spread, "layer", "share of magnitude, %", is_percent=False),
        f"Share of the ten largest coordinates; an even vector has {100 * found['even']:.1f} %, P2's at layer 42 of "
        "2,048 coordinates 1.9 % (even: 0.5 %).",
    )
    participation: dict[str, list[Point]] = {
        method: [(float(layer), row["participation"]) for layer, row in enumerate(rows)]
        for method, rows in found["spread"].items()
    }
    told += figure(
        plots.curves(participation, "layer", "participation", is_percent=False),
        "Participation ratio: 1 for an even vector, about a third for noise, 1/D for one coordinate.",
    )
    rows = [
        [
            layer,
            escape(method),
            f"{facts['mean']:.4f}",
            f"{facts['low']:.4f}",
            f"{facts['lowest']:.4f}",
            f"{facts['n']['refused']} / {facts['n']['answered']}, {facts['rounds']} rounds",
        ]
        for layer, by_method in found["stability"].items()
        for method, facts in by_method.items()
    ]
    heads = ["layer", "method", "mean cosine", "5 % quantile", "lowest", "n refused / answered"]
    told += details("Stability: cosines with vectors of resampled prompts", table(heads, rows), is_open=True)
    names = found["methods"]["names"]
    looked = [int(layer) for layer in found["stability"]] or [0]
    for layer in looked[:_DEEP]:
        drawn = plots.heatmap(names, names, found["methods"]["by_layer"][layer], is_signed=True)
        told += details(f"Cosines between methods, layer {layer}", drawn, is_open=len(looked) == 1)
    for method, matrix in found["layers"].items():
        if len(matrix) <= _DEEP:
            labels = [str(layer) for layer in range(len(matrix))]
            told += details(f"Cosines between layers, {method}", plots.heatmap(labels, labels, matrix, is_signed=True))
        else:
            near: dict[str, list[Point]] = {
                f"{gap} apart": [(float(layer), row[layer + gap]) for layer, row in enumerate(matrix[:-gap])]
                for gap in (1, 4, 8)
            }
            drawn = plots.curves(near, "layer", "cosine", is_percent=False)
            told += details(f"Cosines between layers, {method}", drawn)
    return told


def _gates(report: Report) -> str:
    told = "".join(paragraph(f"No {name} gate: {why}.") for name, why in report["gates"].items() if why)
    for stage, what in (("gate", "removal"), ("induce_gate", "induction")):
        found = report.get(stage)
        if not found or (stage == "gate" and report.get("induce_gate") == found):
            continue
        areas: dict[str, list[Point]] = {"area": [(float(row["layer"]), row["area"]) for row in found["layers"]]}
        told += figure(
            plots.curves(areas, "layer", "area under the ROC curve", is_percent=False, floor=0.5),
            f"The {what} gate by layer; it reads layer {found['layer']}, area {found['area']:.3f}. Above: "
            f"{', '.join(found['above'])}; below: {', '.join(found['below'])}.",
        )
        bins = [
            {"mean": one["probability"], "share": one["share"], "n": one["n"]} for one in found["calibration"]["bins"]
        ]
        told += figure(plots.calibration_curve(bins), "Its probabilities against shares.")
    return told


def _prompts(report: Report) -> str:
    counts = report["prompts"]["counts"]
    uses = ("fit", "calibrate", "test")
    rows = [[escape(role), *(str(by_use.get(use, 0)) for use in uses)] for role, by_use in counts.items()]
    told = table(["given as", *uses], rows)
    told += list_of([f"{source}: {count} prompts" for source, count in report["prompts"]["sources"].items()])
    dropped = [f"{why}: {count}" for why, count in report["prompts"]["dropped"].items()]
    told += details("Dropped", list_of(dropped)) if dropped else ""
    judged = report["judged"]
    told += paragraph(
        f"The judge {judged['judge']} on {sum(judged['verdicts'].values())} answers: "
        + ", ".join(f"{count} {name}" for name, count in judged["verdicts"].items())
        + (f"; kinds: {judged['kinds']}" if judged["kinds"] else "")
        + f"; {judged['unjudged']} prompts without a verdict."
    )
    return told + list_of(report["warnings"])


def _ranges(report: Report) -> str:
    found = report.get("ranges")
    if not found:
        return ""
    strengths: Sequence[str] = list(next(iter(found["edits"].values()))["broken"]) if found["edits"] else []
    rows = [
        [escape(name), *(f"{facts['broken'][one]} of {facts['n']}" for one in strengths), f"{facts['maximum']:g}"]
        for name, facts in found["edits"].items()
    ]
    return table(["edit", *(f"broken at {one}" for one in strengths), "certified up to"], rows)


def _table1(report: Report) -> str:
    return table1_topics_section(topics_table1({}, "", "")) if report else ""


SECTIONS: tuple[tuple[str, Callable[[Report], str]], ...] = (
    ("What it does", _compared),
    ("Induced refusals", _induced),
    ("The finder", _found),
    ("Layers", _layers),
    ("Directions", _analysis),
    ("Gates", _gates),
    ("Certified strengths", _ranges),
    ("Prompts and judge", _prompts),
    ("P2's Table 1", _table1),
)
