"""The engine's matrix without engines: shapes, arms, what is asked, memory, pairs, peers and the picture."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from server.bench import arms, beside, matrix, peers, shapes
from server.bench.arms import ARMS, CONTROL, DISTINCT, ONE_EDIT, Metric, Served, Work
from server.bench.cells import Cell, Measured, Order
from server.bench.cli import app
from server.bench.drawn import LOW_RANKS, every_layer_bundle, one_layer_bundle
from server.bench.hooks_resident import HooksResident
from server.bench.memory import added
from server.bench.peers import Peer
from server.bench.report import ratio_of
from server.bench.resident import peak_bytes
from server.bench.shapes import Shape
from steering.bundle import Bundle
from steering.engine.bank import Bank
from steering.engine.options import DEFAULT_TERMS_PER_LAYER, SteeringOptions
from steering.engine.rows import Rows
from steering.errors import EditNotApplied, OperatorError
from steering.fingerprint import Fingerprint, fingerprint_of
from steering.terms import apply_terms


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny shape's folder."""
    return shapes.make(Shape.TINY, tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def fingerprint(tiny: Path) -> Fingerprint:
    """Of the tiny shape."""
    return fingerprint_of(tiny)


@pytest.fixture(scope="module")
def bundles(fingerprint: Fingerprint, tmp_path_factory: pytest.TempPathFactory) -> dict[Served, Bundle]:
    """What either steering engine is started with."""
    folder = tmp_path_factory.mktemp("bundles")
    one = one_layer_bundle(folder / "one", fingerprint, directions=max(DISTINCT), ranks=LOW_RANKS)
    return {Served.ONE: one, Served.ALL: every_layer_bundle(folder / "all", fingerprint)}


@pytest.mark.parametrize(("shape", "parameters"), [(Shape.LLAMA3_8B, 8_030_261_248), (Shape.QWEN3_4B, 4_022_468_096)])
def test_a_made_configuration_has_as_many_parameters_as_the_model(
    shape: Shape, parameters: int, tmp_path: Path
) -> None:
    """Counted by transformers without memory for them; and vLLM's context has room for what is asked by default."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(shapes.make(shape, tmp_path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == parameters
    grid = shapes.GRIDS[shape]
    assert max(grid.prompts) + grid.tokens <= config.max_position_embeddings
    assert {1, 256} <= set(grid.batches)
    assert {128, 2048} == set(grid.prompts)


def test_a_made_shape_can_be_bound_to_bundles(fingerprint: Fingerprint, bundles: dict[Served, Bundle]) -> None:
    """One engine gets the op at its middle layer, the other at all; both bundles pass the server's own checks."""
    steered = {served: SteeringOptions(bundles=(each,), terms_per_layer=1).layers for served, each in bundles.items()}
    assert steered == {Served.ONE: (fingerprint.layers // 2,), Served.ALL: tuple(range(fingerprint.layers))}
    for bundle in bundles.values():
        assert bundle.manifest.model.check(fingerprint, bundle="drawn")


def test_the_arms_are_those_that_are_asked_for(bundles: dict[Served, Bundle]) -> None:
    """Idle, one layer, all layers, both ranks, the gate and 8, 64, 256 distinct, each with plans its bundle has."""
    names = {arm.name for arm in ARMS}
    assert names >= {"idle", "one layer", "all layers", "low rank 8", "low rank 32", "gate", "256 distinct"}
    ranks = {}
    for arm in ARMS:
        if arm.side.work is None:
            continue
        bundle = bundles[arm.side.engine]
        for plan in arm.side.work.plans(bundle, 256):
            assert plan.bundle == bundle.digest
            if plan.edit is not None:
                ranks[arm.name] = {terms.rank for terms in bundle.edits[plan.edit].layers}
                low, high = (bundle.manifest.edit(plan.edit).strength.minimum, 2.0)
                assert low <= plan.strength <= high
        assert arm.side.work.layers(bundle) == sorted(SteeringOptions(bundles=(bundle,), terms_per_layer=1).layers)
    assert (ranks["low rank 8"], ranks["low rank 32"], ranks["one layer"]) == ({8}, {32}, {1})
    assert all(arm.reference.work is None for arm in ARMS if arm.reference.engine is Served.STOCK)


@pytest.mark.parametrize("distinct", DISTINCT)
def test_distinct_means_as_many_edits_and_strengths(distinct: int, bundles: dict[Served, Bundle]) -> None:
    """Every pair of edit and strength occurs equally often; a batch too small for them is left out."""
    plans = Work(distinct=distinct).plans(bundles[Served.ONE], 256)
    pairs = [(plan.edit, plan.strength) for plan in plans]
    assert {pairs.count(pair) for pair in set(pairs)} == {256 // distinct}
    assert len({edit for edit, _ in pairs}) == len({strength for _, strength in pairs}) == distinct
    arm = next(arm for arm in ARMS if arm.name == f"{distinct} distinct")
    assert [arm.fits(batch) for batch in (distinct - 1, distinct)] == [False, True]


def test_what_is_asked_is_asked_of_its_own_case_only() -> None:
    """Throughput of the demo on a CPU, times of the 8B shape on a GPU, first tokens at 2048; nothing elsewhere."""
    by_title = {arm.title: arm for arm in ARMS}

    def asked(title: str, metric: Metric, shape: Shape, *, is_gpu: bool, prompt: int = 128) -> dict[str, float]:
        return by_title[title].bounds(metric, shape=shape, prompt=prompt, is_gpu=is_gpu)

    on_gpu = {title: asked(title, Metric.PACE, Shape.LLAMA3_8B, is_gpu=True).get("most") for title in by_title}
    stock = Served.STOCK.value
    assert on_gpu[f"idle ÷ {stock}"] == 1.005
    assert on_gpu[f"one layer ÷ {stock}"] == 1.01
    assert on_gpu[f"all layers ÷ {stock}"] == 1.03
    assert on_gpu["gate ÷ one layer"] == 1.005
    assert on_gpu["256 distinct ÷ 1 distinct"] == 1.01
    one = f"one layer ÷ {stock}"
    assert asked(one, Metric.FIRST, Shape.LLAMA3_8B, is_gpu=True, prompt=2048) == {"most": 1.01}
    assert asked(one, Metric.FIRST, Shape.LLAMA3_8B, is_gpu=True, prompt=128) == {}
    assert asked(one, Metric.THROUGHPUT, Shape.DEMO, is_gpu=False) == {"target": 0.95}
    assert asked(f"idle ÷ {stock}", Metric.THROUGHPUT, Shape.DEMO, is_gpu=False) == {"target": 0.98}
    assert asked("256 distinct ÷ 1 distinct", Metric.THROUGHPUT, Shape.DEMO, is_gpu=False) == {"target": 0.98}
    assert asked(one, Metric.THROUGHPUT, Shape.TINY, is_gpu=False) == {}
    assert asked(one, Metric.THROUGHPUT, Shape.DEMO, is_gpu=True) == {}
    assert asked(one, Metric.PACE, Shape.LLAMA3_8B, is_gpu=False) == {}


def test_times_are_asked_from_above_and_rates_from_below() -> None:
    """One per cent slower is met at 1.01 and missed above."""
    pairs = [(1.01, 1.0)] * 4
    assert ratio_of("time", pairs, most=1.01).verdict == "met"
    assert ratio_of("time", pairs, most=1.005).verdict == "missed"
    assert "asked ≤ 1.005: missed" in ratio_of("time", pairs, most=1.005).line()
    assert ratio_of("rate", pairs, target=1.02).verdict == "missed"


def test_a_cell_tells_rates_and_times() -> None:
    """Tokens per second of the round, seconds between later tokens, and the first token's where they come singly."""
    answer = {"tokens": 64, "seconds": 2.0, "first_seconds": 0.5, "seconds_per_token": 0.01}
    other = {"tokens": 64, "seconds": 1.0, "first_seconds": 0.25, "seconds_per_token": 0.008}
    found = {}
    for cell in Order(shape=None, batches=(4,), prompts=(128,), tokens=16, pairs=1).cells:
        for metric in cell.metrics:
            row = Measured(arm="a", against="b", metric=metric, cell=cell, bounds={"most": 1.1})
            row.add(answer, other)
            ratio = row.ratio()
            assert ratio is not None
            found[row.name] = ratio.median
    assert found == {
        "a ÷ b, batch 4, prompt 128, throughput": 0.5,
        "a ÷ b, batch 4, prompt 128, time per token": 1.25,
        "a ÷ b, prompt 128, first token": 2.0,
    }


def test_a_round_without_later_tokens_has_no_time_per_token() -> None:
    """Where the first answers end before the last begins nothing is made up."""
    row = Measured(arm="a", against="b", metric=Metric.PACE, cell=Cell(batch=2, prompt=8), bounds={})
    row.add({"seconds_per_token": None}, {"seconds_per_token": 0.1})
    assert row.ratio() is None
    assert "no pairs" in row.line()


@pytest.mark.parametrize("served", [Served.ONE, Served.ALL])
def test_the_added_memory_is_that_of_the_tensors(
    served: Served, fingerprint: Fingerprint, bundles: dict[Served, Bundle]
) -> None:
    """The formula gives the bytes of the bank's, the rows' and the map's own tensors."""
    options = SteeringOptions(bundles=(bundles[served],), terms_per_layer=DEFAULT_TERMS_PER_LAYER * 3)
    size: dict[str, Any] = {"width": fingerprint.hidden_size, "terms": options.terms_per_layer}
    bank = Bank(layers=options.layers, device=torch.device("cpu"), **size)
    bank.load(bundles[served])
    rows = Rows(bank=bank, requests=32, tokens=2048, device=torch.device("cpu"))
    found = added(layers=len(options.layers), requests=32, tokens=2048, is_gpu=False, **size)
    assert found.bank == sum(table.nbytes for table in bank.tables.values())
    assert (found.rows, found.token_rows) == (rows.rows.nbytes, rows.token_rows.nbytes)
    assert found.device == found.bank + found.rows + found.token_rows
    on_gpu = added(layers=len(options.layers), requests=32, tokens=2048, is_gpu=True, **size)
    assert on_gpu.device - found.device == rows.rows.nbytes + 8 * len(rows.rows)


def test_an_engines_memory_is_told_against_stock() -> None:
    """Host memory as more bytes, a GPU's as fewer tokens of keys and values."""
    stock = {"host_peak_bytes": 100, "kv_tokens": 1000}
    one = {"host_peak_bytes": 130, "kv_tokens": 990}
    found = matrix._against_stock({Served.STOCK.value: stock, Served.ONE.value: one})[Served.ONE.value]
    assert found == one | {"host_peak_more_bytes": 30, "kv_tokens_fewer": 10}


def test_the_peak_of_memory_is_counted_over_processes() -> None:
    """At least what this process holds now, in bytes; children come on top."""
    alone = peak_bytes()
    assert alone > 50 * 1024 * 1024
    with subprocess.Popen(["sleep", "30"]) as child:
        try:
            assert peak_bytes() > alone
        finally:
            child.kill()


class _Engines:
    """Residents that answer at a set pace and note what they were asked."""

    def __init__(self, seconds: float, edited: list[int]) -> None:
        self.seconds, self.edited = seconds, edited
        self.asked: list[tuple[int, int]] = []

    def ask(self, *, seed: int, plans: list[str], cell: dict[str, Any]) -> dict[str, Any]:
        """As `Resident.cell`."""
        self.asked.append((seed, len(plans)))
        return {
            "tokens": cell["requests"] * cell["tokens"],
            "seconds": self.seconds,
            "first_seconds": self.seconds / 2,
            "seconds_per_token": self.seconds / 100,
            "edited": self.edited if plans else [],
        }


def _run(engines: dict[Served, Any], bundles: dict[Served, Bundle], fingerprint: Fingerprint, kv: int) -> Any:
    order = Order(shape=Shape.DEMO, batches=(2,), prompts=(16,), tokens=4, pairs=3)
    run = matrix._Run(
        order=order,
        model=Path("model"),
        is_drawn=True,
        is_gpu=False,
        fingerprint=fingerprint,
        bundles=bundles,
        folder=Path("folder"),
        say=lambda _line: None,
    )
    run.engines.update(engines)
    run.limits.update({served: {"kv_tokens": kv} for served in engines})
    return run


def test_pairs_alternate_and_never_repeat_a_prompt_in_one_engine(
    fingerprint: Fingerprint, bundles: dict[Served, Bundle]
) -> None:
    """Two engines get the same prompts, one engine different ones, since its cache would know them."""
    stock, one = _Engines(1.0, []), _Engines(1.25, [fingerprint.layers // 2])
    run = _run({Served.STOCK: stock, Served.ONE: one}, bundles, fingerprint, 10_000)
    against_stock = next(arm for arm in ARMS if arm.name == "one layer")
    found = matrix._measure(run, [against_stock, CONTROL])
    medians = {row.name: row.ratio().median for row in found if row.ratio() is not None}
    assert medians[f"one layer ÷ {Served.STOCK.value}, batch 2, prompt 16, throughput"] == 0.8
    assert medians[f"one layer ÷ {Served.STOCK.value}, prompt 16, first token"] == 1.25
    for engine in (stock, one):
        assert len({seed for seed, _ in engine.asked}) == len(engine.asked)
    assert {seed for seed, _ in one.asked} < {seed for seed, _ in stock.asked}
    assert {count for _, count in one.asked} == {2, 8}
    assert {count for _, count in stock.asked} == {0}
    assert all(len(row.mine) == 3 for row in found)


def test_a_round_that_did_not_edit_is_an_error(fingerprint: Fingerprint, bundles: dict[Served, Bundle]) -> None:
    """No number is reported of an engine that left its plans undone."""
    run = _run({Served.STOCK: _Engines(1.0, []), Served.ONE: _Engines(1.0, [])}, bundles, fingerprint, 10_000)
    with pytest.raises(EditNotApplied, match="one layer"):
        matrix._measure(run, [next(arm for arm in ARMS if arm.name == "one layer")])


def test_a_batch_that_does_not_fit_is_said_and_not_measured(
    fingerprint: Fingerprint, bundles: dict[Served, Bundle]
) -> None:
    """Preemptions would be timed otherwise; the report names what was needed and what there was."""
    stock = _Engines(1.0, [])
    found = matrix._measure(_run({Served.STOCK: stock}, bundles, fingerprint, 39), [CONTROL])
    assert [row.skipped is None for row in found] == [False, False, True]
    assert "40 tokens, an engine holds 39" in found[0].line()


def test_unknown_arms_and_too_long_prompts_are_refused_before_anything_starts(tmp_path: Path) -> None:
    """The operator is told what there is, and how much room."""
    with pytest.raises(OperatorError, match="all layers"):
        arms.chosen(["nonsense"], with_control=False)
    assert [arm.name for arm in arms.chosen(["idle"], with_control=True)] == ["idle", CONTROL.name]
    order = Order(shape=Shape.TINY, batches=(1,), prompts=(4096,), tokens=1, pairs=1)
    with pytest.raises(OperatorError, match="context of 4097, the model has 4096"):
        matrix.measure(order, tmp_path, lambda _line: None)
    for given in (["--batches", "1,x"], ["--prompts", "0"], ["--shape", "tiny", "--model", "somewhere"]):
        assert isinstance(CliRunner().invoke(app, ["engine", *given]).exception, OperatorError)


def test_hooks_make_the_same_edit_as_the_engine_is_asked_for(tiny: Path, bundles: dict[Served, Bundle]) -> None:
    """The last position of the prompt and every later one is edited, by the terms at strength 1; the rest is not."""
    bundle = bundles[Served.ONE]
    assert bundle.path is not None
    settings = {"model": str(tiny), "is_drawn": True, "bundle": str(bundle.path), "edit": ONE_EDIT.edit}
    resident = HooksResident({**settings, "vocabulary": 256})
    (terms,) = bundle.edits[str(ONE_EDIT.edit)].layers
    seen: list[torch.Tensor] = []

    def keep(_module: Any, inputs: Any, _output: Any) -> None:
        seen.append(inputs[0].clone())

    def passes(peer: Peer) -> list[torch.Tensor]:
        seen.clear()
        answer = resident.order(peer.value, 7, requests=3, length=5, tokens=2)
        assert answer["tokens"] == 6
        assert answer["edited"] == ([] if peer is Peer.PLAIN else [terms.layer])
        return list(seen)

    # What the next block reads is what the hook left.
    hook = resident._model.model.layers[terms.layer + 1].register_forward_hook(keep)
    try:
        plain, edited = passes(Peer.PLAIN), passes(Peer.HOOKS)
    finally:
        hook.remove()
    assert [tuple(each.shape[:2]) for each in edited] == [(3, 5), (3, 1)]
    assert torch.equal(plain[0][:, :-1], edited[0][:, :-1])
    assert torch.equal(apply_terms(plain[0][:, -1], terms, 1.0), edited[0][:, -1])
    assert not torch.equal(plain[1], edited[1])


def test_peers_that_are_not_installed_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by the name of their package, and nothing is fetched."""
    found = peers.installed()
    assert found[Peer.HOOKS] is not None
    monkeypatch.setitem(peers.PACKAGES, Peer.REPENG, "a-package-that-nobody-has")
    assert peers.installed()[Peer.REPENG] is None


def test_hotwire_gets_the_same_addition(tmp_path: Path, bundles: dict[Served, Bundle]) -> None:
    """A row per layer in its file, zero but at the edited one, and an order by that file's name."""
    bundle = bundles[Served.ONE]
    edit = bundle.edits[str(ONE_EDIT.edit)]
    other = peers.hotwire(edit, layers=bundle.manifest.model.layers, folder=tmp_path)
    order = json.loads(other.order)
    vectors = torch.load(Path(other.environment["HOTWIRE_VECTORS"]) / f"{order['id']}.pt", weights_only=True)
    assert order["layer"] == edit.layers[0].layer
    stream = torch.randn(3, edit.width)
    torch.testing.assert_close(
        stream + order["scale"] * vectors[order["layer"]], apply_terms(stream, edit.layers[0], 1.0)
    )
    assert np.count_nonzero(vectors.abs().sum(1).numpy()) == 1


def test_beside_is_measured_pair_by_pair(
    tmp_path: Path, fingerprint: Fingerprint, bundles: dict[Served, Bundle]
) -> None:
    """The engine against a peer that takes four times as long; one that lacks memory is said."""
    layers = ONE_EDIT.layers(bundles[Served.ONE])
    engine = _Engines(1.0, layers)
    order = Order(shape=Shape.TINY, batches=(2,), prompts=(16,), tokens=4, pairs=3, peer_pairs=2)
    seeds = iter(range(100))
    given = beside.Beside(
        order=order,
        bundle=bundles[Served.ONE],
        steering=engine,  # type: ignore[arg-type]
        start=lambda _plugin: pytest.fail("no engine is started"),
        settings={},
        is_drawn=True,
        is_gpu=False,
        folder=tmp_path,
        seed=lambda: next(seeds),
    )
    slow = lambda _cell, _seed: {"tokens": 8, "seconds": 4.0, "edited": layers}
    (row,) = beside._against(given, Peer.HOOKS, slow, lambda _line: None)
    ratio = row.ratio()
    assert ratio is not None
    assert (ratio.median, ratio.pairs) == (4.0, (4.0, 4.0))
    full = lambda _cell, _seed: {"failed": "out of memory"}
    (row,) = beside._against(given, Peer.HOOKS, full, lambda _line: None)
    assert "out of memory" in row.line()
    idle = lambda _cell, _seed: {"tokens": 8, "seconds": 4.0, "edited": []}
    with pytest.raises(EditNotApplied):
        beside._against(given, Peer.HOOKS, idle, lambda _line: None)
