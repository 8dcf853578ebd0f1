"""Spec, plan and outcome: what a client asked, what the server allowed, what the engine did.

A plan travels to the engine as one JSON string in `SamplingParams.extra_args` (vLLM's `vllm_xargs` holds only scalars
and flat lists); an outcome comes back on a message socket. Knows nothing of HTTP, models or vLLM.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from steering.errors import InvalidSpec

PLAN_KEY = "trimtab"
"""Key of the plan in `SamplingParams.extra_args` and in the `vllm_xargs` field of vLLM's own server."""

PLAN_VERSION = 3

SMALLEST_STRENGTH, LARGEST_STRENGTH = 2.0**-126, 2.0**127
"""Absolute values that float32 holds as normal numbers; what a bundle certifies is far narrower."""


class Mode(StrEnum):
    """What a client asks of the gate: let it decide, force a side, or stay out."""

    AUTO = "auto"
    REFUSE = "refuse"
    COMPLY = "comply"
    OFF = "off"


class Decision(StrEnum):
    """What a gate decided for one sample: an edit that raises refusal, one that lowers it, or none."""

    REFUSE = "refuse"
    COMPLY = "comply"
    ABSTAIN = "abstain"


class CategorySource(StrEnum):
    """Who names the category whose edit is applied.

    `PROBE` is the category head of the probe, in the same pass. `REFUSAL_TOKENS` is the model itself: the most likely
    of its refusal tokens (P1.4), which takes a pass of one token before.
    """

    PROBE = "probe"
    REFUSAL_TOKENS = "refusal_tokens"


class Scope(StrEnum):
    """Which positions are edited: from the last prompt token on, or all."""

    GENERATED = "generated"
    ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class GateOrder:
    """A gate's part of a plan: what it may decide for one request.

    Attributes:
        profile: whose probe and edits are used; a profile of the plan's bundle that has a gate.
        comply_below: refusal probabilities up to this one are steered towards complying; 0 never.
        refuse_above: refusal probabilities from this one on are steered towards refusing; 1 never. Between the two lies
            the neutral band, in which nothing is edited. Where they are equal (P1's hard sign) this one goes first.
        categories: those the choice is made among; None for all of the probe's.
        is_graded: the strength grows with the distance from the threshold, up to the plan's at probability 0 or 1.
        is_observed: decide and report, edit nothing.
    """

    profile: str
    comply_below: float
    refuse_above: float
    categories: tuple[str, ...] | None = None
    is_graded: bool = False
    is_observed: bool = False

    def __post_init__(self) -> None:
        # Written so that NaN fails.
        if not 0.0 <= self.comply_below <= self.refuse_above <= 1.0:
            raise InvalidSpec(
                f"thresholds must be 0 <= comply_below <= refuse_above <= 1, got {self.comply_below} and "
                f"{self.refuse_above}",
                parameter="steering.thresholds",
            )
        if self.categories is not None and not self.categories:
            raise InvalidSpec("a gate needs at least one category it may choose", parameter="steering.category")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the engine is to do for one request, complete and allowed: one edit, a gate that decides, or only a look.

    Attributes:
        id: unguessable key under which the engine reports the outcome; n > 1 samples share it.
        bundle: digest of the bundle (`sha256:` and 64 hexadecimal digits), as the worker reports it.
        edit: name of an edit in that bundle; None where a gate decides or nothing is edited.
        gate: what the gate may decide; None where the edit is given or nothing is edited.
        strength: multiplier of the edit's calibrated dose; finite and not 0 in float32, in which the engine keeps it.
        scope: which positions are edited; a gate decides at the last prompt token, so it can edit `generated` only.
        response: the bundle's response probe reads the first generated tokens and says whether they refuse.
        prompt_length: where the prompt ends that an edit of scope `generated`, a gate and a probe go by; None where all
            tokens of the request are prompt. Less than them for an answer that is given with its prompt, to be scored
            as if it had been generated.
    """

    id: str
    bundle: str
    edit: str | None = None
    gate: GateOrder | None = None
    strength: float
    scope: Scope = Scope.GENERATED
    response: bool = False
    prompt_length: int | None = None

    def __post_init__(self) -> None:
        # Too large for float32 is an edit of infinities, too small is none that says it was applied.
        if not SMALLEST_STRENGTH <= abs(self.strength) <= LARGEST_STRENGTH:
            raise InvalidSpec(
                f"strength must be finite and not 0 in float32, got {self.strength}; "
                "to leave a request alone send no plan",
                parameter="steering.strength",
            )
        if not self.id or len(self.id) > 128:
            raise InvalidSpec(f"plan id must have 1 to 128 characters, got {len(self.id)}")
        if self.edit is not None and self.gate is not None:
            raise InvalidSpec("a plan names an edit or a gate, and not both")
        if not (self.is_steering or self.response):
            raise InvalidSpec("a plan names an edit or a gate, or has the response observed")
        if self.prompt_length is not None and self.prompt_length < 1:
            raise InvalidSpec(f"a plan's prompt has at least one token, got {self.prompt_length}")
        if self.gate is not None and self.scope is not Scope.GENERATED:
            raise InvalidSpec(
                "a gate decides at the last prompt token, when the prompt has been read already: scope must be "
                f"'generated', got {self.scope.value!r}",
                parameter="steering.scope",
            )

    @property
    def is_steering(self) -> bool:
        """Whether anything may be edited or decided; else the plan only observes."""
        return self.edit is not None or self.gate is not None

    def end_of_prompt(self, length: int) -> int:
        """Tokens of the prompt in a request that begins with `length` tokens.

        Raises:
            InvalidSpec: the plan says there are more.
        """
        if self.prompt_length is None:
            return length
        if self.prompt_length > length:
            raise InvalidSpec(f"the plan's prompt has {self.prompt_length} tokens, the request {length}")
        return self.prompt_length

    def to_json(self) -> str:
        """One line of JSON, keys sorted."""
        return json.dumps({"version": PLAN_VERSION, **asdict(self)}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: object) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            InvalidSpec: not a string, not JSON, unknown or missing keys, wrong types, or another version.
        """
        if not isinstance(text, str):
            raise InvalidSpec(f"a plan is one JSON string, got {type(text).__name__}")
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidSpec(f"plan is not JSON: {error}") from error
        names = {"version", "id", "bundle", "edit", "gate", "strength", "scope", "response", "prompt_length"}
        _check_keys("plan", fields, names)
        if fields.pop("version") != PLAN_VERSION:
            raise InvalidSpec(f"plan version must be {PLAN_VERSION}")
        for name in ("id", "bundle"):
            _check_type("plan", name, fields[name], str)
        if fields["edit"] is not None:
            _check_type("plan", "edit", fields["edit"], str)
        _check_type("plan", "response", fields["response"], bool)
        if fields["prompt_length"] is not None:
            # bool is an int
            _check_type("plan", "prompt_length", fields["prompt_length"], int)
            _number("plan", "prompt_length", fields["prompt_length"])
        if fields["scope"] not in [*Scope]:
            raise InvalidSpec(f"plan field 'scope' must be one of {[*Scope]}, got {fields['scope']!r}")
        return cls(
            id=fields["id"],
            bundle=fields["bundle"],
            edit=fields["edit"],
            gate=None if fields["gate"] is None else _gate_order(fields["gate"]),
            strength=_number("plan", "strength", fields["strength"]),
            scope=Scope(fields["scope"]),
            response=fields["response"],
            prompt_length=fields["prompt_length"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a probe read from one prompt; probabilities.

    Attributes:
        refusal: that the prompt is to be refused.
        categories: by category, over all of the probe's; they sum to 1.
    """

    refusal: float
    categories: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the engine did for one sample of a request, reported by the worker's first rank.

    Attributes:
        plan_id: the plan's `id`.
        request_id: the engine's own id of the sample (n > 1 gives several per plan).
        applied: True once the forward pass that edited the last prompt token has run.
        edit: name of the edit; None where a gate chose none.
        strength: as applied, 0 where nothing was.
        scope: as applied.
        decision: the gate's; None for a plan that names its edit.
        category: what the gate took the prompt for, among the allowed ones; None for a plan that names its edit.
        scores: what the gate's probe read; None for a plan that names its edit.
        error: why nothing could be decided or applied; empty when all went well, which includes a gate's abstention.
    """

    plan_id: str
    request_id: str
    applied: bool
    edit: str | None
    strength: float
    scope: Scope
    decision: Decision | None = None
    category: str | None = None
    scores: Scores | None = None
    error: str = ""

    def to_json(self) -> bytes:
        """One line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, payload: bytes) -> Outcome:
        """Read what `to_json` wrote."""
        return cls.from_fields(json.loads(payload))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Outcome:
        """From the object that `to_json` wrote."""
        decision, scores = fields["decision"], fields["scores"]
        changed = {
            "scope": Scope(fields["scope"]),
            "decision": None if decision is None else Decision(decision),
            "scores": None if scores is None else Scores(**scores),
        }
        return cls(**{**fields, **changed})


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What the response probe has read of one sample so far, reported by the worker's first rank.

    Attributes:
        plan_id: the plan's `id`.
        request_id: the engine's own id of the sample.
        tokens: generated tokens it has read, 1 or more.
        score: log-odds that the answer refuses, the mean over them.
    """

    plan_id: str
    request_id: str
    tokens: int
    score: float

    @property
    def probability(self) -> float:
        """That the answer refuses."""
        return 1.0 / (1.0 + math.exp(-self.score)) if self.score > -700 else 0.0


def responses_to_json(responses: Sequence[Response]) -> bytes:
    """One line of JSON for all that a step made known."""
    rows = [[each.plan_id, each.request_id, each.tokens, each.score] for each in responses]
    return json.dumps({"responses": rows}, separators=(",", ":")).encode()


def report_from_json(payload: bytes) -> Outcome | list[Response]:
    """Read what `Outcome.to_json` or `responses_to_json` wrote."""
    fields = json.loads(payload)
    if "responses" not in fields:
        return Outcome.from_fields(fields)
    return [
        Response(plan_id=plan_id, request_id=request_id, tokens=tokens, score=score)
        for plan_id, request_id, tokens, score in fields["responses"]
    ]


def _gate_order(fields: object) -> GateOrder:
    names = {"profile", "comply_below", "refuse_above", "categories", "is_graded", "is_observed"}
    _check_keys("gate", fields, names)
    assert isinstance(fields, dict)
    _check_type("gate", "profile", fields["profile"], str)
    for name in ("is_graded", "is_observed"):
        _check_type("gate", name, fields[name], bool)
    categories = fields["categories"]
    if categories is not None and not (
        isinstance(categories, list) and all(isinstance(category, str) for category in categories)
    ):
        raise InvalidSpec(f"gate field 'categories' must be null or a list of names, got {categories!r}")
    return GateOrder(
        profile=fields["profile"],
        comply_below=_number("gate", "comply_below", fields["comply_below"]),
        refuse_above=_number("gate", "refuse_above", fields["refuse_above"]),
        categories=None if categories is None else tuple(categories),
        is_graded=fields["is_graded"],
        is_observed=fields["is_observed"],
    )


def _check_keys(what: str, fields: object, expected: set[str]) -> None:
    if not isinstance(fields, dict) or set(fields) != expected:
        given = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise InvalidSpec(f"{what} must have the keys {sorted(expected)}, got {given}")


def _check_type(what: str, name: str, value: object, wanted: type) -> None:
    if not isinstance(value, wanted):
        raise InvalidSpec(f"{what} field {name!r} must be {wanted.__name__}, got {type(value).__name__}")


def _number(what: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidSpec(f"{what} field {name!r} must be a number, got {value!r}")
    return _as_float(value)


def _as_float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer of more than 308 digits; `Plan` refuses infinity
        return float("inf")
