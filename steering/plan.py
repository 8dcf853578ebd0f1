"""Spec, plan and outcome: what a client asked, what the server allowed, what the engine did.

A plan travels to the engine as one JSON string in `SamplingParams.extra_args` (vLLM's `vllm_xargs` holds only scalars
and flat lists); an outcome comes back on a message socket. Knows nothing of HTTP, models or vLLM.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum

from steering.errors import InvalidSpec

PLAN_KEY = "trimtab"
"""Key of the plan in `SamplingParams.extra_args` and in the `vllm_xargs` field of vLLM's own server."""

PLAN_VERSION = 1

SMALLEST_STRENGTH, LARGEST_STRENGTH = 2.0**-126, 2.0**127
"""Absolute values that float32 holds as normal numbers; what a bundle certifies is far narrower."""


class Mode(StrEnum):
    """What a client asks of the gate: let it decide, force a side, or stay out."""

    AUTO = "auto"
    REFUSE = "refuse"
    COMPLY = "comply"
    OFF = "off"


class Scope(StrEnum):
    """Which positions are edited: from the last prompt token on, or all."""

    GENERATED = "generated"
    ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the engine is to do for one request, complete and allowed.

    Attributes:
        id: unguessable key under which the engine reports the outcome; n > 1 samples share it.
        bundle: digest of the bundle (`sha256:` and 64 hexadecimal digits), as the worker reports it.
        edit: name of an edit in that bundle.
        strength: multiplier of the edit's calibrated dose; finite and not 0 in float32, in which the engine keeps it.
        scope: which positions are edited.
    """

    id: str
    bundle: str
    edit: str
    strength: float
    scope: Scope = Scope.GENERATED

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
        expected = {"version", "id", "bundle", "edit", "strength", "scope"}
        if not isinstance(fields, dict) or set(fields) != expected:
            given = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
            raise InvalidSpec(f"plan must have the keys {sorted(expected)}, got {given}")
        if fields.pop("version") != PLAN_VERSION:
            raise InvalidSpec(f"plan version must be {PLAN_VERSION}")
        for name in ("id", "bundle", "edit"):
            if not isinstance(fields[name], str):
                raise InvalidSpec(f"plan field {name!r} must be a string, got {type(fields[name]).__name__}")
        strength = fields["strength"]
        if isinstance(strength, bool) or not isinstance(strength, int | float):
            raise InvalidSpec(f"plan field 'strength' must be a number, got {strength!r}")
        if fields["scope"] not in [*Scope]:
            raise InvalidSpec(f"plan field 'scope' must be one of {[*Scope]}, got {fields['scope']!r}")
        return cls(
            id=fields["id"],
            bundle=fields["bundle"],
            edit=fields["edit"],
            strength=_as_float(strength),
            scope=Scope(fields["scope"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the engine did for one sample of a request, reported by the worker's first rank.

    Attributes:
        plan_id: the plan's `id`.
        request_id: the engine's own id of the sample (n > 1 gives several per plan).
        applied: True once the forward pass that edited the last prompt token has run.
        edit: name of the edit.
        strength: as applied.
        scope: as applied.
        error: why it was not applied; empty when it was.
    """

    plan_id: str
    request_id: str
    applied: bool
    edit: str
    strength: float
    scope: Scope
    error: str = ""

    def to_json(self) -> bytes:
        """One line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, payload: bytes) -> Outcome:
        """Read what `to_json` wrote."""
        fields = json.loads(payload)
        return cls(**{**fields, "scope": Scope(fields["scope"])})


def _as_float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer of more than 308 digits; `Plan` refuses infinity
        return float("inf")
