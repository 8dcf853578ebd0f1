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
    if not (DEMO / "bundle" / "manifest.json").is_file():
        pytest.skip(f"the demo is not at {DEMO}; an installed wheel does not carry it")
    with serving() as server:
        yield server


def test_quickstart_shows_both_sides(demo: Server) -> None:
    """The borderline prompt is refused unsteered and answered with comply; the harmful one is refused with refuse."""
    shown = subprocess.run(
        [sys.executable, str(EXAMPLE), demo.url], capture_output=True, text=True, timeout=120, check=True
    )
    told = [json.loads(line) for line in shown.stdout.splitlines() if line.startswith("{")]
    assert [entry["decision"] for entry in told] == ["off", "comply", "refuse"]
    assert [entry["applied"] for entry in told] == [False, True, True]
    assert [entry["verdict"]["refused"] for entry in told] == [True, False, True]
    assert "[" not in shown.stdout.replace("[off]", "").replace("[comply]", "").replace("[refuse]", "")


def test_the_printed_curl_line_steers(demo: Server) -> None:
    """What the server prints when it is ready can be pasted."""
    text = "\n".join(demo.log)
    body = json.loads(text[text.index("-d '") + 4 : text.rindex("}'") + 1])
    answer = httpx.post(f"{demo.url}/v1/chat/completions", json=body, timeout=60).json()
    assert body["model"] == DEMO_NAME
    assert answer["steering"]["applied"] is True
    assert answer["steering"]["verdict"]["refused"] is False
