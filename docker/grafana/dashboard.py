"""The dashboard in Grafana's JSON: `python docker/grafana/dashboard.py` writes `dashboards/trimtab.json`.

Knows nothing of the server: that each query's metrics exist is for the tests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from panel import GREEN, Kind, Panel, Row
from rows import ROWS

TARGET = Path(__file__).parent / "dashboards" / "trimtab.json"
SOURCE = {"type": "prometheus", "uid": "${source}"}
COLUMNS = 24


def dashboard() -> dict[str, Any]:
    """The whole dashboard, as Grafana imports it."""
    return {
        "uid": "trimtab",
        "title": "Trimtab",
        "description": "What was refused and why, what steering costs, and how the service does.",
        "tags": ["trimtab", "vllm"],
        "schemaVersion": 42,
        "version": 1,
        "editable": True,
        "fiscalYearStartMonth": 0,
        "graphTooltip": 1,
        "links": [],
        "liveNow": False,
        "preload": False,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timepicker": {},
        "timezone": "browser",
        "weekStart": "",
        "annotations": {"list": []},
        "templating": {"list": [_source(), _instance()]},
        "panels": list(_placed(ROWS)),
    }


def _placed(rows: tuple[Row, ...]) -> Iterator[dict[str, Any]]:
    """Panels from left to right, in lines as high as their highest, each row under its heading."""
    identity, top = 0, 0
    for row in rows:
        identity += 1
        place = {"h": 1, "w": COLUMNS, "x": 0, "y": top}
        yield {"id": identity, "type": "row", "title": row.title, "collapsed": False, "panels": [], "gridPos": place}
        top, left, height = top + 1, 0, 0
        for panel in row.panels:
            if left + panel.width > COLUMNS:
                top, left, height = top + height, 0, 0
            identity += 1
            place = {"h": panel.height, "w": panel.width, "x": left, "y": top}
            yield {"id": identity, "gridPos": place, **_panel(panel)}
            left, height = left + panel.width, max(height, panel.height)
        top += height


def _panel(panel: Panel) -> dict[str, Any]:
    is_instant = panel.kind == "table"
    targets = [
        {
            "refId": "ABCDEFGH"[number],
            "datasource": SOURCE,
            "expr": query.expr,
            "legendFormat": query.name or "__auto",
            "editorMode": "code",
            "instant": is_instant,
            "range": not is_instant,
            "format": {"table": "table", "heatmap": "heatmap"}.get(panel.kind, "time_series"),
        }
        for number, query in enumerate(panel.queries)
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "targets": targets,
        "transformations": _columns(panel) if is_instant else [],
        "fieldConfig": {"defaults": _field(panel), "overrides": _counts(panel)},
        "options": OPTIONS[panel.kind],
    }


def _field(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": GREEN, "value": None}]
    steps += [{"color": colour, "value": value} for value, colour in panel.steps]
    field: dict[str, Any] = {
        "unit": panel.unit,
        "color": {"mode": "thresholds" if panel.kind == "stat" else "palette-classic"},
        "thresholds": {"mode": "absolute", "steps": steps},
        "mappings": [],
    }
    low, high = panel.limits
    field |= {} if low is None else {"min": low}
    field |= {} if high is None else {"max": high}
    if panel.kind == "timeseries":
        field["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 20 if panel.is_stacked else 0,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"group": "A", "mode": "normal" if panel.is_stacked else "none"},
            "thresholdsStyle": {"mode": "line" if panel.steps else "off"},
        }
    return field


def _columns(panel: Panel) -> list[dict[str, Any]]:
    """A table has one line a series, whatever query it came from."""
    return [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {"excludeByName": {"Time": True}, "renameByName": dict(panel.renamed)}},
    ]


def _counts(panel: Panel) -> list[dict[str, Any]]:
    """In a table of shares the column n is none."""
    if panel.kind != "table" or panel.unit == "short":
        return []
    unit = [{"id": "unit", "value": "short"}, {"id": "decimals", "value": 0}]
    return [{"matcher": {"id": "byName", "options": "n"}, "properties": unit}]


OPTIONS: dict[Kind, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "percentChangeColorMode": "standard",
        "showPercentChange": False,
        "orientation": "auto",
        "textMode": "auto",
        "wideLayout": True,
    },
    "heatmap": {
        "calculate": False,
        "cellGap": 1,
        "color": {
            "mode": "scheme",
            "scheme": "Oranges",
            "steps": 64,
            "exponent": 0.5,
            "fill": "dark-orange",
            "reverse": False,
        },
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "showValue": "never",
        "tooltip": {"mode": "single", "yHistogram": False},
        "yAxis": {"axisPlacement": "left", "reverse": False, "unit": "short"},
    },
    "table": {"frameIndex": 0, "showHeader": True, "cellHeight": "sm"},
}


def _source() -> dict[str, Any]:
    return {
        "name": "source",
        "label": "Source",
        "type": "datasource",
        "query": "prometheus",
        "current": {"selected": False, "text": "Prometheus", "value": "trimtab-prometheus"},
        "hide": 0,
        "includeAll": False,
        "multi": False,
        "options": [],
        "refresh": 1,
        "regex": "",
        "skipUrlSync": False,
    }


def _instance() -> dict[str, Any]:
    return {
        "name": "instance",
        "label": "Server",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": "label_values(steering_build_info, instance)", "refId": "instance"},
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "hide": 0,
        "includeAll": True,
        "multi": True,
        "options": [],
        "refresh": 2,
        "regex": "",
        "skipUrlSync": False,
        "sort": 1,
    }


def text() -> str:
    """The dashboard as the file holds it."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
