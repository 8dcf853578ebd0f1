"""What dashboard and alerts ask of the engine is there: vLLM's own names change between its versions."""

from __future__ import annotations

import re

import httpx

from tests.integration.serving import Server
from tests.monitored import asked, every_expression


def test_what_is_asked_of_the_engine_is_exported(gateway: Server) -> None:
    """Every series of vLLM and of the process in a query of ours is in a scrape of a real server."""
    text = httpx.get(f"{gateway.admin}/metrics").text
    exported = set(re.findall(r"^([a-z_:]+)", text, re.MULTILINE))
    wanted = {series for _, expression in every_expression() for series, _ in asked(expression)}
    engine = {series for series in wanted if series.startswith(("vllm:", "process_"))}
    assert engine
    assert engine - exported == set()
