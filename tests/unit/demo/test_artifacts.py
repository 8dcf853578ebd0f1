"""What is committed under artifacts/demo: small, whole, bound together, and described by its own numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steering.bundle import load_bundle
from steering.demo.card import losses_of, write_card
from steering.demo.measure import HELD_SETS, PROBE_SETS, held_records
from steering.fingerprint import fingerprint_of
from steering.fit.catalog import CATALOG
from steering.fit.categories import CATEGORIES, PLAIN
from steering.fit.control_bundle import PROFILE
from steering.fit.datasets import DataDirectory, Record, thinned
from steering.fit.sources import Label, Use

DEMO = Path(__file__).resolve().parents[3] / "artifacts" / "demo"
pytestmark = pytest.mark.skipif(not (DEMO / "model").is_dir(), reason="needs artifacts/demo/model of the checkout")


def test_the_demo_is_small_enough_for_git() -> None:
    """Model, sibling and bundle together stay under 20 MB."""
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 20_000_000


def test_the_card_is_what_its_numbers_generate(tmp_path: Path) -> None:
    """Nobody typed a number into CARD.md: writing it again from measure.json gives the same bytes."""
    facts = json.loads((DEMO / "measure.json").read_text(encoding="utf-8"))
    assert write_card(tmp_path, facts).read_text(encoding="utf-8") == (DEMO / "CARD.md").read_text(encoding="utf-8")


def test_the_card_names_every_licence_and_says_that_it_is_a_toy() -> None:
    """Each set of the registry is listed with its licence, those for testing only as such."""
    card = (DEMO / "CARD.md").read_text(encoding="utf-8")
    assert "This is a toy" in card
    for dataset in CATALOG:
        line = next(line for line in card.splitlines() if f"[{dataset.title}]" in line)
        assert dataset.licence in line
        assert dataset.attribution in line
    assert "none: for testing only" in next(line for line in card.splitlines() if "[XSTest" in line)


def test_the_bundle_is_bound_to_the_demo_and_offers_every_category_both_ways() -> None:
    """It loads through every check, its fingerprint is the model's, and the default profile is complete."""
    bundle = load_bundle(DEMO / "bundle")
    assert bundle.manifest.model == fingerprint_of(DEMO / "model")
    profile = next(profile for profile in bundle.manifest.profiles if profile.name == PROFILE)
    assert bundle.manifest.default_profile == PROFILE
    assert set(profile.comply) == set(CATEGORIES), "plain prompts are left alone"
    assert set(profile.refuse) == {*CATEGORIES, PLAIN}
    for edits in (profile.refuse, profile.comply):
        assert all(bundle.manifest.edit(name).strength.maximum >= profile.strength for name in edits.values())


def test_the_sibling_shares_shape_and_tokenizer_but_not_weights() -> None:
    """It is what a bundle may be transferred to, and only explicitly."""
    model, sibling = fingerprint_of(DEMO / "model"), fingerprint_of(DEMO / "sibling")
    assert (model.hidden_size, model.layers) == (sibling.hidden_size, sibling.layers)
    assert model.tokenizer_digest == sibling.tokenizer_digest
    assert model.chat_template_digest == sibling.chat_template_digest
    assert model.weights_digest != sibling.weights_digest


def test_measured_sets_are_held_sets() -> None:
    """Nothing on the card was measured on a part that has no share for testing."""
    shares = {(dataset.name, part.name): part.shares for dataset in CATALOG for part in dataset.parts}
    assert all(Use.TEST in shares[part] for held in HELD_SETS for part in held.parts)
    assert set(PROBE_SETS) <= {held.name for held in HELD_SETS if held.wanted}


def test_thinning_keeps_order_and_spreads_evenly() -> None:
    """A large set is represented from beginning to end."""
    records = [Record(key=str(i), dataset="d", part="p", prompt=str(i), label=Label.BENIGN) for i in range(10)]
    assert [record.key for record in thinned(records, 5)] == ["0", "2", "4", "6", "8"]
    assert thinned(records, 10) == records


def test_a_resumed_loss_log_counts_each_step_once(tmp_path: Path) -> None:
    """The later value of a step that was run again wins."""
    log = tmp_path / "demo.jsonl"
    log.write_text('{"step": 0, "loss": 3.0}\n{"step": 1, "loss": 2.0}\n{"step": 1, "loss": 2.5}\n', encoding="utf-8")
    assert losses_of(log) == [3.0, 2.5]


@pytest.mark.needs_data
def test_a_held_set_is_limited_and_filtered_by_label(data_directory: Path) -> None:
    """CoCoNot's 40 % part is cut into safety and the other four without overlap."""
    directory = DataDirectory(path=data_directory)
    held = {held.name: held_records(directory, held) for held in HELD_SETS}
    for limits in HELD_SETS:
        assert 0 < len(held[limits.name]) <= limits.most
    safety, others = held["CoCoNot safety, 40 % part"], held["CoCoNot other four, 40 % part"]
    assert {record.label for record in safety} == {Label.HARMFUL}
    assert not {record.key for record in safety} & {record.key for record in others}
