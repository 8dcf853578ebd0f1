"""Bank: what is loaded is what the op finds, a bundle is loaded whole or not at all, and memory is as stated."""

from __future__ import annotations

import random

import pytest
import torch

from steering.bundle import Bundle
from steering.engine.bank import Bank, terms_needed
from steering.engine.kernels import (
    BIAS,
    COMPLY_EDIT,
    COUNT,
    COUNTS,
    FIRST,
    GATE_COUNT,
    GATE_FIRST,
    OF_RESPONSE,
    REFUSE_EDIT,
    ROW_WIDTH,
    SCALARS,
    table_width,
)
from steering.engine.options import DEFAULT_TERMS_PER_LAYER
from steering.engine.rows import Rows
from steering.errors import BundleFormatError, CapacityExceeded, UnknownName
from steering.terms import Edit, LayerTerms
from tests.samples import bundle_in_memory, random_edit, random_probe, random_terms

CPU = torch.device("cpu")
WIDTH = 16


def bank_of(*, layers: tuple[int, ...] = (0, 1, 2), terms: int = 8) -> Bank:
    """An empty bank."""
    return Bank(layers=layers, width=WIDTH, terms=terms, device=CPU)


def test_every_term_of_every_edit_is_found_through_its_number() -> None:
    """At each layer the edit's row names its first term and count, and those rows hold its numbers exactly."""
    edits = {
        "a": random_edit("a", ranks={0: 2, 2: 1}),
        "b": random_edit("b", ranks={0: 3, 1: 1}, seed=1),
        "c": random_edit("c", ranks={1: 4}, seed=2),
    }
    bank, bundle = bank_of(), bundle_in_memory(edits)
    bank.load(bundle)
    for name, edit in edits.items():
        number = bank.number(bundle=bundle.digest, edit=name)
        by_layer = {terms.layer: terms for terms in edit.layers}
        for layer, table in bank.tables.items():
            first, count = (int(table[number, 2 * WIDTH + column]) for column in (FIRST, COUNT))
            if layer not in by_layer:
                assert count == 0
                continue
            terms, rows = by_layer[layer], table[first : first + count]
            assert count == terms.rank
            assert torch.equal(rows[:, :WIDTH], terms.read)
            assert torch.equal(rows[:, WIDTH : 2 * WIDTH], terms.write)
            assert torch.equal(rows[:, 2 * WIDTH], terms.gain)
            assert torch.equal(rows[:, 2 * WIDTH + 1], terms.bias)


def test_every_gate_is_found_through_its_number() -> None:
    """At its probe's layer the gate's row names its scores; those rows hold the probe and each category's edits."""
    edits = {name: random_edit(name, ranks={1: 1}, seed=seed) for seed, name in enumerate("abc")}
    probe = random_probe("p", layer=1, categories=("x", "y"), width=WIDTH)
    gates = {"one": (probe, {"x": "a", "y": "b"}, {"y": "c"}), "two": (probe, {"x": "c"}, {})}
    bank, bundle = bank_of(terms=16), bundle_in_memory(edits, gates=gates)
    bank.load(bundle)
    assert bank.gates == {bundle.digest: ["one", "two"]}
    for name, (_, *sides) in gates.items():
        gate = bank.gate(bundle=bundle.digest, profile=name)
        assert gate.categories == ("x", "y")
        assert bank.tables[0][gate.number, 2 * WIDTH + GATE_COUNT] == 0
        table = bank.tables[1]
        first, count = (int(table[gate.number, 2 * WIDTH + column]) for column in (GATE_FIRST, GATE_COUNT))
        scores = table[first : first + count]
        assert torch.equal(scores[:, :WIDTH], probe.weight)
        assert torch.equal(scores[:, 2 * WIDTH + BIAS], probe.bias)
        for column, chosen in zip((REFUSE_EDIT, COMPLY_EDIT), sides, strict=True):
            named = [bank.name(int(number)) for number in scores[1:, 2 * WIDTH + column]]
            assert named == [chosen.get(category) for category in ("x", "y")]
    assert bank.tables[1][0, 2 * WIDTH + GATE_COUNT] == 2
    with pytest.raises(UnknownName, match="no gate 'three'"):
        bank.gate(bundle=bundle.digest, profile="three")


def test_terms_needed_is_what_a_bank_can_hold() -> None:
    """A bank of so many terms takes the bundles; one of one less does not."""
    edits = {name: random_edit(name, ranks={1: 3}, seed=seed) for seed, name in enumerate("ab")}
    probe = random_probe("p", layer=1, categories=("x",), width=WIDTH)
    bundle = bundle_in_memory(edits, gates={"g": (probe, {"x": "a"}, {})})
    needed = terms_needed([bundle])
    assert needed == 8
    bank_of(terms=needed).load(bundle)
    with pytest.raises(CapacityExceeded, match="8 terms in one layer"):
        bank_of(terms=needed - 1).load(bundle)


def test_number_zero_is_no_edit_at_any_layer() -> None:
    """Row 0 of every table names no terms, so that padding edits nothing."""
    bank = bank_of()
    bank.load(bundle_in_memory({"a": random_edit("a", ranks={0: 2, 1: 2, 2: 2})}))
    for table in bank.tables.values():
        assert table[0, 2 * WIDTH + COUNT] == 0


def test_the_same_edit_name_in_two_bundles_is_two_edits() -> None:
    """Numbers belong to (digest, name), so bundles never shadow each other."""
    bank = bank_of()
    for digest, seed in (("sha256:a", 0), ("sha256:b", 1)):
        bank.load(bundle_in_memory({"e": random_edit("e", ranks={0: 1}, seed=seed)}, digest=digest))
    assert bank.number(bundle="sha256:a", edit="e") != bank.number(bundle="sha256:b", edit="e")
    assert bank.bundles == {"sha256:a": ["e"], "sha256:b": ["e"]}


def test_loading_a_bundle_again_changes_nothing() -> None:
    """The digest is the identity; tables stay as they are, at the address they had."""
    bank, bundle = bank_of(), bundle_in_memory({"e": random_edit("e", ranks={0: 3})})
    bank.load(bundle)
    before, address = bank.tables[0].clone(), bank.tables[0].data_ptr()
    bank.load(bundle)
    assert torch.equal(bank.tables[0], before)
    assert bank.tables[0].data_ptr() == address


def test_a_bundle_that_does_not_fit_leaves_no_trace() -> None:
    """Too many terms in one layer: the error says what is needed and held, and nothing of the bundle is loaded."""
    bank = bank_of(terms=4)
    bank.load(bundle_in_memory({"small": random_edit("small", ranks={0: 2})}, digest="sha256:a"))
    before = {layer: table.clone() for layer, table in bank.tables.items()}
    big = bundle_in_memory(
        {"fits": random_edit("fits", ranks={1: 1}), "big": random_edit("big", ranks={0: 3})}, digest="sha256:b"
    )
    with pytest.raises(CapacityExceeded, match=r"needs 5 terms in one layer.*holds 4.*terms_per_layer"):
        bank.load(big)
    assert bank.bundles == {"sha256:a": ["small"]}
    for layer, table in bank.tables.items():
        assert torch.equal(table, before[layer])


def test_more_edits_than_the_table_can_name_are_refused() -> None:
    """An edit's number is a row of the table, and row 0 is taken."""
    bank = bank_of(terms=4)
    three = {f"e{n}": random_edit(f"e{n}", ranks={n: 1}) for n in range(3)}
    bank.load(bundle_in_memory(three, digest="sha256:a"))
    with pytest.raises(CapacityExceeded, match="4 edits"):
        bank.load(bundle_in_memory({"e": random_edit("e", ranks={0: 1})}, digest="sha256:b"))


def test_another_width_or_layer_is_refused_by_name() -> None:
    """A bundle for another model never gets into the tables."""
    bank = bank_of(layers=(0, 1))
    with pytest.raises(BundleFormatError, match="'e' has width 8, the model has 16"):
        bank.load(bundle_in_memory({"e": random_edit("e", ranks={0: 1}, width=8)}, width=8))
    with pytest.raises(BundleFormatError, match=r"needs layer 3; layers that carry the op: \[0, 1\]"):
        bank.load(bundle_in_memory({"e": random_edit("e", ranks={0: 1, 3: 1})}))
    assert bank.bundles == {}


def test_unknown_names_are_refused_and_say_what_there_is() -> None:
    """A plan for another bundle or edit finds no number, never that of a neighbour."""
    bank, bundle = bank_of(), bundle_in_memory({"e": random_edit("e", ranks={0: 1})})
    bank.load(bundle)
    for digest, edit in ((bundle.digest, "f"), ("sha256:other", "e")):
        with pytest.raises(UnknownName, match="loaded: "):
            bank.number(bundle=digest, edit=edit)


def test_witness_names_the_layers_whose_op_edited() -> None:
    """Set by the op at the layers where it edited a token, cleared on demand."""
    bank, bundle = bank_of(), bundle_in_memory({"e": random_edit("e", ranks={0: 1, 2: 1})})
    bank.load(bundle)
    rows = Rows(bank=bank, requests=1, tokens=4, device=CPU)
    rows.rows[1, :2] = torch.tensor([bank.number(bundle=bundle.digest, edit="e"), 1.0])
    token_rows = torch.tensor([1, 0, 2, 0, 0], dtype=torch.int32)
    assert bank.witness() == []
    for table in bank.tables.values():
        torch.ops.trimtab.edit(torch.zeros(2, WIDTH), torch.zeros(2, WIDTH), token_rows, rows.rows, table)
    assert bank.witness() == [0, 2]
    bank.clear_witness()
    assert bank.witness() == []


def everything(digest: str, *, ranks: dict[int, int], seed: int = 0) -> Bundle:
    """A bundle of two edits of these ranks, a gate of three scores and a response probe at layer 1."""
    edits = {name: random_edit(name, ranks=ranks, seed=seed + place) for place, name in enumerate("ab")}
    probe = random_probe("p", layer=1, categories=("x", "y"), width=WIDTH, seed=seed)
    reader = random_probe("r", layer=1, categories=(), width=WIDTH, seed=seed + 1)
    gates = {"g": (probe, {"x": "a", "y": "b"}, {"x": "b"})}
    return bundle_in_memory(edits, digest=digest, gates=gates, response=(reader, 4))


def assert_found(bank: Bank, bundle: Bundle) -> None:
    """Through its numbers every term and score of the bundle is found, and every category's edit is its own."""
    scalars = 2 * WIDTH
    for name, edit in bundle.edits.items():
        number = bank.number(bundle=bundle.digest, edit=name)
        assert bank.name(number) == name
        for terms in edit.layers:
            table = bank.tables[terms.layer]
            first, count = (int(table[number, scalars + column]) for column in (FIRST, COUNT))
            rows = table[first : first + count]
            assert torch.equal(rows[:, :WIDTH], terms.read)
            assert torch.equal(rows[:, WIDTH:scalars], terms.write)
            assert torch.equal(rows[:, scalars : scalars + 2], torch.stack([terms.gain, terms.bias], dim=1))
    readers = {bank.response(bundle=bundle.digest).number: bundle.probes["r"]}
    gate = bank.gate(bundle=bundle.digest, profile="g")
    for number, probe in (readers | {gate.number: bundle.probes["p"]}).items():
        table = bank.tables[probe.layer]
        first, count = (int(table[number, scalars + column]) for column in (GATE_FIRST, GATE_COUNT))
        rows = table[first : first + count]
        assert torch.equal(rows[:, :WIDTH], probe.weight)
        assert torch.equal(rows[:, scalars + BIAS], probe.bias)
        named = [[bank.name(int(n)) for n in rows[1:, scalars + column]] for column in (REFUSE_EDIT, COMPLY_EDIT)]
        assert named == ([["a", "b"], ["b", None]] if number == gate.number else [[], []])


def test_an_unloaded_bundle_leaves_nothing() -> None:
    """Tables are as they were before it came, bit for bit, and its names are unknown; its neighbour stays as it is."""
    bank = bank_of(terms=24)
    first, second = (everything(digest, ranks={1: 1, 2: 2}, seed=seed) for seed, digest in enumerate(("f", "s")))
    bank.load(first)
    before = {layer: table.clone() for layer, table in bank.tables.items()}
    bank.load(second)
    assert bank.tables[1][0, 2 * WIDTH + GATE_COUNT] == 2 + 2 * OF_RESPONSE
    bank.unload("s")
    for layer, table in bank.tables.items():
        assert torch.equal(table, before[layer])
    assert_found(bank, first)
    for ask in (
        lambda: bank.number(bundle="s", edit="a"),
        lambda: bank.gate(bundle="s", profile="g"),
        lambda: bank.response(bundle="s"),
    ):
        with pytest.raises(UnknownName):
            ask()
    bank.unload("s")
    assert (list(bank.bundles), bank.taken) == (["f"], {0: 0, 1: 6, 2: 4})


def test_a_torn_bank_is_packed_while_its_bundles_are_used() -> None:
    """Free rows enough, but nowhere enough side by side: the others are moved and still found, numbers are kept."""
    bank = bank_of(terms=24)
    bundles = {str(n): everything(str(n), ranks={1: 1}, seed=n) for n in range(4)}
    for bundle in bundles.values():
        bank.load(bundle)
    assert bank.taken[1] == 24
    for torn in ("0", "2"):
        bank.unload(torn)
    numbers = {digest: bank.number(bundle=digest, edit="a") for digest in ("1", "3")}
    wide = bundle_in_memory({"wide": random_edit("wide", ranks={1: 12})}, digest="wide")
    bank.load(wide)
    assert bank.taken[1] == 24
    for digest, number in numbers.items():
        assert_found(bank, bundles[digest])
        assert bank.number(bundle=digest, edit="a") == number
    number = bank.number(bundle="wide", edit="wide")
    start = int(bank.tables[1][number, 2 * WIDTH + FIRST])
    assert torch.equal(bank.tables[1][start : start + 12, :WIDTH], wide.edits["wide"].layers[0].read)


def test_bundles_come_and_go_in_any_order() -> None:
    """Over 300 random loads and unloads, whatever is loaded is found, and an empty bank is as new."""
    draw, bank = random.Random(5), bank_of(terms=40)
    bundles = {str(n): everything(str(n), ranks={1: 1 + n % 5, 2: 1 + n % 3}, seed=n) for n in range(9)}
    refused = 0
    for _ in range(300):
        bundle = bundles[str(draw.randrange(9))]
        if bundle.digest in bank.bundles:
            bank.unload(bundle.digest)
        else:
            try:
                bank.load(bundle)
            except CapacityExceeded:
                refused += 1
        for digest in bank.bundles:
            assert_found(bank, bundles[digest])
    assert refused > 10
    for digest in list(bank.bundles):
        bank.unload(digest)
    assert not any(table.any() for table in bank.tables.values())
    assert set(bank.taken.values()) == {0}


def test_a_load_that_breaks_off_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device may run out of memory on the way: what was written is cleared."""
    bank = bank_of(terms=24)
    monkeypatch.setattr(bank, "_load_gate", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    with pytest.raises(torch.OutOfMemoryError):
        bank.load(everything("f", ranks={1: 1, 2: 2}))
    assert bank.bundles == {}
    assert not any(table.any() for table in bank.tables.values())


def test_what_is_not_read_stays_out_of_the_table() -> None:
    """A term without gain reads nothing, so its read direction may be anything; in the table it is zero."""
    terms = random_terms(layer=0, rank=2, is_read=False)
    huge = LayerTerms(layer=0, read=terms.read * 1e38, write=terms.write, gain=terms.gain, bias=terms.bias)
    bank = bank_of()
    bank.load(bundle_in_memory({"e": Edit(name="e", layers=(huge,))}))
    assert not bank.tables[0][:, :WIDTH].any()


def test_an_addition_that_is_no_number_in_the_models_dtype_is_refused() -> None:
    """float16 ends at 65,504; bfloat16 holds it."""
    terms = random_terms(layer=0, rank=1)
    large = LayerTerms(layer=0, read=terms.read, write=terms.write, gain=terms.gain, bias=torch.tensor([40_000.0]))
    bundle = bundle_in_memory({"e": Edit(name="e", layers=(large,))})
    narrow = Bank(layers=[0], width=WIDTH, terms=8, device=CPU, dtype=torch.float16)
    with pytest.raises(
        BundleFormatError, match=r"'e' layer 0: bias adds up to 80000 .* strength 2; .*float16 ends at 65504"
    ):
        narrow.load(bundle)
    Bank(layers=[0], width=WIDTH, terms=8, device=CPU, dtype=torch.bfloat16).load(bundle)


def added_bytes(*, layers: int, width: int, terms: int, requests: int, tokens: int) -> int:
    """Bytes of the plugin: layers · N · (2 D + 8) · 4 + (2 · requests + 1) · 40 · 4 + (tokens + 3) · 4."""
    return layers * terms * (2 * width + SCALARS) * 4 + (2 * requests + 1) * ROW_WIDTH * 4 + (tokens + COUNTS) * 4


@pytest.mark.parametrize(
    ("layers", "width", "terms", "requests", "tokens"), [(3, 16, 8, 4, 32), (2, 192, 128, 7, 100), (6, 40, 5, 1, 1)]
)
def test_memory_formula_is_what_tensors_take(layers: int, width: int, terms: int, requests: int, tokens: int) -> None:
    """The formula equals the bytes of every tensor that bank and rows hold."""
    bank = Bank(layers=range(layers), width=width, terms=terms, device=CPU)
    rows = Rows(bank=bank, requests=requests, tokens=tokens, device=CPU)
    held = [*bank.tables.values(), rows.rows, rows.token_rows]
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == added_bytes(
        layers=layers, width=width, terms=terms, requests=requests, tokens=tokens
    )


def test_a_model_of_32_layers_of_4096_takes_less_than_300_megabytes() -> None:
    """Default capacity, 1,024 requests, 8,192 tokens of a step: 135 MB, from the shapes of the real tensors."""
    width, layers = 4096, 32
    bank = Bank(layers=range(layers), width=width, terms=DEFAULT_TERMS_PER_LAYER, device=torch.device("meta"))
    rows = Rows(bank=bank, requests=1024, tokens=8192, device=CPU)
    held = [*bank.tables.values(), rows.rows, rows.token_rows]
    taken = sum(tensor.nelement() * tensor.element_size() for tensor in held)
    assert taken == added_bytes(layers=layers, width=width, terms=DEFAULT_TERMS_PER_LAYER, requests=1024, tokens=8192)
    assert {tensor.shape for tensor in bank.tables.values()} == {(DEFAULT_TERMS_PER_LAYER, table_width(width))}
    assert taken == 134_709_420
    assert taken < 300_000_000
