"""Manifest: what a bundle says of itself, `manifest.json` as strict models.

Knows nothing of tensors, files, vLLM or HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from steering.fingerprint import Fingerprint
from steering.plan import CategorySource, Scope

MAX_CATEGORIES = 16
"""Most categories of a probe; the engine keeps which of them a request allows in the bits of a float32."""


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


class ReasoningEnd(_Strict):
    """The token at which a thinking model's reasoning ends and its answer begins.

    The engine keeps one more than its id in float32, exact up to 2^24.
    """

    token: str
    token_id: int = Field(ge=0, lt=2**24)


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


MAX_RESPONSE_TOKENS = 8
"""Most generated tokens a response probe reads; the engine has a cell for each in a request's row."""


class OperatingPoint(_Strict):
    """A threshold of a probe's refusal probability, and what it does on data the probe was not fitted on.

    Attributes:
        name: how it was chosen, such as `youden` or `fpr-5`.
        threshold: prompts at or above it are flagged.
        true_positive_rate: share flagged of the prompts to refuse.
        false_positive_rate: share flagged of the prompts to answer.
        positives, negatives: how many prompts of either kind it was measured on.
    """

    name: Name
    threshold: Annotated[float, Field(ge=0.0, le=1.0)]
    true_positive_rate: Annotated[float, Field(ge=0.0, le=1.0)]
    false_positive_rate: Annotated[float, Field(ge=0.0, le=1.0)]
    positives: int = Field(ge=1)
    negatives: int = Field(ge=1)


class ProbeRecord(_Strict):
    """What the manifest says of one probe.

    Attributes:
        name: key of its tensors.
        layer: decoder block whose output it reads.
        position: the tokens it reads at: the last of the prompt, or the first that are generated (a response probe).
        tokens: of a response probe, how many of them at most.
        categories: in the order of the rows of its weight after the first; a response probe has none.
        operating_points: thresholds and what they cost.
        calibration: how probabilities compare with shares, such as Brier score, expected error and bins.
        provenance: method, data set digests, hyper-parameters, seeds, code version.
    """

    name: Name
    layer: int = Field(ge=0)
    position: Literal["last_prompt_token", "generated_tokens"] = "last_prompt_token"
    tokens: int | None = Field(default=None, ge=1, le=MAX_RESPONSE_TOKENS)
    categories: tuple[Name, ...] = Field(max_length=MAX_CATEGORIES)
    operating_points: tuple[OperatingPoint, ...] = ()
    calibration: Annotated[dict[str, Any], AfterValidator(_finite_tree)] = Field(default_factory=dict)
    provenance: Annotated[dict[str, Any], AfterValidator(_finite_tree)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _position_fits(self) -> ProbeRecord:
        reads_answers = self.position == "generated_tokens"
        if reads_answers != (self.tokens is not None) or reads_answers == bool(self.categories):
            raise ValueError(
                f"probe {self.name!r} at {self.position} has tokens {self.tokens} and categories "
                f"{list(self.categories)}; a probe of generated tokens has tokens and no categories, one of the last "
                "prompt token categories and no tokens"
            )
        return self


class GateSettings(_Strict):
    """How a profile decides by itself.

    Attributes:
        probe: which one reads the prompt.
        comply_below, refuse_above: thresholds of the refusal probability; see `steering.plan.GateOrder`.
        is_graded: strength grows with the distance from the threshold.
        category_source: who names the category.
    """

    probe: Name
    comply_below: Annotated[float, Field(ge=0.0, le=1.0)]
    refuse_above: Annotated[float, Field(ge=0.0, le=1.0)]
    is_graded: bool = False
    category_source: CategorySource = CategorySource.PROBE

    @model_validator(mode="after")
    def _ordered(self) -> GateSettings:
        if self.comply_below > self.refuse_above:
            raise ValueError(f"comply_below {self.comply_below} exceeds refuse_above {self.refuse_above}")
        return self


class Transfer(_Strict):
    """Where a bundle came from that was fitted on another model of the same shape.

    Attributes:
        bundle: label and digest of the original.
        model: fingerprint of the model it was fitted on.
    """

    bundle: str
    model: Fingerprint


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
        gate: how it decides by itself; None for a profile whose mode the client must name.
        reasoning: whether the reasoning of a thinking model is `edited` like the answer, as P2 edits every token, or
            `spared`, so that the edit begins with the answer: see `steering.plan.Plan.reasoning`.
    """

    name: Name
    description: str = ""
    refuse: dict[Name, Name] = Field(default_factory=dict)
    comply: dict[Name, Name] = Field(default_factory=dict)
    default_category: Name
    strength: Number = Field(default=1.0, gt=0.0)
    scope: Scope = Scope.GENERATED
    gate: GateSettings | None = None
    reasoning: Literal["edited", "spared"] = "edited"


class Manifest(_Strict):
    """`manifest.json`, validated; field meanings are those of the classes it is made of.

    `response_probe` names the probe that says of every answer whether it refuses; None where there is none.
    `reasoning_end` is None for models that do not think.
    """

    format: Literal[1] = 1
    name: Name
    version: Name
    model: Fingerprint
    categories: tuple[Category, ...]
    respond: RespondToken | None = None
    probes: tuple[ProbeRecord, ...] = ()
    response_probe: Name | None = None
    reasoning_end: ReasoningEnd | None = None
    edits: tuple[EditRecord, ...] = Field(min_length=1)
    profiles: tuple[Profile, ...] = Field(min_length=1)
    default_profile: Name
    transfer: Transfer | None = None
    tensors_digest: str

    @property
    def is_sparing(self) -> bool:
        """Whether a profile spares the reasoning of a thinking model."""
        return any(profile.reasoning == "spared" for profile in self.profiles)

    @model_validator(mode="after")
    def _names_resolve(self) -> Manifest:
        categories = [category.name for category in self.categories]
        for kind, names in (
            ("category", categories),
            ("probe", [probe.name for probe in self.probes]),
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
        for probe in self.probes:
            strange = sorted(set(probe.categories) - set(categories))
            if strange or probe.layer >= self.model.layers:
                raise ValueError(
                    f"probe {probe.name!r} at layer {probe.layer} of {self.model.layers} has categories that are not "
                    f"the bundle's: {strange}"
                )
        for profile in self.profiles:
            self._check_edits(profile, categories)
            self._check_gate(profile)
        if self.response_probe is not None and self.response is None:
            raise ValueError(
                f"response_probe {self.response_probe!r} is not among the probes that read generated tokens: "
                f"{[probe.name for probe in self.probes if probe.tokens is not None]}"
            )
        if self.default_profile not in {profile.name for profile in self.profiles}:
            raise ValueError(f"default_profile {self.default_profile!r} is not among the profiles")
        return self

    def _check_edits(self, profile: Profile, categories: list[str]) -> None:
        edits = {edit.name: edit for edit in self.edits}
        if profile.default_category not in categories:
            raise ValueError(f"profile {profile.name!r} has unknown default_category {profile.default_category!r}")
        for purpose, chosen in (("refuse", profile.refuse), ("comply", profile.comply)):
            for category, edit_name in chosen.items():
                if category not in categories or edit_name not in edits:
                    raise ValueError(f"profile {profile.name!r} maps {purpose} {category!r} to unknown {edit_name!r}")
                edit = edits[edit_name]
                if edit.purpose not in (purpose, "control"):
                    raise ValueError(
                        f"profile {profile.name!r} uses edit {edit_name!r} for {purpose}, its purpose is {edit.purpose}"
                    )
                if not edit.strength.minimum <= profile.strength <= edit.strength.maximum:
                    raise ValueError(
                        f"profile {profile.name!r} has strength {profile.strength}, its edit {edit_name!r} is "
                        f"certified for {edit.strength.minimum} to {edit.strength.maximum}"
                    )

    def _check_gate(self, profile: Profile) -> None:
        if profile.reasoning == "spared" and self.reasoning_end is None:
            raise ValueError(f"profile {profile.name!r} spares reasoning, and no reasoning_end says where it ends")
        if profile.reasoning == "spared" and profile.scope is not Scope.GENERATED:
            raise ValueError(f"profile {profile.name!r} spares reasoning, so that its scope must be 'generated'")
        gate = profile.gate
        if gate is None:
            return
        probe = next((probe for probe in self.probes if probe.name == gate.probe), None)
        if probe is None:
            raise ValueError(
                f"profile {profile.name!r} has a gate with unknown probe {gate.probe!r}; "
                f"probes: {[known.name for known in self.probes]}"
            )
        if probe.tokens is not None:
            raise ValueError(f"profile {profile.name!r}: probe {gate.probe!r} reads answers, and a gate reads prompts")
        if profile.scope is not Scope.GENERATED:
            raise ValueError(f"profile {profile.name!r} has a gate, so that its scope must be 'generated'")
        for name in {*profile.refuse.values(), *profile.comply.values()}:
            first = self.edit(name).layers[0]
            if first < probe.layer:
                raise ValueError(
                    f"profile {profile.name!r}: edit {name!r} begins at layer {first}, which its gate, deciding at "
                    f"layer {probe.layer}, would reach too late"
                )
        if gate.category_source is CategorySource.REFUSAL_TOKENS:
            told = {category.name for category in self.categories if category.token_id is not None}
            if not told.intersection(probe.categories):
                raise ValueError(
                    f"profile {profile.name!r} reads refusal tokens, which none of {list(probe.categories)} has"
                )

    @property
    def response(self) -> ProbeRecord | None:
        """The record of the response probe; None where there is none, or where it names a probe of prompts."""
        for probe in self.probes:
            if probe.name == self.response_probe and probe.tokens is not None:
                return probe
        return None

    def edit(self, name: str) -> EditRecord:
        """The record of the edit named `name`; KeyError if there is none."""
        for edit in self.edits:
            if edit.name == name:
                return edit
        raise KeyError(name)

    def profile(self, name: str) -> Profile:
        """The profile named `name`; KeyError if there is none."""
        for profile in self.profiles:
            if profile.name == name:
                return profile
        raise KeyError(name)
