"""A panel: a question and the queries that answer it.

Knows nothing of how Grafana spells them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

HERE = 'instance=~"$instance"'
GREEN, YELLOW, RED = "green", "yellow", "red"
CHAT = "/v1/(chat/completions|completions|responses)"

Kind = Literal["timeseries", "stat", "heatmap", "table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One query and what its series are called; `{{label}}` in a name is that label's value."""

    expr: str
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel.

    Attributes:
        title: what is asked, in a few words.
        text: how to read the answer.
        queries: what answers it.
        unit: as Grafana names it.
        kind: how it is drawn.
        width, height: in columns of 24 and in rows.
        steps: values from which on a colour holds; green below the first.
        limits: lowest and highest value of the axis.
        is_stacked: series add up.
        renamed: columns of a table, by the name that Grafana gives them.
    """

    title: str
    text: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: Kind = "timeseries"
    width: int = 8
    height: int = 8
    steps: tuple[tuple[float, str], ...] = ()
    limits: tuple[float | None, float | None] = (0, None)
    is_stacked: bool = False
    renamed: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


def q(expr: str, name: str = "") -> Query:
    """A query; HERE and CHAT in it stand for what they name."""
    return Query(expr=expr.replace("HERE", HERE).replace("CHAT", CHAT), name=name)


def rate(metric: str, *by: str, where: str = "HERE") -> str:
    """Events per second, summed over replicas; one series where no label is named."""
    total = f"sum by ({', '.join(by)}) " if by else "sum"
    return f"{total}(rate({metric}{{{where}}}[$__rate_interval]))"


def quantile(share: float, metric: str, *by: str, where: str = "HERE") -> str:
    """A quantile of a histogram over 10 minutes: of fewer, p99 would be the slowest request."""
    labels = ", ".join((*by, "le"))
    return f"histogram_quantile({share}, sum by ({labels}) (rate({metric}_bucket{{{where}}}[10m])))"


def stat(title: str, expr: str, *steps: tuple[float, str], text: str, unit: str = "short") -> Panel:
    """One number."""
    return Panel(title=title, text=text, queries=(q(expr),), unit=unit, kind="stat", width=3, height=4, steps=steps)


def lines(
    title: str,
    text: str,
    *queries: Query,
    unit: str = "short",
    width: int = 8,
    steps: tuple[tuple[float, str], ...] = (),
) -> Panel:
    """Lines over time, from 0 on."""
    return Panel(title=title, text=text, queries=queries, unit=unit, width=width, steps=steps)


def shares(title: str, text: str, *queries: Query, width: int = 8) -> Panel:
    """Lines between 0 and 100 %."""
    return Panel(title=title, text=text, queries=queries, unit="percentunit", width=width, limits=(0, 1))


def stacked(title: str, text: str, query: Query, unit: str = "reqps", width: int = 8) -> Panel:
    """Lines that add up."""
    return Panel(title=title, text=text, queries=(query,), unit=unit, width=width, is_stacked=True)


def latencies(title: str, text: str, metric: str, by: str, name: str, where: str = "HERE") -> Panel:
    """Median and 99th percentile of a histogram of seconds."""
    queries = [
        q(quantile(share, metric, by, where=where), f"{label} {name}") for share, label in ((0.5, "p50"), (0.99, "p99"))
    ]
    return lines(title, text, *queries, unit="s")


def table(title: str, text: str, unit: str = "short", width: int = 8, **columns: Query) -> Panel:
    """The last values, one column a query, under its name."""
    values = ("Value",) if len(columns) == 1 else tuple(f"Value #{letter}" for letter in "ABCDEFGH")
    return Panel(
        title=title,
        text=text,
        queries=tuple(columns.values()),
        unit=unit,
        kind="table",
        width=width,
        renamed=tuple(zip(values, columns, strict=False)),
    )
