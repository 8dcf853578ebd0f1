"""A picture of the dashboard, drawn from what Prometheus answers to its queries, for where no Grafana runs.

    python docker/grafana/render.py --prometheus http://127.0.0.1:9090 --minutes 30 --out docker/grafana/trimtab.png

Queries, titles, units and places are those of `dashboards/trimtab.json`; the drawing is matplotlib's, not Grafana's.
Says which queries found nothing, and ends with 1 if there are any. Knows nothing of the server.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

DASHBOARD = Path(__file__).parent / "dashboards" / "trimtab.json"
POINTS = 150
COLUMN, LINE = 0.62, 0.30
"""Inches of a column of the grid and of a line of it."""
DPI = 90
COLOURS = ("#2f6f9f", "#d9822b", "#3c9d64", "#b8475a", "#7b5ea7", "#8a6d3b", "#3aa6a6", "#9aa53b", "#c06ba5", "#666666")
UNITS: dict[str, Callable[[float], str]] = {
    "percentunit": lambda value: f"{value:.0%}" if value in (0, 1) or value >= 0.1 else f"{value:.1%}",
    "s": lambda value: f"{value:.3g} s" if abs(value) >= 1 or value == 0 else f"{value * 1000:.3g} ms",
    "reqps": lambda value: f"{value:.3g} /s",
    "cps": lambda value: f"{value:.3g} /s",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line: what it is called, its labels, and [N] times and values."""

    name: str
    labels: dict[str, str]
    times: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Prometheus:
    """Answers to queries over one span of time, in seconds of the epoch."""

    address: str
    begin: float
    end: float

    def series(self, target: dict[str, Any]) -> list[Series]:
        """What a panel's query finds: at the end of the span for tables, else over it."""
        expr = target["expr"].replace("$instance", ".*").replace("$__rate_interval", "1m")
        if target["instant"]:
            found = self._ask("query", query=expr, time=self.end)
            rows = [(result["metric"], [result["value"]]) for result in found]
        else:
            step = max(5.0, (self.end - self.begin) / POINTS)
            found = self._ask("query_range", query=expr, start=self.begin, end=self.end, step=step)
            rows = [(result["metric"], result["values"]) for result in found]
        drawn = [_series(target["legendFormat"], labels, points) for labels, points in rows]
        return [series for series in drawn if len(series.values)]

    def _ask(self, what: str, **parameters: Any) -> list[dict[str, Any]]:
        response = httpx.get(f"{self.address}/api/v1/{what}", params=parameters, timeout=30)
        body = response.json()
        if body["status"] != "success":
            raise SystemExit(f"{body['errorType']}: {body['error']}\n{parameters['query']}")
        result: list[dict[str, Any]] = body["data"]["result"]
        return result


def main() -> int:
    """Draw, and say what found nothing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--end", type=float, default=time.time(), help="seconds of the epoch; now by default")
    parser.add_argument("--rows", default="", help="only rows whose title matches this pattern")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    begin = arguments.end - 60 * arguments.minutes
    source = Prometheus(address=arguments.prometheus, begin=begin, end=arguments.end)
    panels = _chosen(json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"], re.compile(arguments.rows))
    empty = draw(panels, source, arguments.out)
    asked = sum(len(panel.get("targets", ())) for panel in panels)
    sys.stderr.write("\n  ".join([f"{asked} queries, {len(empty)} found nothing", *empty]) + "\n")
    return bool(empty)


def draw(panels: list[dict[str, Any]], source: Prometheus, out: Path) -> list[str]:
    """Draw panels where the grid puts them; returns title and query of each that found nothing."""
    lines = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    mpl.rcParams.update(
        {"font.size": 7, "axes.titlesize": 8, "axes.grid": True, "grid.alpha": 0.3, "axes.linewidth": 0.5}
    )
    figure = Figure(figsize=(24 * COLUMN, lines * LINE), dpi=DPI)
    empty = []
    for panel in panels:
        place = panel["gridPos"]
        top = 1 - place["y"] / lines
        if panel["type"] == "row":
            figure.text(0.006, top - 0.75 / lines, panel["title"], fontsize=10, weight="bold")
            continue
        found = [source.series(target) for target in panel["targets"]]
        empty += [f"{panel['title']}: {t['expr']}" for t, s in zip(panel["targets"], found, strict=True) if not s]
        # The axes leave room for the title above, labels at the left, and the legend below.
        left, width = place["x"] / 24, place["w"] / 24
        box = (left + 0.035, top - (place["h"] - 2) / lines, width - 0.045, (place["h"] - 3.3) / lines)
        axes = figure.add_axes(box)
        axes.set_title(panel["title"], loc="left", weight="bold")
        if panel["type"] in ("timeseries", "heatmap"):
            axes.set_xlim(*_dates(np.array([source.begin, source.end])))
        DRAWN[panel["type"]](axes, panel, found)
        if not any(found):
            axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes, color="#999999")
    figure.savefig(out, pil_kwargs={"optimize": True})
    _shrink(out)
    return empty


def _chosen(panels: list[dict[str, Any]], pattern: re.Pattern[str]) -> list[dict[str, Any]]:
    """The rows whose title matches, moved up to where those left out were."""
    kept: list[dict[str, Any]] = []
    is_in, gap, top = False, 0, 0
    for panel in panels:
        place = panel["gridPos"]
        if panel["type"] == "row":
            is_in = bool(pattern.search(panel["title"]))
            gap = place["y"] - top
        if is_in:
            kept.append({**panel, "gridPos": {**place, "y": place["y"] - gap}})
            top = max(top, place["y"] - gap + place["h"])
    if not kept:
        raise SystemExit("no row's title matches --rows")
    return kept


def _lines(axes: Axes, panel: dict[str, Any], found: list[list[Series]]) -> None:
    series = [line for lines in found for line in lines]
    defaults = panel["fieldConfig"]["defaults"]
    if defaults["custom"]["stacking"]["mode"] == "normal" and series:
        times = np.unique(np.concatenate([line.times for line in series]))
        heights = [np.interp(times, line.times, line.values, left=0, right=0) for line in series]
        colours = [COLOURS[number % len(COLOURS)] for number in range(len(series))]
        axes.stackplot(_dates(times), heights, labels=[line.name for line in series], colors=colours, alpha=0.75)
    else:
        for number, line in enumerate(series):
            style = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.2, "label": line.name}
            axes.plot(_dates(line.times), line.values, marker="." if len(line.values) == 1 else None, **style)
    for step in defaults["thresholds"]["steps"][1:]:
        axes.axhline(
            step["value"], color={"yellow": "#c9a227", "red": "#c0392b"}[step["color"]], linewidth=0.8, ls="--"
        )
    axes.set_ylim(bottom=defaults.get("min"), top=defaults.get("max"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _shown(value, defaults["unit"])))
    _clock(axes)
    _legend(axes, is_narrow=panel["gridPos"]["w"] < 6)


def _number(axes: Axes, panel: dict[str, Any], found: list[list[Series]]) -> None:
    axes.set_axis_off()
    if found[0]:
        defaults = panel["fieldConfig"]["defaults"]
        value = float(found[0][0].values[-1])
        steps = defaults["thresholds"]["steps"]
        colour = [step["color"] for step in steps if step["value"] is None or step["value"] <= value][-1]
        shown = _shown(value, defaults["unit"])
        ink = {"green": "#2e8b57", "yellow": "#c9a227", "red": "#c0392b"}[colour]
        axes.text(0.35, 0.2, shown, ha="center", va="center", fontsize=17, color=ink, transform=axes.transAxes)


def _heat(axes: Axes, _panel: dict[str, Any], found: list[list[Series]]) -> None:
    """Buckets are cumulative: what lies in one is its count less that of the one below."""
    bounded = sorted(
        (line for line in found[0] if line.labels["le"] != "+Inf"), key=lambda line: float(line.labels["le"])
    )
    if not bounded:
        return
    times = np.unique(np.concatenate([line.times for line in bounded]))
    counts = np.array([np.interp(times, line.times, line.values, left=0, right=0) for line in bounded])
    inside = np.diff(counts, axis=0, prepend=0).clip(0)
    edges = np.array([float(line.labels["le"]) for line in bounded])
    mesh = np.ma.masked_less_equal(inside[1:], 0)
    axes.pcolormesh(_dates(times), edges, mesh[:, 1:], cmap="Oranges", norm="log" if mesh.count() else None)
    axes.set_ylim(0, 1)
    _clock(axes)


def _table(axes: Axes, panel: dict[str, Any], found: list[list[Series]]) -> None:
    """One line a set of labels, one column a query."""
    axes.set_axis_off()
    (_, organise) = panel["transformations"]
    names = organise["options"]["renameByName"]
    columns = [names.get("Value" if len(found) == 1 else f"Value #{'ABCDEFGH'[n]}", "") for n in range(len(found))]
    labels = sorted({label for lines in found for line in lines for label in line.labels if label != "__name__"})
    rows: dict[tuple[str, ...], list[str]] = {}
    for number, lines in enumerate(found):
        is_count = columns[number] in ("n", "servers")
        unit = panel["fieldConfig"]["defaults"]["unit"]
        for line in lines:
            key = tuple(line.labels.get(label, "") for label in labels)
            rows.setdefault(key, [""] * len(found))[number] = (
                f"{line.values[-1]:.0f}" if is_count else _shown(float(line.values[-1]), unit)
            )
    cells = [[*(value[:28] for value in key), *values] for key, values in sorted(rows.items())]
    if cells:
        table = axes.table(cells, colLabels=[*labels, *columns], loc="upper left", cellLoc="left", edges="horizontal")
        table.auto_set_font_size(value=False)
        table.set_fontsize(6.5)
        table.auto_set_column_width(range(len(labels) + len(columns)))


DRAWN: dict[str, Callable[[Axes, dict[str, Any], list[list[Series]]], None]] = {
    "timeseries": _lines,
    "stat": _number,
    "heatmap": _heat,
    "table": _table,
}


def _series(legend: str, labels: dict[str, str], points: Iterable[tuple[float, str]]) -> Series:
    """The points that are numbers, under the name that the legend makes of the labels."""
    name = re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), legend)
    numbers = np.array([(moment, float(value)) for moment, value in points], dtype=float).reshape(-1, 2)
    numbers = numbers[np.isfinite(numbers[:, 1])]
    return Series(name=name, labels=labels, times=numbers[:, 0], values=numbers[:, 1])


def _shown(value: float, unit: str) -> str:
    if unit in UNITS:
        return UNITS[unit](value)
    return f"{value:.0f}" if value == round(value) or abs(value) >= 100 else f"{value:.3g}"


def _legend(axes: Axes, *, is_narrow: bool) -> None:
    """Below the axes, as many names as there is room for."""
    handles, names = axes.get_legend_handles_labels()
    room = 3 if is_narrow else 6
    if len(names) > room:
        names[room - 1] += f" and {len(names) - room} more"
    style = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.1), "fontsize": 6, "frameon": False, "handlelength": 1}
    if names:
        axes.legend(handles[:room], names[:room], ncols=1 if is_narrow else 2, **style)


def _dates(times: np.ndarray) -> np.ndarray:
    return date2num(times.astype("datetime64[s]"))


def _clock(axes: Axes) -> None:
    locator = AutoDateLocator(maxticks=max(3, int(axes.get_position().width * 28)))
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, show_offset=False))


def _shrink(path: Path) -> None:
    """64 colours are enough for lines and letters."""
    from PIL import Image

    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(colors=64)
    small.save(path, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
