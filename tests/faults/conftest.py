"""The servers that the tests of faults share: gateways over the scripted engine, as processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fake_server import FakeServer, fake_serving
from tests.faults.wire import eventually, gauges

SHORT = {
    "TRIMTAB_BODY_TIMEOUT": "1",
    "TRIMTAB_FIRST_TOKEN_TIMEOUT": "1",
    "TRIMTAB_BETWEEN_TIMEOUT": "1",
    "TRIMTAB_TOTAL_TIMEOUT": "4",
    "TRIMTAB_OUTCOME_TIMEOUT": "1",
    "TRIMTAB_MAX_INFLIGHT": "8",
}
"""Timeouts that tests can wait for, and few requests at once."""


@pytest.fixture(scope="session")
def patient() -> Iterator[FakeServer]:
    """A gateway with the limits it has in production."""
    with fake_serving("--gated") as server:
        yield server
        assert eventually(lambda: gauges(server.admin) == (0, 0)), "a request was never ended"
        assert server.process.poll() is None


@pytest.fixture(scope="session")
def impatient() -> Iterator[FakeServer]:
    """A gateway that gives up quickly."""
    with fake_serving("--gated", **SHORT) as server:
        yield server
        assert eventually(lambda: gauges(server.admin) == (0, 0)), "a request was never ended"
        assert server.process.poll() is None
