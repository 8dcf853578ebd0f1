"""Bundle: a directory of edits, bound to one model, with the numbers that justify them.

    manifest.json        everything but numbers: format, model fingerprint, categories, probes, edits, profiles
    tensors.safetensors  float32: `<edit>/<layer>/{read,write,gain,bias}` and `probes/<probe>/{weight,bias}`
    report.json          how the doses were measured (optional)
    CARD.md              for people (optional)

Knows nothing of vLLM, transformers or HTTP. No pickle, ever.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from steering.errors import BundleDigestError, BundleFormatError
from steering.fingerprint import digest_of
from steering.gate import Probe
from steering.manifest import EditRecord, Manifest, ProbeRecord
from steering.terms import Edit, LayerTerms

MANIFEST, TENSORS = "manifest.json", "tensors.safetensors"
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
NORM_TOLERANCE = 1e-3
"""How far a written direction's norm may lie from 1: doses live in gain and bias, never in a direction's length."""

MOST_GAIN = 2.0**8
"""Most that a term may multiply what it reads by, at the highest certified strength. bfloat16 has 8 significant bits:
beside what is 2^8 times as long nothing is left of a residual, so that more would be no edit but a replacement."""

MOST_BIAS = 2.0**20
"""Most that a term may add by itself, likewise: 2^8 times a residual of norm 2^12."""

MOST_PROBE = 2.0**63
"""Largest norm of a probe's weights, and largest bias. A residual whose norm exceeds 2^64 overflows in the float32
square of the next layer's norm; up to there a score is a number in float32, which ends at 2^128."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bundle:
    """A checked bundle in memory.

    Attributes:
        manifest: validated manifest.
        edits: by name; tensors on the CPU in float32.
        probes: by name; tensors likewise.
        digest: of the bytes of manifest.json, which itself names the digest of the tensors.
        path: where it was read from; None for one made in memory.
    """

    manifest: Manifest
    edits: Mapping[str, Edit]
    digest: str
    probes: Mapping[str, Probe] = field(default_factory=dict)
    path: Path | None = None

    @property
    def label(self) -> str:
        """`name@sha256:` and 12 digits: how answers and metrics name the bundle."""
        return f"{self.manifest.name}@{self.digest[: len('sha256:') + 12]}"


def load_bundle(path: Path) -> Bundle:
    """Read a bundle and check every digest, name, shape, dtype, norm and number of it.

    The fingerprint is checked by the caller (`Fingerprint.check`), who knows the model.

    Raises:
        BundleFormatError: names the field, what was found and what is needed.
        BundleDigestError: the tensors are not those the manifest names.
    """
    manifest_bytes = _read(path / MANIFEST, MAX_MANIFEST_BYTES)
    try:
        manifest = Manifest.model_validate_json(manifest_bytes)
    except ValidationError as error:
        facts = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'manifest'}: {item['msg']}" for item in error.errors())
        raise BundleFormatError(f"{path / MANIFEST}: {facts}") from error
    tensor_bytes = _read(path / TENSORS, None)
    found = digest_of(tensor_bytes)
    if found != manifest.tensors_digest:
        raise BundleDigestError(f"{path / TENSORS} has digest {found}, the manifest needs {manifest.tensors_digest}")
    try:
        tensors = load_tensors(tensor_bytes)
    except SafetensorError as error:
        raise BundleFormatError(f"{path / TENSORS} is not a safetensors file: {error}") from error
    edits = {record.name: _edit_from(record, tensors, manifest.model.hidden_size) for record in manifest.edits}
    probes = {record.name: _probe_from(record, tensors, manifest.model.hidden_size) for record in manifest.probes}
    unused = set(tensors) - {
        _key(name, terms.layer, part) for name, edit in edits.items() for terms in edit.layers for part in _PARTS
    }
    unused -= {_probe_key(name, part) for name in probes for part in _PROBE_PARTS}
    if unused:
        raise BundleFormatError(f"{path / TENSORS} holds tensors no edit or probe names: {sorted(unused)[:5]}")
    return Bundle(manifest=manifest, edits=edits, probes=probes, digest=digest_of(manifest_bytes), path=path)


def save_bundle(
    path: Path, manifest: Mapping[str, Any], edits: Mapping[str, Edit], probes: Mapping[str, Probe] | None = None
) -> Bundle:
    """Write a bundle and read it back through every check.

    Args:
        path: directory, made if missing; files in it are replaced one by one.
        manifest: the manifest's fields without `tensors_digest`, without `layers` in the edit records, and without
            `layer` and `categories` in the probe records.
        edits: by name, one for each record.
        probes: by name, one for each record of a probe.
    """
    probes = probes or {}
    tensors = {
        _key(name, terms.layer, part): getattr(terms, part).detach().cpu().clone().contiguous()
        for name, edit in edits.items()
        for terms in edit.layers
        for part in _PARTS
    }
    tensors |= {
        _probe_key(name, part): getattr(probe, part).detach().cpu().clone().contiguous()
        for name, probe in probes.items()
        for part in _PROBE_PARTS
    }
    payload = save_tensors(tensors)
    records = [
        {**record, "layers": [terms.layer for terms in edits[record["name"]].layers]} for record in manifest["edits"]
    ]
    probe_records = [
        {**record, "layer": probes[record["name"]].layer, "categories": list(probes[record["name"]].categories)}
        for record in manifest.get("probes", ())
    ]
    fields = {**manifest, "edits": records, "probes": probe_records, "tensors_digest": digest_of(payload)}
    try:
        checked = Manifest.model_validate(fields)
    except ValidationError as error:
        raise BundleFormatError(f"bundle {manifest.get('name')!r}: {error}") from error
    path.mkdir(parents=True, exist_ok=True)
    (path / TENSORS).write_bytes(payload)
    text = json.dumps(checked.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
    (path / MANIFEST).write_text(text, encoding="utf-8")
    return load_bundle(path)


_PARTS = ("read", "write", "gain", "bias")
_PROBE_PARTS = ("weight", "bias")


def _key(edit: str, layer: int, part: str) -> str:
    return f"{edit}/{layer}/{part}"


def _probe_key(probe: str, part: str) -> str:
    return f"probes/{probe}/{part}"


def _read(path: Path, limit: int | None) -> bytes:
    try:
        if limit is not None and path.stat().st_size > limit:
            raise BundleFormatError(f"{path} has {path.stat().st_size} bytes, at most {limit} are allowed")
        return path.read_bytes()
    except OSError as error:
        raise BundleFormatError(
            f"cannot read {path}: {error.strerror}; a bundle is a directory with {MANIFEST} and {TENSORS}"
        ) from error


def _edit_from(record: EditRecord, tensors: Mapping[str, Tensor], width: int) -> Edit:
    layers = []
    for layer in record.layers:
        parts: dict[str, Tensor] = {}
        for part in _PARTS:
            key = _key(record.name, layer, part)
            if key not in tensors:
                raise BundleFormatError(f"{TENSORS} lacks {key!r}, which the manifest's edit {record.name!r} needs")
            parts[part] = tensors[key]
        terms = LayerTerms(layer=layer, **parts)
        if terms.width != width:
            raise BundleFormatError(
                f"edit {record.name!r} layer {layer} has width {terms.width}, the model needs {width}"
            )
        _check_norms(record.name, terms)
        _check_doses(record, terms)
        layers.append(terms)
    return Edit(name=record.name, layers=tuple(layers))


def _probe_from(record: ProbeRecord, tensors: Mapping[str, Tensor], width: int) -> Probe:
    parts: dict[str, Tensor] = {}
    for part in _PROBE_PARTS:
        key = _probe_key(record.name, part)
        if key not in tensors:
            raise BundleFormatError(f"{TENSORS} lacks {key!r}, which the manifest's probe {record.name!r} needs")
        parts[part] = tensors[key]
    probe = Probe(name=record.name, layer=record.layer, categories=record.categories, **parts)
    if probe.width != width:
        raise BundleFormatError(f"probe {record.name!r} has width {probe.width}, the model needs {width}")
    for part, sizes in (
        ("weight", torch.linalg.vector_norm(probe.weight.to(torch.float64), dim=-1)),
        ("bias", probe.bias.to(torch.float64).abs()),
    ):
        row = int(sizes.argmax())
        if sizes[row] > MOST_PROBE:
            raise BundleFormatError(
                f"probe {record.name!r} layer {record.layer}: {part} of score {row} has size {sizes[row].item():.6g}, "
                f"at most {MOST_PROBE:g} is allowed"
            )
    return probe


def _check_doses(record: EditRecord, terms: LayerTerms) -> None:
    strength = max(abs(record.strength.minimum), abs(record.strength.maximum))
    for part, numbers, most in (("gain", terms.gain, MOST_GAIN), ("bias", terms.bias, MOST_BIAS)):
        doses = numbers.to(torch.float64).abs() * strength
        term = int(doses.argmax())
        if doses[term] > most:
            raise BundleFormatError(
                f"edit {record.name!r} layer {terms.layer}: {part} of term {term} is {numbers[term].item():.6g}, and "
                f"its size at the highest certified strength {strength:g} is {doses[term].item():.6g}; at most "
                f"{most:g} is allowed"
            )


def _check_norms(name: str, terms: LayerTerms) -> None:
    for part, directions in (("write", terms.write), ("read", terms.read[terms.gain != 0])):
        norms = torch.linalg.vector_norm(directions, dim=-1)
        wrong = (norms - 1.0).abs() > NORM_TOLERANCE
        if bool(wrong.any()):
            raise BundleFormatError(
                f"edit {name!r} layer {terms.layer}: {part} directions must have norm 1, "
                f"found {norms[wrong][0].item():.6g}"
            )
