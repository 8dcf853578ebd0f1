"""`trimtab serve` without arguments, and the example that a newcomer runs against it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.cli import DEMO, DEMO_NAME
from tests.integration.serving import Server, serving

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "quickstart.py"


@pytest.fixture(scope="module")
def demo() -> Iterator[Server]:
    """The demo, served as `make serve` does."""
    path = DEMO / "bundle" / "manifest.json"
    if not path.is_file():
        pytest.skip(f"the demo is not at {DEMO}; an installed wheel does not carry it")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    default = next(profile for profile in manifest["profiles"] if profile["name"] == manifest["default_profile"])
    if not default.get("gate"):
        pytest.skip("the default profile of the demo's bundle has no gate; make it with `trimtab fit control`")
    with serving() as server:
        yield server


def test_quickstart_shows_the_gate_decide(demo: Server) -> None:
    """The gate answers the borderline prompt, which is refused unsteered, and refuses the harmful one."""
    shown = subprocess.run(
        [sys.executable, str(EXAMPLE), demo.url], capture_output=True, text=True, timeout=120, check=True
    )
    told = [json.loads(line) for line in shown.stdout.splitlines() if line.startswith("{")]
    borderline, steered, _, harmful = told
    assert [entry["decision"] for entry in told] == ["off", "comply", "off", "refuse"]
    assert [entry["applied"] for entry in told] == [False, True, False, True]
    assert borderline["verdict"]["refused"] is True
    assert steered["verdict"]["refused"] is False
    assert harmful["verdict"]["refused"] is True
    for entry in (steered, harmful):
        low, high = entry["thresholds"]["comply_below"], entry["thresholds"]["refuse_above"]
        score = entry["scores"]["refusal"]
        assert entry["decision"] == ("refuse" if score >= high else "comply" if score <= low else "abstain")
    assert "[" not in shown.stdout.replace("[off]", "").replace("[auto]", "")


def test_the_printed_curl_line_steers(demo: Server) -> None:
    """What the server prints when it is ready can be pasted, and is steered without asking for it."""
    text = "\n".join(demo.log)
    body = json.loads(text[text.index("-d '") + 4 : text.rindex("}'") + 1])
    answer = httpx.post(f"{demo.url}/v1/chat/completions", json=body, timeout=60).json()
    assert body["model"] == DEMO_NAME
    assert "steering" not in body
    assert answer["steering"]["applied"] is True
    assert answer["steering"]["verdict"]["refused"] is False
