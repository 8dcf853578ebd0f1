"""What the seam over vLLM makes of the worker's reports, without vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from server.vllm_engine import VllmEngine
from steering.engine.outcomes import OutcomeListener, OutcomeSender
from steering.errors import EditNotApplied
from steering.outcome import Outcome
from steering.plan import Scope


def outcome(request_id: str, edit: str) -> Outcome:
    """A report of one sample."""
    return Outcome(plan_id="p", request_id=request_id, applied=True, edit=edit, strength=1.0, scope=Scope.GENERATED)


@pytest.fixture
async def listener() -> Any:
    """A listener that receives."""
    found = OutcomeListener()
    found.start()
    yield found
    await found.close()


@pytest.fixture
def sender(listener: OutcomeListener) -> Iterator[OutcomeSender]:
    """A worker's end of it."""
    made = OutcomeSender(listener.address)
    yield made
    made.close()


def engine_over(listener: OutcomeListener) -> VllmEngine:
    """The seam with this listener and nothing else, as making a whole one needs vLLM."""
    engine = object.__new__(VllmEngine)
    engine._listener = listener
    return engine


async def test_a_sample_waits_for_its_own_report(listener: OutcomeListener, sender: OutcomeSender) -> None:
    """Of n > 1 samples each is confirmed by its own outcome, whichever comes first; vLLM numbers them in their ids."""
    engine = engine_over(listener)
    listener.expect("p")
    sender.send([outcome("1_chatcmpl-x-12345678", "second")])
    waiting = asyncio.create_task(engine.outcomes("p", (0,), 5))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    assert (await engine.outcomes("p", (1,), 5))[1].edit == "second"
    sender.send([outcome("0_chatcmpl-x-12345678", "first")])
    assert {index: found.edit for index, found in (await waiting).items()} == {0: "first", 1: "second"}


async def test_a_single_samples_id_has_no_number(listener: OutcomeListener, sender: OutcomeSender) -> None:
    """With n = 1 the request's own id is reported."""
    listener.expect("p")
    sender.send([outcome("chatcmpl-1_x-12345678", "only")])
    assert (await engine_over(listener).outcomes("p", (0,), 5))[0].edit == "only"


async def test_a_sample_that_never_reports_is_given_up(listener: OutcomeListener, sender: OutcomeSender) -> None:
    """The reports of others do not make the wait longer than asked."""
    engine = engine_over(listener)
    listener.expect("p")
    sender.send([outcome("1_chatcmpl-x-12345678", "second")])
    began = asyncio.get_running_loop().time()
    with pytest.raises(EditNotApplied):
        await engine.outcomes("p", (0,), 0.2)
    assert asyncio.get_running_loop().time() - began < 1
