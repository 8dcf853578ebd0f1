"""What dashboard, rules and alerts ask for is there, and a real Prometheus gets it from a server over a real engine."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from openai import OpenAI

from server.vllm_metrics import TOKENS
from steering.client import steering
from tests.integration.asking import ask
from tests.integration.serving import Server
from tests.monitored import RULES, asked, every_expression, rules

RULE_FILES = ("recording.yaml", "alerts.yaml")
PATIENCE = 60.0
BY_OTHERS = ("profile_set:steering_canary", "category:steering_judged")
"""What begins so is recorded where a canary or a judge runs, and in this server none does."""


def test_what_is_asked_of_the_engine_is_exported(gateway: Server) -> None:
    """Every series of vLLM and of the process in a query of ours is in a scrape of a real server, and so is the one
    that the heartbeat looks at.
    """
    text = httpx.get(f"{gateway.admin}/metrics").text
    exported = set(re.findall(r"^([a-z_:]+)", text, re.MULTILINE))
    wanted = {series for _, expression in every_expression() for series, _ in asked(expression)}
    engine = {series for series in wanted if series.startswith(("vllm:", "process_"))}
    assert engine
    engine.add(f"{TOKENS}_total")
    assert engine - exported == set()


@pytest.mark.skipif(not RULES.is_dir(), reason="needs a checkout: the wheel holds no rules")
@pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs prometheus: apt-get install it, or unpack its package"
)
def test_prometheus_scrapes_the_server_and_its_rules_give_series(
    gateway: Server, client: OpenAI, tmp_path: Path
) -> None:
    """With the configuration that is shipped: the target is up, every rule is evaluated without an error, each recorded
    series is there, and no alert fires at a server that is well.
    """
    recorded = {rule["record"] for rule in rules("recording.yaml") if not rule["record"].startswith(BY_OTHERS)}
    with scraping(gateway, tmp_path) as address:
        deadline = time.monotonic() + PATIENCE
        while missing := recorded - {*told(address, "label/__name__/values")}:
            assert time.monotonic() < deadline, f"never recorded: {sorted(missing)}"
            for mode in ("refuse", "comply"):
                ask(client, extra_body=steering(mode=mode))
            list(ask(client, stream=True))
            time.sleep(0.5)
        (target,) = told(address, "targets")["activeTargets"]
        assert (target["labels"]["job"], target["health"], target["lastError"]) == ("trimtab", "up", "")
        evaluated = [rule for group in told(address, "rules")["groups"] for rule in group["rules"]]
        wanted = {rule.get("record") or rule["alert"] for name in RULE_FILES for rule in rules(name)}
        assert {rule["name"] for rule in evaluated} == wanted
        assert {rule["name"]: rule.get("lastError") for rule in evaluated if rule["health"] != "ok"} == {}
        assert [rule["name"] for rule in evaluated if rule.get("state") == "firing"] == []


@contextmanager
def scraping(gateway: Server, folder: Path) -> Iterator[str]:
    """Prometheus with the shipped configuration, but of this server and every second; gives its address."""
    shipped = yaml.safe_load((RULES / "prometheus.yaml").read_text(encoding="utf-8"))
    assert shipped["rule_files"] == [*RULE_FILES]
    shipped["global"] = dict.fromkeys(shipped["global"], "1s")
    (job,) = shipped["scrape_configs"]
    (static,) = job["static_configs"]
    static["targets"] = [gateway.admin.removeprefix("http://")]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(shipped), encoding="utf-8")
    for name in RULE_FILES:
        shutil.copy(RULES / name, folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        listens = f"127.0.0.1:{free.getsockname()[1]}"
    options = {"config.file": folder / "prometheus.yaml", "storage.tsdb.path": folder / "data"}
    command = [
        "prometheus",
        *(f"--{name}={value}" for name, value in options.items()),
        f"--web.listen-address={listens}",
    ]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while not is_ready(f"http://{listens}"):
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield f"http://{listens}"
        finally:
            process.terminate()


def is_ready(address: str) -> bool:
    """Whether Prometheus takes queries."""
    try:
        return httpx.get(f"{address}/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def told(address: str, what: str, **parameters: str) -> Any:
    """What its HTTP API says."""
    answer = httpx.get(f"{address}/api/v1/{what}", params=parameters, timeout=PATIENCE).json()
    assert answer["status"] == "success", answer
    return answer["data"]
