"""Rules, alerts and the dashboard ask for what the gateway counts, by names and labels that it has.

Prometheus' own tool checks the rules and runs their tests, where it is installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import yaml

from server.observe.canary import SHIPPED, read_prompts
from tests.monitored import GRAFANA, ROOT, RULES, asked, counted, dashboard, every_expression, panels, rules

UNITS = {"short", "percentunit", "s", "reqps", "cps"}
OWN_LABELS = {"instance", "job", "le"}
"""Labels that Prometheus adds."""

pytestmark = pytest.mark.skipif(not RULES.is_dir(), reason="needs a checkout: the wheel holds no rules")
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus, or unpack its package"
)


def promtool(*arguments: str) -> str:
    """What Prometheus' tool says; it must be content."""
    result = subprocess.run(
        ["promtool", *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=RULES
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@needs_promtool
def test_prometheus_takes_the_configuration_and_the_rules() -> None:
    """Its own tool finds no fault, strict about duplicates."""
    assert "FAILED" not in promtool("check", "config", "prometheus.yaml")
    assert "FAILED" not in promtool("check", "rules", "--lint-fatal", "recording.yaml", "alerts.yaml")


@needs_promtool
def test_rules_and_alerts_do_what_their_tests_say() -> None:
    """Rates know a zero from nothing, alerts fire when they should and rest on at least 50 where they are of rates."""
    assert "SUCCESS" in promtool("test", "rules", "tests.yaml")


def test_every_alert_is_tested() -> None:
    """No alert without a test in which it fires."""
    tests = yaml.safe_load((RULES / "tests.yaml").read_text(encoding="utf-8"))["tests"]
    fired = {case["alertname"] for test in tests for case in test.get("alert_rule_test", ()) if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in rules("alerts.yaml")}


def test_every_alert_says_what_to_do() -> None:
    """Severity, one line, and where to look."""
    for rule in rules("alerts.yaml"):
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert rule["annotations"].keys() == {"summary", "description"}, rule["alert"]


def test_the_shipped_canary_can_alert() -> None:
    """Each of its sets is watched by one alert on refusals, and has the prompts that this alert rests on."""
    sizes = Counter(prompt.set for prompt in read_prompts(SHIPPED))
    watched: list[str] = []
    for rule in rules("alerts.yaml"):
        least = re.search(r"steering_canary_prompts:min >= (\d+)", rule["expr"])
        if least is not None:
            ((operator, pattern),) = set(re.findall(r'\{set(=~|!~)"([^"]+)"\}', rule["expr"]))
            sets = [name for name in sizes if (re.fullmatch(pattern, name) is None) == (operator == "!~")]
            assert {name: sizes[name] for name in sets if sizes[name] < int(least[1])} == {}, rule["alert"]
            watched += sets
    assert sorted(watched) == sorted(sizes)


async def test_what_is_asked_for_is_counted() -> None:
    """Every series of every query is one that the gateway exports or a rule records, with the labels it is asked by.

    VLLM's own are held against a real engine in `tests/integration/test_gateway_monitoring.py`.
    """
    # A recorded series begins with the labels that it has.
    recorded = {rule["record"]: set(rule["record"].split(":")[0].split("_")) for rule in rules("recording.yaml")}
    known = {**await counted(), **recorded}
    for where, expression in every_expression():
        for series, labels in asked(expression):
            if not series.startswith(("vllm:", "process_")):
                assert series in known, f"{where}: nobody counts {series}"
                assert labels <= known[series] | OWN_LABELS, f"{where}: {series} has {sorted(known[series])}"


def test_dashboard_is_what_its_script_writes() -> None:
    """The file is made from `rows.py`, and was."""
    printed = subprocess.run(
        [sys.executable, "-c", "import dashboard, sys; sys.stdout.write(dashboard.text())"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=GRAFANA,
    )
    assert printed.stdout == (GRAFANA / "dashboards" / "trimtab.json").read_text(encoding="utf-8")


def test_every_panel_asks_something_and_says_what() -> None:
    """A title of its own, a text, a unit, and at least one query, each with a letter of its own."""
    titles = [panel["title"] for panel in panels()]
    assert len(set(titles)) == len(titles)
    for panel in panels():
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        letters = [target["refId"] for target in panel["targets"] if target["expr"]]
        assert letters
        assert sorted(set(letters)) == letters


def test_panels_have_places_of_their_own() -> None:
    """Numbers are unique, and no two panels overlap or leave the grid of 24 columns."""
    placed = dashboard()["panels"]
    assert len({panel["id"] for panel in placed}) == len(placed)
    taken: set[tuple[int, int]] = set()
    for panel in placed:
        place = panel["gridPos"]
        cells = {
            (column, line)
            for column in range(place["x"], place["x"] + place["w"])
            for line in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_grafana_finds_the_source_and_the_dashboard() -> None:
    """What is provisioned is what the dashboard starts with and where compose mounts it."""
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    variable = next(item for item in dashboard()["templating"]["list"] if item["name"] == "source")
    assert variable["current"]["value"] == source["uid"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/trimtab.yaml").read_text())["providers"]
    mounts = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts
