"""Bundle: a directory of edits, bound to one model, with the numbers that justify them.

    manifest.json        everything but numbers: format, model fingerprint, categories, edits, profiles, provenance
    tensors.safetensors  float32 directions, keyed `<edit>/<layer>/{read,write,gain,bias}`
    report.json          how the doses were measured (optional)
    CARD.md              for people (optional)

Knows nothing of vLLM, transformers or HTTP. No pickle, ever.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from steering.errors import BundleDigestError, BundleFormatError
from steering.fingerprint import Fingerprint, digest_of
from steering.plan import Scope
from steering.terms import Edit, LayerTerms

MANIFEST, TENSORS = "manifest.json", "tensors.safetensors"
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
NORM_TOLERANCE = 1e-3
"""How far a written direction's norm may lie from 1: doses live in gain and bias, never in a direction's length."""


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be finite")
    return value


def _finite_tree(value: dict[str, Any]) -> dict[str, Any]:
    """Free-form JSON may hold no NaN or infinity either: other readers of the file refuse it."""
    waiting: list[Any] = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, float):
            _finite(item)
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)
    return value


def _plain_name(value: str) -> str:
    if not value.isprintable() or value != value.strip() or "/" in value:
        raise ValueError("must be printable, without '/' and without spaces at either end")
    return value


Name = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_plain_name)]
Number = Annotated[float, AfterValidator(_finite)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Category(_Strict):
    """A kind of request the model may refuse; `token` and `token_id` where the model names it by a token of its own."""

    name: Name
    token: str | None = None
    token_id: int | None = Field(default=None, ge=0)


class RespondToken(_Strict):
    """The token a refusal-token model begins an answer with (P1.1's `[respond]`)."""

    token: str
    token_id: int = Field(ge=0)


class StrengthRange(_Strict):
    """Strengths an edit is certified for, and how that was measured."""

    minimum: Number = Field(default=0.0, ge=0.0)
    maximum: Number = Field(gt=0.0)
    measured: str

    @model_validator(mode="after")
    def _ordered(self) -> StrengthRange:
        if self.minimum > self.maximum:
            raise ValueError(f"minimum {self.minimum} exceeds maximum {self.maximum}")
        return self


class EditRecord(_Strict):
    """What the manifest says of one edit.

    Attributes:
        name: key of its tensors.
        purpose: `refuse` raises refusal, `comply` lowers it, `control` is a control such as a random direction.
        category: the category it belongs to; None for edits of no category.
        layers: decoder blocks it edits, ascending.
        dose: unit of strength 1, in words, such as "coefficient 4.0 along a unit direction".
        strength: certified range.
        provenance: method, data set digests, hyper-parameters, seeds, code version.
    """

    name: Name
    purpose: Literal["refuse", "comply", "control"]
    category: Name | None = None
    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    dose: str
    strength: StrengthRange
    provenance: Annotated[dict[str, Any], AfterValidator(_finite_tree)] = Field(default_factory=dict)


class Profile(_Strict):
    """A named, ready-to-use setting: what a client normally names.

    Attributes:
        name: unique in the bundle.
        description: one sentence for `GET /v1/steering`.
        refuse: edit per category for mode `refuse`.
        comply: edit per category for mode `comply`.
        default_category: used where a client names none and no gate decides.
        strength: default multiplier.
        scope: default positions.
    """

    name: Name
    description: str = ""
    refuse: dict[Name, Name] = Field(default_factory=dict)
    comply: dict[Name, Name] = Field(default_factory=dict)
    default_category: Name
    strength: Number = Field(default=1.0, gt=0.0)
    scope: Scope = Scope.GENERATED


class Manifest(_Strict):
    """`manifest.json`, validated; field meanings are those of the classes it is made of."""

    format: Literal[1] = 1
    name: Name
    version: Name
    model: Fingerprint
    categories: tuple[Category, ...]
    respond: RespondToken | None = None
    edits: tuple[EditRecord, ...] = Field(min_length=1)
    profiles: tuple[Profile, ...] = Field(min_length=1)
    default_profile: Name
    tensors_digest: str

    @model_validator(mode="after")
    def _names_resolve(self) -> Manifest:
        categories = [category.name for category in self.categories]
        edits = {edit.name: edit for edit in self.edits}
        for kind, names in (
            ("category", categories),
            ("edit", [edit.name for edit in self.edits]),
            ("profile", [profile.name for profile in self.profiles]),
        ):
            if len(names) != len(set(names)):
                raise ValueError(f"{kind} names must be unique, got {names}")
        for edit in self.edits:
            if edit.category is not None and edit.category not in categories:
                raise ValueError(f"edit {edit.name!r} names category {edit.category!r}; known: {categories}")
            if list(edit.layers) != sorted(set(edit.layers)) or edit.layers[-1] >= self.model.layers:
                raise ValueError(f"edit {edit.name!r} layers {edit.layers} must ascend below {self.model.layers}")
        for profile in self.profiles:
            for purpose, chosen in (("refuse", profile.refuse), ("comply", profile.comply)):
                for category, edit_name in chosen.items():
                    if category not in categories or edit_name not in edits:
                        raise ValueError(
                            f"profile {profile.name!r} maps {purpose} {category!r} to unknown {edit_name!r}"
                        )
                    if edits[edit_name].purpose not in (purpose, "control"):
                        raise ValueError(
                            f"profile {profile.name!r} uses edit {edit_name!r} for {purpose}, "
                            f"its purpose is {edits[edit_name].purpose}"
                        )
            if profile.default_category not in categories:
                raise ValueError(f"profile {profile.name!r} has unknown default_category {profile.default_category!r}")
        if self.default_profile not in {profile.name for profile in self.profiles}:
            raise ValueError(f"default_profile {self.default_profile!r} is not among the profiles")
        return self

    def edit(self, name: str) -> EditRecord:
        """The record of the edit named `name`; KeyError if there is none."""
        return next(edit for edit in self.edits if edit.name == name)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bundle:
    """A checked bundle in memory.

    Attributes:
        manifest: validated manifest.
        edits: by name; tensors on the CPU in float32.
        digest: of the bytes of manifest.json, which itself names the digest of the tensors.
        path: where it was read from; None for one made in memory.
    """

    manifest: Manifest
    edits: Mapping[str, Edit]
    digest: str
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
    unused = set(tensors) - {
        _key(name, terms.layer, part) for name, edit in edits.items() for terms in edit.layers for part in _PARTS
    }
    if unused:
        raise BundleFormatError(f"{path / TENSORS} holds tensors no edit names: {sorted(unused)[:5]}")
    return Bundle(manifest=manifest, edits=edits, digest=digest_of(manifest_bytes), path=path)


def save_bundle(path: Path, manifest: Mapping[str, Any], edits: Mapping[str, Edit]) -> Bundle:
    """Write a bundle and read it back through every check.

    Args:
        path: directory, made if missing; files in it are replaced one by one.
        manifest: the manifest's fields without `tensors_digest`, and without `layers` in the edit records.
        edits: by name, one for each record.
    """
    tensors = {
        _key(name, terms.layer, part): getattr(terms, part).detach().cpu().clone().contiguous()
        for name, edit in edits.items()
        for terms in edit.layers
        for part in _PARTS
    }
    payload = save_tensors(tensors)
    records = [
        {**record, "layers": [terms.layer for terms in edits[record["name"]].layers]} for record in manifest["edits"]
    ]
    fields = {**manifest, "edits": records, "tensors_digest": digest_of(payload)}
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


def _key(edit: str, layer: int, part: str) -> str:
    return f"{edit}/{layer}/{part}"


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
        layers.append(terms)
    return Edit(name=record.name, layers=tuple(layers))


def _check_norms(name: str, terms: LayerTerms) -> None:
    for part, directions in (("write", terms.write), ("read", terms.read[terms.gain != 0])):
        norms = torch.linalg.vector_norm(directions, dim=-1)
        wrong = (norms - 1.0).abs() > NORM_TOLERANCE
        if bool(wrong.any()):
            raise BundleFormatError(
                f"edit {name!r} layer {terms.layer}: {part} directions must have norm 1, "
                f"found {norms[wrong][0].item():.6g}"
            )
