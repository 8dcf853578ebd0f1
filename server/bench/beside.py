"""Beside: the steered engine against other ways to the same edit, pair by pair like the engine's own arms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.bench.arms import ONE_EDIT, Metric
from server.bench.cells import Cell, Measured, Order
from server.bench.companion import Companion, companion
from server.bench.peers import OtherPlugin, Peer, hotwire, installed
from steering.bundle import Bundle
from steering.errors import EditNotApplied, PluginNotArmed

HOOKS_RESIDENT = "server.bench.hooks_resident"
TITLE = "one layer"

Round = Callable[[Cell, int], Mapping[str, Any]]
"""A peer's answer to a cell, with prompts drawn from a seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What is compared, and with what.

    Attributes:
        order: of the run.
        bundle: of drawn directions at one layer.
        steering: the engine that holds it.
        start: starts an engine with another plugin.
        settings: model and vocabulary, of residents.
        is_drawn: the model's weights are drawn and not read.
        is_gpu: the engines run on one.
        folder: for files of a peer.
        seed: gives one that no engine has seen.
    """

    order: Order
    bundle: Bundle
    steering: Companion
    start: Callable[[OtherPlugin], AbstractContextManager[Companion]]
    settings: Mapping[str, Any]
    is_drawn: bool
    is_gpu: bool
    folder: Path
    seed: Callable[[], int]


def measure(beside: Beside, say: Callable[[str], None]) -> tuple[list[Measured], dict[str, str]]:
    """Run the steered engine against every peer that is installed.

    Returns:
        What was measured, and of each peer its version, or why it was not measured.

    Raises:
        EditNotApplied: a side of a pair did not edit where it should.
        PluginNotArmed: another plugin does not steer.
    """
    versions = installed()
    told = {peer.value: version or "not installed" for peer, version in versions.items()}
    found: list[Measured] = []
    on_transformers = [peer for peer in Peer if versions[peer] and peer is not Peer.HOTWIRE]
    if on_transformers:
        say("starting transformers")
        with companion(HOOKS_RESIDENT, _hook_settings(beside)) as hooks:
            hooks.wait_until_ready()
            for peer in on_transformers:
                found += _against(beside, peer, _by_hooks(beside, hooks, peer), say)
    if versions[Peer.HOTWIRE] and not beside.is_gpu:
        told[Peer.HOTWIRE.value] = f"{versions[Peer.HOTWIRE]}, which runs on a GPU only"
    elif versions[Peer.HOTWIRE]:
        with _by_hotwire(beside, say) as ask:
            found += _against(beside, Peer.HOTWIRE, ask, say)
    return found, told


def _against(beside: Beside, peer: Peer, other: Round, say: Callable[[str], None]) -> list[Measured]:
    plans = [plan.to_json() for plan in ONE_EDIT.plans(beside.bundle, max(beside.order.batches))]
    layers = ONE_EDIT.layers(beside.bundle)

    def mine(cell: Cell, seed: int) -> Mapping[str, Any]:
        return beside.steering.ask(seed=seed, plans=plans[: cell.batch], cell=cell.shape(beside.order.tokens))

    found = []
    for cell in beside.order.cells:
        if cell.is_first:
            continue
        measured = Measured(arm=TITLE, against=peer.value, metric=Metric.THROUGHPUT, cell=cell, bounds={})
        for turn in range(-1, beside.order.peer_pairs):  # the first warms up
            seed = beside.seed()
            asked = [mine, other] if turn % 2 else [other, mine]
            answers = {ask: ask(cell, seed) for ask in asked}
            if "failed" in answers[other]:
                measured.skipped = f"{peer.value}: {answers[other]['failed']}"
                break
            edited = [answers[mine]["edited"], answers[other]["edited"]]
            if edited != [layers, [] if peer is Peer.PLAIN else layers]:
                raise EditNotApplied(f"in a round beside {peer.value} the two sides edited layers {edited}")
            if turn >= 0:
                measured.add(answers[mine], answers[other])
        say(f"beside: {measured.line()}")
        found.append(measured)
    return found


def _by_hooks(beside: Beside, hooks: Companion, peer: Peer) -> Round:
    def ask(cell: Cell, seed: int) -> Mapping[str, Any]:
        return hooks.ask(
            peer=peer.value, seed=seed, requests=cell.batch, length=cell.prompt, tokens=beside.order.tokens
        )

    return ask


@contextmanager
def _by_hotwire(beside: Beside, say: Callable[[str], None]) -> Iterator[Round]:
    """Rounds of hotwire's engine; that it steers is seen once, by an answer that differs from its unsteered one."""
    assert ONE_EDIT.edit is not None
    layers = beside.bundle.manifest.model.layers
    other = hotwire(beside.bundle.edits[ONE_EDIT.edit], layers=layers, folder=beside.folder / "hotwire")
    say("starting vLLM with hotwire")
    with beside.start(other) as engine:
        shape = beside.order.cells[0].shape(beside.order.tokens) | {"requests": 1}
        seed = beside.seed()
        plain, steered = (engine.ask(seed=seed, plans=plans, cell=shape) for plans in ([], [other.order]))
        if plain["answers"] == steered["answers"]:
            raise PluginNotArmed("hotwire-vllm answers a steered request as an unsteered one")

        def ask(cell: Cell, seed: int) -> Mapping[str, Any]:
            answer = engine.ask(seed=seed, plans=[other.order] * cell.batch, cell=cell.shape(beside.order.tokens))
            return {**answer, "edited": ONE_EDIT.layers(beside.bundle)}

        yield ask


def _hook_settings(beside: Beside) -> dict[str, Any]:
    assert beside.bundle.path is not None
    return {
        "model": beside.settings["model"],
        "vocabulary": beside.settings["vocabulary"],
        "bundle": str(beside.bundle.path.resolve()),
        "edit": ONE_EDIT.edit,
        "is_drawn": beside.is_drawn,
    }
