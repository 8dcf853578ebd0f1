"""Plan: what the engine is to do for one request, complete and allowed.

A plan travels to the engine as one JSON string in `SamplingParams.extra_args` (vLLM's `vllm_xargs` holds only scalars
and flat lists). Knows nothing of HTTP, models or vLLM.
"""

from __future__ import annotations

import functools
import math
from enum import StrEnum
from typing import Final, Literal

import msgspec

from steering.errors import InvalidSpec

PLAN_KEY = "trimtab"
"""Key of the plan in `SamplingParams.extra_args` and in the `vllm_xargs` field of vLLM's own server."""

PLAN_VERSION: Final = 5

LONGEST_ID: Final = 128
"""Characters of a plan's id."""

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


class Reasoning(StrEnum):
    """Whether the reasoning of a thinking model is edited like its answer, or spared: see `Plan.reasoning`."""

    EDITED = "edited"
    SPARED = "spared"


def log_odds(probability: float) -> float:
    """The threshold on a score that is this threshold on its probability; infinite at 0 and 1."""
    if probability <= 0.0:
        return -math.inf
    if probability >= 1.0:
        return math.inf
    return math.log(probability) - math.log1p(-probability)


class GateOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
        if self.categories is not None and len(set(self.categories)) != len(self.categories):
            raise InvalidSpec("a gate's categories are named once each", parameter="steering.category")


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the engine is to do for one request, complete and allowed: one edit, a gate that decides, or only a look.

    Attributes:
        id: unguessable key under which the engine reports the outcome; n > 1 samples share it.
        bundle: digest of the bundle (`sha256:` and 64 hexadecimal digits), as the worker reports it.
        edit: name of an edit in that bundle; None where a gate decides or nothing is edited.
        gate: what the gate may decide; None where the edit is given or nothing is edited.
        strength: multiplier of the edit's calibrated dose; finite and not 0 in float32, in which the engine keeps it.
        scope: which positions are edited; a gate decides at the last prompt token, so it can edit `generated` only.
        response: the bundle's response probe reads the first generated tokens and says whether they refuse.
        reasoning: `spared` lets the edit begin where reasoning ends: the first edited position is that of the token at
            which it ends, generated by the model, since the pass that reads it predicts the first token of the answer.
            A prompt that ends with it (thinking switched off) is edited from its last token on as ever. A gate decides
            at the last prompt token all the same.
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
    reasoning: Reasoning = Reasoning.EDITED
    prompt_length: int | None = None

    def __post_init__(self) -> None:
        # Too large for float32 is an edit of infinities, too small is none that says it was applied.
        if not SMALLEST_STRENGTH <= abs(self.strength) <= LARGEST_STRENGTH:
            raise InvalidSpec(
                f"strength must be finite and not 0 in float32, got {self.strength}; "
                "to leave a request alone send no plan",
                parameter="steering.strength",
            )
        _check_id(self.id)
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
        if self.reasoning is Reasoning.SPARED and not (self.is_steering and self.scope is Scope.GENERATED):
            raise InvalidSpec(
                f"reasoning is spared by an edit that begins after it: scope must be 'generated', got "
                f"{self.scope.value!r}",
                parameter="steering.scope",
            )

    @property
    def is_steering(self) -> bool:
        """Whether anything may be edited or decided; else the plan only observes."""
        return self.edit is not None or self.gate is not None

    def named(self, plan_id: str) -> Plan:
        """The same of another request.

        Raises:
            InvalidSpec: that is no id.
        """
        _check_id(plan_id)
        # Not `replace`: what has been checked of it is not checked again. `copy.copy` looks for this at some cost.
        plan: Plan = self.__copy__()  # type: ignore[attr-defined] # of msgspec.Struct, which does not declare it
        msgspec.structs.force_setattr(plan, "id", plan_id)
        return plan

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
        """One line of JSON, keys always in the same order."""
        return _ENCODER.encode(_Wire(version=PLAN_VERSION, plan=self)).decode()

    @classmethod
    def from_json(cls, text: object) -> Plan:
        """Read what `to_json` wrote; what is left out of a plan has its default.

        Raises:
            InvalidSpec: not a string, not JSON, unknown keys, wrong types, numbers that are not finite, or another
                version.
        """
        plan_id, plan = cls.shared(text)
        return plan if plan.id == plan_id else plan.named(plan_id)

    @classmethod
    def shared(cls, text: object) -> tuple[str, Plan]:
        """The id of a plan that `to_json` wrote, and a plan that says the same, under whatever id: one object for most
        requests that differ in nothing else.

        What follows an ordinary id is read once in a process: a scheduler and a worker both ask, of each request and
        each of its samples.

        Raises:
            InvalidSpec: as `from_json`.
        """
        if not isinstance(text, str):
            raise InvalidSpec(f"a plan is one JSON string, got {type(text).__name__}")
        end = text.find('"', len(_HEAD))
        name = text[len(_HEAD) : end]
        try:
            if text.startswith(_HEAD) and name.isalnum() and len(name) <= LONGEST_ID and len(text) <= _LONGEST_KEPT:
                return name, _of_another(text[end:])
            plan = _DECODER.decode(text).plan
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise InvalidSpec(
                f"a plan is one line of JSON of version {PLAN_VERSION} with finite numbers: {error}"
            ) from error
        return plan.id, plan


def _check_id(plan_id: str) -> None:
    if not plan_id or len(plan_id) > LONGEST_ID:
        raise InvalidSpec(f"plan id must have 1 to {LONGEST_ID} characters, got {len(plan_id)}")


class _Wire(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plan on its way, with the version of what follows."""

    version: Literal[5]
    plan: Plan


_ENCODER = msgspec.json.Encoder(order="deterministic")
_DECODER = msgspec.json.Decoder(_Wire)

_HEAD = f'{{"version":{PLAN_VERSION},"plan":{{"id":"'
"""How `to_json` begins; the id follows, and then what a profile's requests have in common."""

_LONGEST_KEPT = 4096
"""Characters of a plan that is kept once it has been read."""


@functools.lru_cache(maxsize=1024)
def _of_another(rest: str) -> Plan:
    """A plan that ends like this, with an id that is nobody's."""
    return _DECODER.decode(_HEAD + "-" + rest).plan
