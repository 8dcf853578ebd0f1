"""The self-check: what keeps a server from taking its first request."""

from __future__ import annotations

from typing import Any

import pytest

from server.readiness import covering_edits, self_check
from steering.errors import EditNotApplied, EngineDied, PluginNotArmed
from steering.outcome import Scores
from steering.plan import GateOrder
from tests.fakes import FakeEngine, failing, make_bundle, make_catalog, make_edit, make_gated_bundle, read


async def test_check_generates_unsteered_and_covers_every_edited_layer() -> None:
    """One token without a plan, then enough edits to run every layer's op."""
    engine = FakeEngine()
    await self_check(engine, make_catalog())
    assert engine.calls[0].plan is None
    assert [call.plan.edit for call in engine.calls[1:] if call.plan] == ["refuse-political", "comply-safety"]
    assert all(call.fields["max_tokens"] == 1 for call in engine.calls)
    assert len(engine.forgotten) == 2


async def test_every_gate_is_asked_once_and_edits_nothing() -> None:
    """One observed request per profile with a gate, under the profile's own thresholds."""
    engine = FakeEngine()
    await self_check(engine, make_catalog(make_gated_bundle()))
    (plan,) = [call.plan for call in engine.calls if call.plan and call.plan.gate]
    assert plan.gate == GateOrder(profile="refusal-control", comply_below=0.2, refuse_above=0.6, is_observed=True)
    assert plan.id in engine.forgotten


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (FakeEngine(report_changes={"gates": {}}), "lacks the gates of profiles"),
        (FakeEngine(scores=[read(float("nan"))]), "not finite at layer 2"),
        (FakeEngine(scores=[read(0.5, safety=float("inf"))]), "not finite"),
        (FakeEngine(scores=[Scores(names=("Safety",), logits=(0.0, 0.0))]), "no scores of its probe 'prompt'"),
        (FakeEngine(tampered={"scores": None}), "no scores"),
    ],
    ids=["not armed", "NaN", "infinite", "other categories", "none"],
)
async def test_gate_that_reads_nothing_is_found(engine: FakeEngine, words: str) -> None:
    """A gate that no worker holds, or that reads no finite score of each category, keeps the server from starting."""
    with pytest.raises(PluginNotArmed, match=words):
        await self_check(engine, make_catalog(make_gated_bundle()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "0.0.1"}, "version 0.0.1"),
        ({"bundles": {}}, "does not hold bundle"),
        ({"bundles": {make_bundle().digest: ("refuse-safety",)}}, "lacks the edits"),
        ({"layers": (2, 3)}, "can edit layers"),
    ],
)
async def test_worker_that_differs_is_told(changes: dict[str, Any], words: str) -> None:
    """Another plugin version, bundle, edit or layer set is named in the error."""
    with pytest.raises(PluginNotArmed, match=words):
        await self_check(FakeEngine(report_changes=changes), make_catalog())


async def test_op_that_does_not_run_is_found() -> None:
    """A graph without the op confirms the plan and still changes nothing: the witness tells."""
    with pytest.raises(PluginNotArmed, match="stale compile cache"):
        await self_check(FakeEngine(runs_ops=False), make_catalog())


async def test_no_workers_no_confirmation_and_no_engine_are_found() -> None:
    """Plugin not loaded, outcome socket broken, engine gone."""

    class NoWorkers(FakeEngine):
        async def reports(self) -> list[Any]:
            return []

    with pytest.raises(PluginNotArmed, match="no worker"):
        await self_check(NoWorkers(), make_catalog())
    with pytest.raises(EditNotApplied):
        await self_check(FakeEngine(confirms=False), make_catalog())
    with pytest.raises(EngineDied):
        await self_check(failing(EngineDied("gone")), make_catalog())


def test_cover_is_complete_and_small() -> None:
    """Every layer of every edit is covered, and an edit that adds none is left out."""
    edits = {
        edit.name: edit
        for edit in (
            make_edit("a", "refuse", "Safety", layers=(1,)),
            make_edit("b", "refuse", "Safety", layers=(1, 2, 3)),
            make_edit("c", "refuse", "Safety", layers=(4,)),
            make_edit("d", "refuse", "Safety", layers=(3, 4)),
        )
    }
    chosen = covering_edits(edits)
    assert [edit.name for edit in chosen] == ["b", "c"]
