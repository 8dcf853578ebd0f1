"""Readiness: proof, before the first client, that this engine steers and that it also leaves alone.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from server.catalog import BundleView, Catalog, EditView, GateView, ProfileView, ResponseView
from server.engine import Call, Engine, Prompting, WorkerReport
from steering import __version__
from steering.errors import PluginNotArmed
from steering.outcome import Outcome
from steering.plan import GateOrder, Plan

PATIENCE = 60.0
"""Seconds for the confirmation of one steered token; generous, since the engine may still be warming up."""


async def self_check(engine: Engine, catalog: Catalog) -> None:
    """Ask every worker what it is, then generate one token unsteered, and check every bundle.

    Raises:
        PluginNotArmed: as `check_bundle`, or no worker reports at all.
        EngineError: a token did not come.
    """
    await _check_reports(engine, catalog.bundles)
    await one_token(engine, None)
    for bundle in catalog.bundles:
        await _try_out(engine, bundle)


async def check_bundle(engine: Engine, bundle: BundleView) -> None:
    """Check one bundle that the engine holds: generate one token under each edit that proves a layer, one before each
    gate, which must read scores and edit nothing, and two before each response probe, which must read one.

    Beside live requests a layer counts as seen whoever had it edited.

    Raises:
        PluginNotArmed: a worker reports another version, lacks the bundle, a layer, edit, gate or response probe, a
            layer's op did not run, or a gate or response probe read nothing.
        EngineError: a token did not come.
    """
    await _check_reports(engine, (bundle,))
    await _try_out(engine, bundle)


async def one_token(engine: Engine, plan: Plan | None) -> Outcome | None:
    """Generate one token; what the engine reports of it, where there is a plan."""
    try:
        await engine.complete(_call(engine, plan, tokens=1))
        return None if plan is None else (await engine.outcomes(plan.id, (0,), PATIENCE))[0]
    finally:
        if plan is not None:
            engine.forget(plan.id)


def plan_of_edit(bundle: BundleView, edit: EditView) -> Plan:
    """A plan of one edit, as near its calibrated dose as it is certified for."""
    strength = min(max(1.0, edit.minimum), edit.maximum)
    return Plan(id=secrets.token_hex(16), bundle=bundle.digest, edit=edit.name, strength=strength)


def covering_edits(edits: Mapping[str, EditView]) -> list[EditView]:
    """Few edits that together touch every layer any of them touches (greedy, first by name)."""
    missing = {layer for edit in edits.values() for layer in edit.layers}
    chosen: list[EditView] = []
    while missing:
        best = max(sorted(edits), key=lambda name: len(missing & set(edits[name].layers)))
        chosen.append(edits[best])
        missing -= set(edits[best].layers)
    return chosen


async def _check_reports(engine: Engine, bundles: Sequence[BundleView]) -> None:
    reports = await engine.reports()
    if not reports:
        raise PluginNotArmed("no worker reports the plugin; is the distribution installed where vLLM runs?")
    for rank, report in enumerate(reports):
        for bundle in bundles:
            _check_report(rank, report, bundle)


async def _try_out(engine: Engine, bundle: BundleView) -> None:
    for edit in covering_edits(bundle.edits):
        await engine.clear_witness()
        await one_token(engine, plan_of_edit(bundle, edit))
        seen = {layer for report in await engine.reports() for layer in report.witness}
        if not set(edit.layers) <= seen:
            raise PluginNotArmed(
                f"edit {edit.name!r} of {bundle.label} edits layers {list(edit.layers)}, but only {sorted(seen)} "
                "ran with an edit; a stale compile cache or an architecture that is wrapped wrongly does this"
            )
    for profile in bundle.profiles.values():
        if profile.gate is not None:
            await _check_gate(engine, bundle, profile, profile.gate)
    if bundle.reader is not None:
        await _check_reader(engine, bundle, bundle.reader)


async def _check_gate(engine: Engine, bundle: BundleView, profile: ProfileView, gate: GateView) -> None:
    order = GateOrder(
        profile=profile.name, comply_below=gate.comply_below, refuse_above=gate.refuse_above, is_observed=True
    )
    plan = Plan(id=secrets.token_hex(16), bundle=bundle.digest, gate=order, strength=profile.strength)
    outcome = await one_token(engine, plan)
    scores = outcome.scores if outcome else None
    if scores is None or scores.names != gate.probe.categories:
        raise PluginNotArmed(
            f"the gate of profile {profile.name!r} of {bundle.label} gave no scores of its probe {gate.probe.name!r}"
        )
    if not all(map(math.isfinite, scores.logits)):
        raise PluginNotArmed(
            f"the gate of profile {profile.name!r} of {bundle.label} read scores that are not finite at layer "
            f"{gate.probe.layer}: {scores}"
        )


async def _check_reader(engine: Engine, bundle: BundleView, reader: ResponseView) -> None:
    plan = Plan(id=secrets.token_hex(16), bundle=bundle.digest, strength=1.0, response=True)
    call = _call(engine, plan, tokens=2)
    try:
        await engine.complete(call)
        read = engine.responses(plan.id)
    finally:
        engine.forget(plan.id)
    if 0 not in read:
        raise PluginNotArmed(
            f"the response probe {reader.name!r} of {bundle.label} read nothing finite at layer {reader.layer}"
        )


def _check_report(rank: int, report: WorkerReport, bundle: BundleView) -> None:
    if report.version != __version__:
        raise PluginNotArmed(f"worker {rank} runs plugin version {report.version}, the gateway is {__version__}")
    if bundle.digest not in report.bundles:
        raise PluginNotArmed(
            f"worker {rank} does not hold bundle {bundle.label} ({bundle.digest}); it holds {sorted(report.bundles)}"
        )
    lacking = set(bundle.edits) - set(report.bundles[bundle.digest])
    if lacking:
        raise PluginNotArmed(f"worker {rank} lacks the edits {sorted(lacking)} of bundle {bundle.label}")
    gated = {profile.name for profile in bundle.profiles.values() if profile.gate is not None}
    unarmed = gated - set(report.gates.get(bundle.digest, ()))
    if unarmed:
        raise PluginNotArmed(f"worker {rank} lacks the gates of profiles {sorted(unarmed)} of bundle {bundle.label}")
    if bundle.response is not None and report.responses.get(bundle.digest) != bundle.response.tokens:
        raise PluginNotArmed(f"worker {rank} lacks the response probe {bundle.response.name!r} of {bundle.label}")
    needed = {layer for edit in bundle.edits.values() for layer in edit.layers}
    if not needed <= set(report.layers):
        raise PluginNotArmed(
            f"worker {rank} can edit layers {list(report.layers)}, bundle {bundle.label} needs {sorted(needed)}"
        )


def _call(engine: Engine, plan: Plan | None, *, tokens: int) -> Call:
    """A greedy answer of so many tokens, no fewer."""
    is_chat = engine.model.is_chat
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]} if is_chat else {"prompt": "Hello"}
    return Call(
        request_id=f"selfcheck-{secrets.token_hex(8)}",
        fields={
            "model": engine.model.name,
            **prompt,
            "max_tokens": tokens,
            "temperature": 0.0,
            **({"min_tokens": tokens} if tokens > 1 else {}),
        },
        prompting=Prompting.CHAT if is_chat else Prompting.PLAIN,
        plan=plan,
    )
