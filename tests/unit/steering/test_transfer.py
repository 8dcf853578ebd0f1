"""Transfer: profiles carried over unchanged to a model of the same shape, and only when that is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from server.catalog import view_of
from server.cli import app
from steering.bundle import Bundle, load_bundle, save_bundle
from steering.errors import FingerprintMismatch, OperatorError, TrimtabError, UnknownName
from steering.fingerprint import fingerprint_of
from steering.plan import CategorySource
from steering.transfer import transfer
from tests.samples import LAYERS, WIDTH, manifest_of, random_edit, random_probe, with_gates, with_response

TOKENS = {"[Safety]": 5, "[respond]": 6}
POINT = {
    "name": "youden",
    "threshold": 0.535,
    "true_positive_rate": 0.969,
    "false_positive_rate": 0.0206,
    "positives": 1148,
    "negatives": 38,
}


def make_model(folder: Path, *, seed: int, tokens: dict[str, int] = TOKENS, **config: Any) -> Path:
    """A model folder with what a fingerprint and a tokenizer read."""
    folder.mkdir()
    shape = {"architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps({**shape, "vocab_size": 64, **config}))
    save_file({"weight": torch.full((8,), float(seed))}, folder / "model.safetensors")
    vocabulary = {f"t{index}": index for index in range(5)} | tokens
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}
    added = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", **added, "model": model}))
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The model that the source was made for."""
    return make_model(tmp_path / "home", seed=1)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Another model of the same shape, without refusal tokens."""
    return make_model(tmp_path / "target", seed=2, tokens={})


@pytest.fixture
def source(tmp_path: Path, home: Path) -> Bundle:
    """A bundle with the profiles `low-rank`, `p1-categorical`, which reads refusal tokens, and one without a gate."""
    edits = {name: random_edit(name, ranks={2: 1}, seed=seed) for seed, name in enumerate(("plain", "low", "cat"))}
    probes = [random_probe(name, layer=1, categories=("safety",), seed=seed) for seed, name in enumerate(("p", "q"))]
    maps = [({"safety": name}, {"safety": name}) for name in ("low", "cat")]
    gates = {"low-rank": (probes[0], *maps[0]), "p1-categorical": (probes[1], *maps[1])}
    manifest = with_gates(manifest_of(edits), gates)
    manifest["model"] = fingerprint_of(home).model_dump()
    for profile in manifest["profiles"]:
        if profile["name"] == "p1-categorical":
            profile["gate"]["category_source"] = "refusal_tokens"
    for probe in manifest["probes"]:
        probe["operating_points"] = [POINT]
    return save_bundle(tmp_path / "source", manifest, edits, {probe.name: probe for probe in probes})


def test_the_learned_vector_is_carried_over_unchanged(source: Bundle, target: Path, tmp_path: Path) -> None:
    """By default `low-rank` alone, with its edit, probe and thresholds, bound to the target and telling its origin."""
    made = transfer(source, target, tmp_path / "out", is_accepted=True)
    manifest = made.manifest
    assert [profile.name for profile in manifest.profiles] == ["low-rank"]
    assert manifest.default_profile == "low-rank"
    assert manifest.profiles[0] == source.manifest.profile("low-rank")
    assert (set(made.edits), set(made.probes)) == ({"low"}, {"p"})
    for part in ("read", "write", "gain", "bias"):
        kept, original = (getattr(bundle.edits["low"].layers[0], part) for bundle in (made, source))
        assert torch.equal(kept, original)
    assert torch.equal(made.probes["p"].weight, source.probes["p"].weight)
    assert manifest.probes[0] == source.manifest.probes[0]
    assert manifest.edit("low") == source.manifest.edit("low")
    assert manifest.model == fingerprint_of(target)
    assert manifest.transfer is not None
    assert manifest.transfer.bundle == f"sample@{source.digest}"
    assert manifest.transfer.bundle.startswith(source.label)
    assert manifest.transfer.model == source.manifest.model
    assert made.digest != source.digest
    assert source.digest in (tmp_path / "out" / "CARD.md").read_text()


def test_a_response_probe_stays_behind(source: Bundle, home: Path, target: Path, tmp_path: Path) -> None:
    """It tells of its own model's answers; the rest is carried over, and verdicts of the target's stay unknown."""
    reads = random_probe("answers", layer=1, categories=(), seed=5)
    fields = with_response(source.manifest.model_dump(mode="json"), reads, 4)
    del fields["tensors_digest"]
    watching = save_bundle(tmp_path / "watching", fields, dict(source.edits), {**source.probes, "answers": reads})
    assert watching.manifest.response is not None
    made = transfer(watching, target, tmp_path / "out", is_accepted=True)
    assert made.manifest.response_probe is None
    assert set(made.probes) == {"p"}


def test_the_targets_tokens_are_not_assumed_to_mean_refusals(source: Bundle, target: Path, tmp_path: Path) -> None:
    """Without being told so, no token of the target names a category or begins an answer."""
    manifest = transfer(source, target, tmp_path / "out", is_accepted=True).manifest
    assert [(category.name, category.token, category.token_id) for category in manifest.categories] == [
        ("safety", None, None)
    ]
    assert manifest.respond is None


def test_tokens_are_kept_where_the_target_has_them(source: Bundle, tmp_path: Path) -> None:
    """The same text under the same id; then also a profile that reads refusal tokens is carried over."""
    target = make_model(tmp_path / "same-tokens", seed=3)
    names = ("p1-categorical", "low-rank")
    made = transfer(
        source, target, tmp_path / "out", profiles=names, is_accepted=True, keeps_refusal_tokens=True
    ).manifest
    assert made.categories == source.manifest.categories
    assert made.respond == source.manifest.respond
    gate = made.profile("p1-categorical").gate
    assert gate is not None
    assert gate.category_source is CategorySource.REFUSAL_TOKENS


@pytest.mark.parametrize("tokens", [{}, {"[Safety]": 6, "[respond]": 5}, {"[Safety]": 5}])
def test_tokens_that_differ_are_named(source: Bundle, tmp_path: Path, tokens: dict[str, int]) -> None:
    """A missing token, and one under another id, say what was found and what is needed."""
    target = make_model(tmp_path / "other-tokens", seed=3, tokens=tokens)
    with pytest.raises(OperatorError, match=r"'\[respond\]': found id \S+, needs 6"):
        transfer(source, target, tmp_path / "out", is_accepted=True, keeps_refusal_tokens=True)


def test_transfer_must_be_accepted(source: Bundle, target: Path, tmp_path: Path) -> None:
    """The refusal says what would be accepted, and nothing is written."""
    with pytest.raises(FingerprintMismatch, match=r"measured on another model.*--accept-transfer"):
        transfer(source, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "architecture: found MistralForCausalLM, needs LlamaForCausalLM"),
        ({"hidden_size": 32}, "hidden_size: found 32, needs 16"),
        ({"num_hidden_layers": 5}, "layers: found 5, needs 4"),
    ],
)
def test_another_shape_is_refused_even_if_accepted(
    source: Bundle, tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    """The field that differs is named, with the value found and the value needed."""
    other = make_model(tmp_path / "other", seed=2, **config)
    with pytest.raises(FingerprintMismatch, match=words):
        transfer(source, other, tmp_path / "out", is_accepted=True)


@pytest.mark.parametrize(
    ("profiles", "error", "words"),
    [
        (("nope", "low-rank"), UnknownName, r"no profiles \['nope'\].*'p1-categorical'"),
        (("p1-categorical",), OperatorError, r"\['p1-categorical'\] read the model's refusal tokens"),
    ],
)
def test_profiles_that_cannot_be_carried_over_are_named(
    source: Bundle, target: Path, tmp_path: Path, profiles: tuple[str, ...], error: type[TrimtabError], words: str
) -> None:
    """Unknown ones with those that are there; those that read tokens with the way to keep these."""
    with pytest.raises(error, match=words):
        transfer(source, target, tmp_path / "out", profiles=profiles, is_accepted=True)


def test_nothing_to_transfer_and_nothing_to_overwrite(source: Bundle, home: Path, target: Path, tmp_path: Path) -> None:
    """A bundle's own model needs no transfer, and a folder with a bundle is left alone."""
    with pytest.raises(OperatorError, match="nothing to transfer"):
        transfer(source, home, tmp_path / "out", is_accepted=True)
    assert source.path is not None
    with pytest.raises(OperatorError, match="holds a bundle already"):
        transfer(source, target, source.path, is_accepted=True)


def test_a_second_transfer_still_tells_the_first_origin(source: Bundle, target: Path, tmp_path: Path) -> None:
    """What was measured where does not get lost on the way."""
    third = make_model(tmp_path / "third", seed=3, tokens={})
    once = transfer(source, target, tmp_path / "once", is_accepted=True)
    twice = transfer(once, third, tmp_path / "twice", is_accepted=True)
    assert twice.manifest.transfer == once.manifest.transfer
    assert twice.manifest.model == fingerprint_of(third)


def test_answers_under_a_transferred_bundle_say_so(source: Bundle, target: Path, tmp_path: Path) -> None:
    """The fingerprint fits, so that the server starts as usual; the record alone makes the catalogue say it."""
    made = transfer(source, target, tmp_path / "out", is_accepted=True)
    assert made.manifest.model.check(fingerprint_of(target), bundle=made.manifest.name)
    view, own = (view_of(bundle, is_transferred=False) for bundle in (made, source))
    assert (view.is_transferred, own.is_transferred) == (True, False)
    gate = view.profiles["low-rank"].gate
    assert gate is not None
    assert (gate.comply_below, gate.refuse_above, gate.probe.operating_points[0].threshold) == (0.4, 0.6, 0.535)


def test_commands_make_and_describe_a_transferred_bundle(source: Bundle, target: Path, tmp_path: Path) -> None:
    """`bundle transfer` writes it, `bundle verify` prints probes, gates and where it comes from."""
    out = tmp_path / "out"
    order = ["bundle", "transfer", str(source.path), "--model", str(target), "--out", str(out)]
    refused = CliRunner().invoke(app, order)
    assert isinstance(refused.exception, FingerprintMismatch)
    order += ["--accept-transfer", "--profile", "low-rank", "--profile", "default"]
    made = CliRunner().invoke(app, order)
    assert made.exit_code == 0, made.output
    assert load_bundle(out).label in made.output
    shown = CliRunner().invoke(app, ["bundle", "verify", str(out), "--model", str(target)])
    assert shown.exit_code == 0, shown.output
    for words in (
        "probe 'p' at layer 1 tells safety",
        "youden: threshold 0.535, true positives 96.9% of 1148, false positives 2.1% of 38",
        "profile 'low-rank': gate on probe 'p', complies up to 0.4, refuses from 0.6 on, category by probe",
        "profile 'default' (default): no gate",
        f"transferred from bundle sample@{source.digest}",
        "made for the model in",
    ):
        assert words in shown.output
