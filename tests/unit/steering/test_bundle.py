"""Bundle: a good one comes back as written, and every way to tamper with one is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from steering.bundle import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MOST_BIAS,
    MOST_GAIN,
    MOST_PROBE,
    TENSORS,
    load_bundle,
    save_bundle,
)
from steering.errors import BundleDigestError, BundleFormatError
from steering.fingerprint import digest_of
from tests.samples import manifest_of, random_edit, random_probe, with_gates, write_bundle

EDITS = {"raise": random_edit("raise", ranks={1: 2, 3: 1}), "lower": random_edit("lower", ranks={2: 1}, seed=1)}
Fields = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good bundle with two edits."""
    write_bundle(tmp_path / "bundle", EDITS)
    return tmp_path / "bundle"


def tamper_manifest(folder: Path, change: Callable[[Fields], object]) -> None:
    """Rewrite the manifest; NaN and infinity are written as Python writes them."""
    fields = json.loads((folder / MANIFEST).read_text())
    change(fields)
    (folder / MANIFEST).write_text(json.dumps(fields))


def tamper_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the tensors and make the manifest name their new digest, as a careful attacker would."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    payload = save(tensors)
    (folder / TENSORS).write_bytes(payload)
    tamper_manifest(folder, lambda fields: fields.update(tensors_digest=digest_of(payload)))


def at(*path: str | int) -> Callable[[Fields, object], None]:
    """Set the value at a path into nested lists and dictionaries."""

    def put(fields: Any, value: object) -> None:
        for step in path[:-1]:
            fields = fields[step]
        fields[path[-1]] = value

    return put


def test_round_trip(folder: Path) -> None:
    """Every number, name and layer comes back as written, and the digest is that of the manifest's bytes."""
    bundle = load_bundle(folder)
    assert list(bundle.edits) == ["raise", "lower"]
    for name, edit in EDITS.items():
        assert [terms.layer for terms in bundle.edits[name].layers] == [terms.layer for terms in edit.layers]
        for read, written in zip(bundle.edits[name].layers, edit.layers, strict=True):
            for part in ("read", "write", "gain", "bias"):
                assert torch.equal(getattr(read, part), getattr(written, part))
    assert bundle.digest == digest_of((folder / MANIFEST).read_bytes())
    assert bundle.label == f"sample@{bundle.digest[:19]}"
    assert bundle.path == folder
    assert bundle.manifest.edit("lower").layers == (2,)


def test_the_same_content_has_the_same_digest(tmp_path: Path) -> None:
    """A bundle written twice is one bundle: its digest names its content, not its folder."""
    assert write_bundle(tmp_path / "a", EDITS).digest == write_bundle(tmp_path / "b", EDITS).digest


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), 2, "format"),
        (("format",), "1.0", "format"),
        (("surprise",), 1, r"surprise: Extra inputs"),
        (("model", "surprise"), 1, r"model\.surprise"),
        (("edits", 0, "surprise"), 1, r"edits\.0\.surprise"),
        (("edits", 0, "strength", "surprise"), 1, r"strength\.surprise"),
        (("profiles", 0, "surprise"), 1, r"profiles\.0\.surprise"),
        (("categories", 0, "surprise"), 1, r"categories\.0\.surprise"),
        (("edits", 0, "strength", "maximum"), float("nan"), r"strength\.maximum"),
        (("edits", 0, "strength", "maximum"), float("inf"), r"strength\.maximum"),
        (("edits", 0, "strength", "minimum"), -1.0, r"strength\.minimum"),
        (("edits", 0, "strength", "minimum"), 3.0, r"exceeds maximum"),
        (("edits", 0, "provenance", "accuracy"), float("nan"), r"provenance.*finite"),
        (("edits", 0, "provenance", "nested"), [{"a": float("-inf")}], r"provenance.*finite"),
        (("profiles", 0, "strength"), float("nan"), r"profiles\.0\.strength"),
        (("profiles", 0, "strength"), 0.0, r"profiles\.0\.strength"),
        (("profiles", 0, "scope"), "some", r"profiles\.0\.scope"),
        (("profiles", 0, "refuse"), {"safety": "absent"}, r"'default'.*unknown 'absent'"),
        (("profiles", 0, "comply"), {"absent": "raise"}, r"'default'.*'absent'"),
        (("profiles", 0, "default_category"), "absent", r"default_category 'absent'"),
        (("default_profile",), "absent", r"default_profile 'absent'"),
        (("edits", 1, "name"), "raise", r"edit names must be unique"),
        (("edits", 0, "category"), "absent", r"category 'absent'"),
        (("edits", 0, "purpose"), "harm", r"edits\.0\.purpose"),
        (("edits", 0, "purpose"), "comply", r"for refuse, its purpose is comply"),
        (("edits", 0, "layers"), [3, 1], r"must ascend below 4"),
        (("edits", 0, "layers"), [1, 1], r"must ascend below 4"),
        (("edits", 0, "layers"), [1, 4], r"must ascend below 4"),
        (("edits", 0, "layers"), [], r"edits\.0\.layers"),
        (("edits", 0, "layers"), [-1, 3], r"edits\.0\.layers"),
        (("edits", 0, "name"), "../raise", r"edits\.0\.name"),
        (("edits", 0, "name"), "", r"edits\.0\.name"),
        (("name",), "two\nlines", r"name: .*printable"),
        (("categories", 0, "token_id"), -1, r"token_id"),
        (("edits",), [], r"edits"),
        (("profiles",), [], r"profiles"),
        (("tensors_digest",), None, r"tensors_digest"),
    ],
)
def test_a_tampered_manifest_is_refused_by_field(
    folder: Path, path: tuple[str | int, ...], value: object, message: str
) -> None:
    """Unknown keys, other versions, numbers that are none, and names that lead nowhere, each named in the message."""
    tamper_manifest(folder, lambda fields: at(*path)(fields, value))
    with pytest.raises(BundleFormatError, match=message):
        load_bundle(folder)


@pytest.mark.parametrize("kind", ["categories", "profiles"])
def test_duplicate_names_are_refused(folder: Path, kind: str) -> None:
    """A name stands for one category and one profile (edits: above)."""
    tamper_manifest(folder, lambda fields: fields[kind].append(fields[kind][0]))
    with pytest.raises(BundleFormatError, match="names must be unique"):
        load_bundle(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1} trailing', "\x00"])
def test_a_manifest_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    """Broken JSON is a format error that names the file, not a traceback of the parser."""
    (folder / MANIFEST).write_text(text)
    with pytest.raises(BundleFormatError, match=r"manifest\.json"):
        load_bundle(folder)


def test_an_oversized_manifest_is_refused_before_it_is_read(folder: Path) -> None:
    """The limit is named; the bytes are not parsed."""
    with (folder / MANIFEST).open("a") as stream:
        stream.write(" " * MAX_MANIFEST_BYTES)
    with pytest.raises(BundleFormatError, match=f"at most {MAX_MANIFEST_BYTES}"):
        load_bundle(folder)


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_a_missing_file_is_refused(folder: Path, name: str) -> None:
    """The message names the file and what a bundle is made of."""
    (folder / name).unlink()
    with pytest.raises(BundleFormatError, match=f"cannot read .*{name}.*a bundle is a directory"):
        load_bundle(folder)


def test_tensors_that_are_not_the_named_ones_are_refused(folder: Path) -> None:
    """One flipped bit in the directions is noticed, with both digests in the message."""
    payload = bytearray((folder / TENSORS).read_bytes())
    payload[-1] ^= 1
    (folder / TENSORS).write_bytes(payload)
    with pytest.raises(BundleDigestError, match=rf"{digest_of(bytes(payload))}.*needs sha256:"):
        load_bundle(folder)


def test_another_manifest_digest_means_another_bundle(folder: Path) -> None:
    """Any byte of the manifest, also one of no meaning, changes the digest by which plans name the bundle."""
    before = load_bundle(folder).digest
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text() + "\n")
    assert load_bundle(folder).digest != before


def test_bytes_that_are_no_safetensors_are_refused(folder: Path) -> None:
    """A pickle under the right digest is still not opened."""
    (folder / TENSORS).write_bytes(b"\x80\x04K\x01.")
    tamper_manifest(folder, lambda fields: fields.update(tensors_digest=digest_of(b"\x80\x04K\x01.")))
    with pytest.raises(BundleFormatError, match="not a safetensors file"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("raise/3/bias"), r"lacks 'raise/3/bias'"),
        (lambda t: t.update({"extra": torch.ones(1)}), r"no edit or probe names: \['extra'\]"),
        (lambda t: t.update({"raise/2/bias": torch.ones(1)}), r"no edit or probe names"),
        (lambda t: t.update({"raise/1/read": torch.ones(2, 15)}), r"read at layer 1 has shape \(2, 15\)"),
        (lambda t: t.update({"raise/1/gain": torch.ones(3)}), r"gain at layer 1 has shape"),
        (lambda t: t.update({"raise/1/write": t["raise/1/write"].half()}), r"write at layer 1 has dtype torch.float16"),
        (lambda t: t.update({"raise/1/bias": t["raise/1/bias"].double()}), r"bias at layer 1 has dtype torch.float64"),
        (lambda t: t["raise/1/bias"].fill_(float("nan")), r"bias at layer 1 has numbers that are not finite"),
        (lambda t: t["lower/2/write"][0, 0].fill_(float("inf")), r"write at layer 2 has numbers that are not finite"),
        (lambda t: t["lower/2/write"].mul_(1.01), r"'lower' layer 2: write directions must have norm 1, found 1\.01"),
        (lambda t: t["raise/1/read"][1].mul_(0.5), r"'raise' layer 1: read directions must have norm 1, found 0\.5"),
    ],
)
def test_tampered_tensors_under_a_matching_digest_are_refused(
    folder: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    """Missing, extra, misshapen, mistyped, non-finite and unnormalised tensors, each named."""
    tamper_tensors(folder, change)
    with pytest.raises(BundleFormatError, match=message):
        load_bundle(folder)


def test_a_direction_that_is_not_read_needs_no_norm(folder: Path) -> None:
    """Where the gain is 0 the read direction may be zero: additions have none."""

    def silence(tensors: dict[str, Tensor]) -> None:
        tensors["lower/2/gain"].zero_()
        tensors["lower/2/read"].zero_()

    tamper_tensors(folder, silence)
    assert load_bundle(folder).edits["lower"].layers[0].read.count_nonzero() == 0


def test_an_edit_of_another_width_than_the_model_is_refused(folder: Path) -> None:
    """The width the fingerprint names is the width of every direction."""
    tamper_manifest(folder, lambda fields: fields["model"].update(hidden_size=32))
    with pytest.raises(BundleFormatError, match="width 16, the model needs 32"):
        load_bundle(folder)


def test_saving_checks_as_loading_does(tmp_path: Path) -> None:
    """A bundle that would not load is not written as if it did."""
    fields = manifest_of(EDITS)
    fields["default_profile"] = "absent"
    with pytest.raises(BundleFormatError, match="absent"):
        save_bundle(tmp_path / "bundle", fields, EDITS)
    assert not (tmp_path / "bundle").exists()


def scaled(part: str, factor: float, term: int = 0) -> Callable[[dict[str, Tensor]], object]:
    """Set one number of the edit `raise` at layer 1."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"raise/1/{part}"][term] = factor

    return change


@pytest.mark.parametrize(
    ("part", "most", "value"), [("gain", MOST_GAIN, -1e30), ("bias", MOST_BIAS, 1e30), ("bias", MOST_BIAS, -3e38)]
)
def test_a_huge_dose_is_refused_by_edit_layer_term_and_value(
    part: str, most: float, value: float, folder: Path
) -> None:
    """Finite numbers that would wipe the residual out, or overflow it, never leave the file; the largest allowed at
    the highest certified strength, which is 2 here, does.
    """
    tamper_tensors(folder, scaled(part, value, term=1))
    with pytest.raises(
        BundleFormatError, match=rf"'raise' layer 1: {part} of term 1 is {value:.6g}".replace("+", r"\+")
    ):
        load_bundle(folder)
    tamper_tensors(folder, scaled(part, most, term=1))
    with pytest.raises(BundleFormatError, match=f"strength 2 is {2 * most:.6g}".replace("+", r"\+")):
        load_bundle(folder)
    tamper_tensors(folder, scaled(part, most / 2, term=1))
    assert getattr(load_bundle(folder).edits["raise"].layers[0], part)[1] == most / 2


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_probe_whose_scores_could_overflow_is_refused(part: str, tmp_path: Path) -> None:
    """Up to the limit the score of any residual that the next norm survives is a number in float32."""
    probe = random_probe("p", layer=1, categories=("x",))
    manifest = with_gates(manifest_of(EDITS), {"g": (probe, {"x": "raise"}, {})})
    save_bundle(tmp_path, manifest, EDITS, {"p": probe})

    def change(size: float) -> Callable[[dict[str, Tensor]], object]:
        return lambda tensors: tensors[f"probes/p/{part}"][1].fill_(size / (4 if part == "weight" else 1))

    tamper_tensors(tmp_path, change(2 * MOST_PROBE))
    with pytest.raises(BundleFormatError, match=f"probe 'p' layer 1: {part} of score 1 has size 1.84467e"):
        load_bundle(tmp_path)
    tamper_tensors(tmp_path, change(MOST_PROBE))
    assert load_bundle(tmp_path).probes["p"].logits(torch.full((16,), 2.0**62)).isfinite().all()
