"""What is monitored: the queries of rules and dashboard, which series they ask for, and which the gateway exports.

Reads names and label names alone; whether a query is right is Prometheus' to say.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from server.app import create_gateway
from server.settings import Settings
from tests.fakes import FakeEngine, make_bundle, make_catalog, make_gated_bundle

ROOT = Path(__file__).resolve().parents[1]
RULES = ROOT / "docker" / "prometheus"
GRAFANA = ROOT / "docker" / "grafana"

SERIES = re.compile(r"((?:[a-z_]+:)?steering_[a-z_]+(?::[a-z0-9_]+)?|vllm:[a-z_]+|process_[a-z_]+)\b(?:\{([^}]*)\})?")
GROUPING = re.compile(r"\b(?:by|on|without)\s*\(([^)]*)\)")
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def rules(name: str) -> list[dict[str, Any]]:
    """The rules of one file."""
    loaded = yaml.safe_load((RULES / name).read_text(encoding="utf-8"))
    return [rule for group in loaded["groups"] for rule in group["rules"]]


@functools.cache
def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana is given it."""
    loaded: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "trimtab.json").read_text(encoding="utf-8"))
    return loaded


def panels() -> list[dict[str, Any]]:
    """Its panels, without the headings."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def every_expression() -> Iterator[tuple[str, str]]:
    """Every query of ours, with where it is."""
    for rule in rules("recording.yaml"):
        yield rule["record"], rule["expr"]
    for rule in rules("alerts.yaml"):
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def asked(expression: str) -> Iterator[tuple[str, set[str]]]:
    """The series that an expression names, each with the labels that its selector and every grouping use."""
    grouped = {label for found in GROUPING.findall(expression) for label in re.findall(r"\w+", found)}
    bare = GROUPING.sub("", expression)
    for series, selector in SERIES.findall(bare):
        yield series, grouped | set(re.findall(r"(\w+)\s*[!=]~?", selector))


async def counted() -> Mapping[str, set[str]]:
    """The series of a gateway with everything configured, each with its labels."""
    settings = Settings(
        canary_interval=3600, judge_url="http://127.0.0.1:9/v1", judge_model="none", judge_profiles=("*",)
    )
    engine = FakeEngine()
    gateway = create_gateway(engine, make_catalog(make_gated_bundle(), make_bundle()), settings)
    await gateway.observation.start(engine, gateway.service, gateway.catalog)
    try:
        collectors: list[Any] = list(gateway.metrics.registry._collector_to_names)
        return {
            family.name + suffix: set(getattr(family, "_labelnames", None) or getattr(collector, "_labelnames", ()))
            for collector in collectors
            for family in collector.collect()
            for suffix in SUFFIXES[family.type]
        }
    finally:
        await gateway.observation.stop()
