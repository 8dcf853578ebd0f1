"""Matrix: every arm of the engine against stock vLLM, over batches and prompt lengths.

Two engines are resident at a time and one works: stock vLLM and one that steers; the other that steers comes after it,
so that a GPU holds two copies of the weights and not three. A pair is a round of the arm and a round of its reference,
in turns the one and the other first; the arms take turns, so that what slows the machine slows all of them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.bench import beside, shapes
from server.bench.arms import DISTINCT, Arm, Served, Side, chosen
from server.bench.cells import Cell, Measured, Order
from server.bench.companion import Companion, companion
from server.bench.drawn import LOW_RANKS, every_layer_bundle, one_layer_bundle
from server.bench.engine import WITHOUT_PLUGINS, check_armed
from server.bench.memory import added
from server.bench.peers import OtherPlugin
from server.bench.report import Ratio
from server.bench.shapes import Shape
from server.bench.subject import DEMO
from steering.bundle import Bundle
from steering.engine.bank import terms_needed
from steering.engine.options import DEFAULT_TERMS_PER_LAYER, SteeringOptions
from steering.errors import EditNotApplied, OperatorError
from steering.fingerprint import Fingerprint, fingerprint_of

RESIDENT = "server.bench.resident"
SHARE = 0.44
"""Of a GPU's memory for each of the two engines."""

WARM_UP = 2
"""Pairs of every arm in every cell before those that count."""


@dataclass(slots=True, kw_only=True)
class _Run:
    """What all of a run shares."""

    order: Order
    model: Path
    is_drawn: bool
    is_gpu: bool
    fingerprint: Fingerprint
    bundles: Mapping[Served, Bundle]
    folder: Path
    say: Callable[[str], None]
    engines: dict[Served, Companion] = field(default_factory=dict)
    limits: dict[Served, dict[str, int]] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    seeds: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def settings(self) -> dict[str, Any]:
        """Of every resident, the same for all."""
        options: dict[str, Any] = {
            "max_num_seqs": max(self.order.batches),
            "max_model_len": max(self.order.prompts) + self.order.tokens,
            "skip_tokenizer_init": True,
        }
        if self.is_drawn:
            options["load_format"] = "dummy"
        if self.is_gpu:
            options["gpu_memory_utilization"] = SHARE
        return {
            "model": str(self.model),
            "options": options | dict(self.order.options),
            "vocabulary": self.fingerprint.vocabulary,
        }


def measure(order: Order, folder: Path, say: Callable[[str], None]) -> tuple[dict[str, Any], list[Ratio]]:
    """Run the matrix.

    Args:
        order: what was asked for.
        folder: for this run, removed afterwards by the caller.
        say: told of progress.

    Returns:
        Results for the report, and a ratio per arm, cell and metric.

    Raises:
        OperatorError: the model has no room for a prompt and its answer, or an arm is unknown.
        EditNotApplied: a round did not edit the layers its plans name.
    """
    arms = chosen(order.arms, with_control=order.with_control)
    run = _run_of(order, folder, say)
    found: list[Measured] = []
    told: dict[str, str] = {}
    at_all = [arm for arm in arms if arm.side.engine is Served.ALL]
    at_one = [arm for arm in arms if arm.side.engine is not Served.ALL]
    with ExitStack() as stack:
        with _engine(run, Served.STOCK):
            if at_all:
                with _engine(run, Served.ALL):
                    found += _measure(run, at_all)
            if at_one or order.with_peers:
                stack.enter_context(_engine(run, Served.ONE))
            found += _measure(run, at_one)
        if order.with_peers:
            other, told = beside.measure(_beside(run), say)
            found += other
    ratios = [ratio for ratio in (measured.ratio() for measured in found) if ratio is not None]
    facts = {
        "shape": None if order.shape is None else order.shape.value,
        "weights": "drawn" if run.is_drawn else "read",
        "fingerprint": run.fingerprint.model_dump(),
        "batches": order.batches,
        "prompts": order.prompts,
        "tokens": order.tokens,
        "pairs": order.pairs,
        "options": run.settings["options"],
        "memory": _against_stock(run.memory),
        "beside": told,
        "cells": [measured.facts for measured in found],
    }
    return facts, ratios


def _beside(run: _Run) -> beside.Beside:
    return beside.Beside(
        order=run.order,
        bundle=run.bundles[Served.ONE],
        steering=run.engines[Served.ONE],
        start=lambda plugin: _other(run, plugin),
        settings=run.settings,
        is_drawn=run.is_drawn,
        is_gpu=run.is_gpu,
        folder=run.folder,
        seed=lambda: next(run.seeds),
    )


def _run_of(order: Order, folder: Path, say: Callable[[str], None]) -> _Run:
    import torch

    is_drawn = order.shape is not None and order.shape is not Shape.DEMO
    if order.shape is not None:
        model = shapes.make(order.shape, folder) if is_drawn else DEMO / "model"
    else:
        assert order.model is not None
        model = order.model
    fingerprint = fingerprint_of(model)
    _check_room(model, order)
    one = one_layer_bundle(folder / "one-layer", fingerprint, directions=max(DISTINCT), ranks=LOW_RANKS)
    return _Run(
        order=order,
        model=model,
        is_drawn=is_drawn,
        is_gpu=torch.cuda.is_available(),
        fingerprint=fingerprint,
        bundles={Served.ONE: one, Served.ALL: every_layer_bundle(folder / "every-layer", fingerprint)},
        folder=folder,
        say=say,
    )


def _check_room(model: Path, order: Order) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    most = (config.get("text_config") or config).get("max_position_embeddings")
    needed = max(order.prompts) + order.tokens
    if most is not None and needed > most:
        raise OperatorError(
            f"prompts of {max(order.prompts)} and {order.tokens} tokens of answer need a context of {needed}, the "
            f"model has {most}; ask for less with --prompts and --tokens, or for another --shape"
        )


@contextmanager
def _engine(run: _Run, served: Served) -> Iterator[Companion]:
    """An engine for as long as the block lasts; notes its limits and, at the end, its memory."""
    bundle = run.bundles.get(served)
    paths = [] if bundle is None or bundle.path is None else [str(bundle.path.resolve())]
    run.say(f"starting {served.value}")
    with companion(RESIDENT, run.settings | {"bundles": paths}, None if paths else WITHOUT_PLUGINS) as made:
        about = made.wait_until_ready()
        check_armed(about, is_steering=bool(paths))
        limits = run.limits[served] = about["limits"]
        run.engines[served] = made
        try:
            yield made
            peak = made.ask(seed=0, plans=[], is_memory=True)["peak_bytes"]
            noted: dict[str, Any] = {"host_peak_bytes": peak, "kv_tokens": limits["kv_tokens"]}
            if bundle is not None:
                noted["added_bytes"] = _added(run, bundle, limits)
            run.memory.setdefault(served.value, noted)
        finally:
            del run.engines[served]


@contextmanager
def _other(run: _Run, plugin: OtherPlugin) -> Iterator[Companion]:
    """An engine with another plugin and none of ours."""
    settings = run.settings | {"bundles": [], "key": plugin.key}
    with companion(RESIDENT, settings, plugin.environment) as made:
        check_armed(made.wait_until_ready(), is_steering=False)
        yield made


def _against_stock(memory: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What each engine held, and how much more of the host's memory and how many tokens less than stock vLLM.

    vLLM fills what its share of a GPU leaves with keys and values, so that memory taken there shows as tokens.
    """
    stock = memory[Served.STOCK.value]
    return {
        served: noted
        | {
            "host_peak_more_bytes": noted["host_peak_bytes"] - stock["host_peak_bytes"],
            "kv_tokens_fewer": stock["kv_tokens"] - noted["kv_tokens"],
        }
        for served, noted in memory.items()
    }


def _added(run: _Run, bundle: Bundle, limits: Mapping[str, int]) -> dict[str, int]:
    terms = max(DEFAULT_TERMS_PER_LAYER, terms_needed([bundle]))
    options = SteeringOptions(bundles=(bundle,), terms_per_layer=terms)
    return added(
        layers=len(options.layers),
        terms=terms,
        width=run.fingerprint.hidden_size,
        requests=limits["max_num_seqs"],
        tokens=limits["max_num_batched_tokens"],
        is_gpu=run.is_gpu,
    ).facts


def _measure(run: _Run, arms: list[Arm]) -> list[Measured]:
    """Every arm in every cell it fits."""
    found = []
    for cell in run.order.cells:
        fitting = [arm for arm in arms if arm.fits(cell.batch)]
        rows = {arm.title: _rows(run, arm, cell) for arm in fitting}
        for turn in range(-WARM_UP, run.order.pairs):
            for arm in fitting:
                if rows[arm.title][0].skipped is not None:
                    continue
                mine, other = _pair(run, arm, cell, turn)
                if turn >= 0:
                    for row in rows[arm.title]:
                        row.add(mine, other)
        for row in itertools.chain.from_iterable(rows.values()):
            run.say(row.line())
            found.append(row)
    return found


def _rows(run: _Run, arm: Arm, cell: Cell) -> list[Measured]:
    """An arm's metrics in a cell, without pairs yet; skipped where an engine cannot hold the batch at once."""
    least = min(run.limits[side.engine]["kv_tokens"] for side in (arm.side, arm.reference))
    needed = cell.kv_tokens(run.order.tokens)
    skipped = None if needed <= least else f"needs keys and values of {needed} tokens, an engine holds {least}"
    return [
        Measured(
            arm=arm.name,
            against=arm.against,
            metric=metric,
            cell=cell,
            bounds=arm.bounds(metric, shape=run.order.shape, prompt=cell.prompt, is_gpu=run.is_gpu),
            skipped=skipped,
        )
        for metric in cell.metrics
    ]


def _pair(run: _Run, arm: Arm, cell: Cell, turn: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A round of either side, by turn the one or the other first; prompts are alike where the engines are not.

    One engine would find the same prompts in its cache.
    """
    seed = next(run.seeds)
    seeds = (seed, next(run.seeds) if arm.side.engine is arm.reference.engine else seed)
    sides = [(0, arm.side), (1, arm.reference)]
    answers: dict[int, dict[str, Any]] = {}
    for number, side in sides if turn % 2 else reversed(sides):
        bundle = run.bundles.get(side.engine)
        plans = [] if side.work is None or bundle is None else side.work.plans(bundle, cell.requests)
        answers[number] = run.engines[side.engine].ask(
            seed=seeds[number], plans=[plan.to_json() for plan in plans], cell=cell.shape(run.order.tokens)
        )
        _check(arm, side, bundle, answers[number])
    made = cell.requests * (1 if cell.is_first else run.order.tokens)
    if not answers[0]["tokens"] == answers[1]["tokens"] == made:
        raise EditNotApplied(f"a pair of {arm.title!r} made {[each['tokens'] for each in answers.values()]} of {made}")
    return answers[0], answers[1]


def _check(arm: Arm, side: Side, bundle: Bundle | None, answer: Mapping[str, Any]) -> None:
    wanted = [] if side.work is None or bundle is None else side.work.layers(bundle)
    if answer["edited"] != wanted:
        raise EditNotApplied(f"a round of {arm.title!r} edited layers {answer['edited']}, its plans {wanted}")
