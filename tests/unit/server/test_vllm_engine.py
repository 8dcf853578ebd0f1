"""What the seam over vLLM makes of the worker's reports and answers, without vLLM."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter

from server.engine import Call
from server.errors import reply_to
from server.vllm_engine import VllmEngine
from server.vllm_metrics import TOKENS
from steering.bundle import load_bundle
from steering.engine.outcomes import OutcomeListener
from steering.engine.roster import Roster
from steering.errors import (
    BundleFormatError,
    CapacityExceeded,
    EditNotApplied,
    EngineError,
    TrimtabError,
    UnknownName,
)
from steering.outcome import Outcome
from steering.plan import Scope
from tests.samples import plan_for, random_edit, write_bundle


def outcome(request_id: str, edit: str) -> Outcome:
    """A report of one sample."""
    return Outcome(plan_id="p", request_id=request_id, applied=True, edit=edit, strength=1.0, scope=Scope.GENERATED)


@pytest.fixture
def listener() -> OutcomeListener:
    """A listener that nothing has been told."""
    return OutcomeListener()


def engine_over(listener: OutcomeListener) -> VllmEngine:
    """The seam with this listener and nothing else, as making a whole one needs vLLM."""
    engine = object.__new__(VllmEngine)
    engine._listener = listener
    return engine


async def test_a_sample_waits_for_its_own_report(listener: OutcomeListener) -> None:
    """Of n > 1 samples each is confirmed by its own outcome, whichever comes first; vLLM numbers them in their ids."""
    engine = engine_over(listener)
    listener.expect("p")
    listener.receive(outcome("1_chatcmpl-x-12345678", "second"))
    waiting = asyncio.create_task(engine.outcomes("p", (0,), 5))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    assert (await engine.outcomes("p", (1,), 5))[1].edit == "second"
    listener.receive(outcome("0_chatcmpl-x-12345678", "first"))
    assert {index: found.edit for index, found in (await waiting).items()} == {0: "first"}


async def test_a_single_samples_id_has_no_number(listener: OutcomeListener) -> None:
    """With n = 1 the request's own id is reported."""
    listener.expect("p")
    listener.receive(outcome("chatcmpl-1_x-12345678", "only"))
    assert (await engine_over(listener).outcomes("p", (0,), 5))[0].edit == "only"


async def test_a_sample_that_never_reports_is_given_up(listener: OutcomeListener) -> None:
    """The reports of others do not make the wait longer than asked."""
    engine = engine_over(listener)
    listener.expect("p")
    listener.receive(outcome("1_chatcmpl-x-12345678", "second"))
    began = asyncio.get_running_loop().time()
    with pytest.raises(EditNotApplied):
        await engine.outcomes("p", (0,), 0.2)
    assert asyncio.get_running_loop().time() - began < 1


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """VLLM's count of tokens, in a registry of its own."""
    registry = CollectorRegistry()
    module = ModuleType("prometheus")
    monkeypatch.setattr(module, "get_prometheus_registry", lambda: registry, raising=False)
    monkeypatch.setitem(sys.modules, "vllm.v1.metrics.prometheus", module)
    return Counter(TOKENS, "Tokens.", ("engine",), registry=registry)


async def test_tokens_are_known_as_they_are_made(listener: OutcomeListener, counter: Counter) -> None:
    """Those of streams as they pass, and all others, of answers that come whole too, by vLLM's own counter."""

    async def events() -> AsyncGenerator[str, None]:
        for tokens in ([], [5], [6, 7]):
            choice = {"index": 0, "delta": {"content": "x"}, "token_ids": tokens, "finish_reason": None}
            yield f"data: {json.dumps({'choices': [choice]})}"
        yield "data: [DONE]"

    async def answer(_call: Call, *, stream: bool) -> AsyncGenerator[str, None]:
        assert stream
        return events()

    engine = engine_over(listener)
    engine._given, engine._error_class, engine._answer = 0, type(None), answer  # type: ignore[method-assign]
    counter.labels("0").inc(2)
    assert engine.generated == 2
    assert [len(chunk.tokens) async for chunk in engine.stream(Call(request_id="r", fields={}))] == [0, 1, 2]
    assert engine.generated == 3
    counter.labels("0").inc(40)
    assert engine.generated == 42


class FakeCore:
    """VLLM's engine process: a scheduler with a real roster, and two ranks that fill banks or say why not.

    Attributes:
        refusals: what each rank answers to a load; None for none.
        is_deaf: orders to open fail, before or after they were carried out.
        done: methods and orders, in turn.
    """

    def __init__(self, refusals: tuple[TrimtabError | None, ...] = (None, None), is_deaf: str = "") -> None:
        self.roster = Roster({})
        self.banks: list[set[str]] = [set(), set()]
        self.refusals, self.is_deaf = refusals, is_deaf
        self.done: list[str] = []
        self.engine_core = self

    async def collective_rpc(self, method: str, timeout: float, args: tuple[str, ...]) -> list[Any]:  # noqa: ASYNC109
        self.done.append(method)
        assert timeout > 0
        if method == "steering_load" and not any(self.refusals):
            for bank in self.banks:
                bank.add(args[1])
        elif method == "steering_unload":
            for bank in self.banks:
                bank.discard(args[0])
            return [{"error": None}, {"error": None}]
        return [{"error": None if error is None else error.to_fields()} for error in self.refusals]

    async def call_utility_async(self, method: str, order: str, digest: str, names: Any) -> Any:
        assert method == "scheduler"
        self.done.append(order)
        if order == "open" and self.is_deaf == "before":
            raise RuntimeError("Call to scheduler method failed")
        found = self.roster.obey(order, digest, names)
        if order == "open" and self.is_deaf == "after":
            raise TimeoutError
        return found


def engine_of(core: FakeCore) -> VllmEngine:
    """The seam over this engine process."""
    engine = object.__new__(VllmEngine)
    vars(engine).update(_client=core, _loading=asyncio.Lock())
    return engine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle with the edit `e`."""
    write_bundle(tmp_path / "bundle", {"e": random_edit("e", ranks={0: 1})})
    return tmp_path / "bundle"


async def test_a_bundle_is_in_every_bank_before_a_request_can_name_it(folder: Path) -> None:
    """Loaded by the workers, then opened by the scheduler; closed by the scheduler alone, which has it released."""
    core = FakeCore()
    engine = engine_of(core)
    digest = await engine.load(folder)
    assert core.done == ["revive", "steering_load", "open"]
    core.roster.check(plan_for("e", bundle=digest))
    await engine.unload(digest)
    assert core.done[3:] == ["close"]
    assert core.roster.has_released
    with pytest.raises(UnknownName, match="being unloaded"):
        core.roster.check(plan_for("e", bundle=digest))


async def test_a_bundle_that_is_being_unloaded_is_revived_without_the_workers(folder: Path) -> None:
    """It never left their banks; once it is released it is loaded anew."""
    core = FakeCore()
    engine = engine_of(core)
    digest = await engine.load(folder)
    await engine.unload(digest)
    del core.done[:]
    assert await engine.load(folder) == digest
    assert core.done == ["revive"]
    await engine.unload(digest)
    assert core.roster.take_released() == (digest,)
    del core.done[:]
    await engine.load(folder)
    assert core.done == ["revive", "steering_load", "open"]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("reason", [BundleFormatError("needs layer 3"), CapacityExceeded("no room")])
async def test_the_rank_that_could_not_load_says_why(first: bool, reason: TrimtabError, folder: Path) -> None:
    """Its error comes as it was raised, whichever rank it is; the scheduler never hears of the bundle."""
    refusals = [EngineError("another rank could not"), reason]
    core = FakeCore(tuple(reversed(refusals)) if first else tuple(refusals))
    with pytest.raises(type(reason), match=reason.message):
        await engine_of(core).load(folder)
    assert core.done == ["revive", "steering_load"]


async def test_a_full_bank_is_a_503(folder: Path) -> None:
    """`CapacityExceeded` crosses the processes as what it is."""
    core = FakeCore((CapacityExceeded("no room"), CapacityExceeded("no room")))
    with pytest.raises(CapacityExceeded, match="no room") as caught:
        await engine_of(core).load(folder)
    assert reply_to(caught.value).status == 503


@pytest.mark.parametrize("is_deaf", ["before", "after"])
async def test_what_the_scheduler_did_not_confirm_is_taken_back(is_deaf: str, folder: Path) -> None:
    """Whether the order was carried out or not: no request can name the bundle, and its room is free or released."""
    core = FakeCore(is_deaf=is_deaf)
    with pytest.raises(EngineError, match="order to open"):
        await engine_of(core).load(folder)
    digest = load_bundle(folder).digest
    with pytest.raises(UnknownName):
        core.roster.check(plan_for("e", bundle=digest))
    assert core.roster.has_released if is_deaf == "after" else core.banks == [set(), set()]


async def test_what_is_not_loaded_cannot_be_unloaded() -> None:
    """The error names the digest."""
    with pytest.raises(UnknownName, match="sha256:none"):
        await engine_of(FakeCore()).unload("sha256:none")
