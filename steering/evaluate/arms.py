"""Arms: ways to ask the same prompts, and which of them a server cannot be asked.

Each arm is a `steering` field and, for R1's baselines, a bias on the first tokens. Knows nothing of prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steering.errors import InvalidSpec
from steering.evaluate.server import Server
from steering.evaluate.suites import Group

UNSTEERED = "unsteered"
AUTO = "auto"
CATEGORICAL = "categorical"
LOW_RANK = "low-rank"
POOLED = "pooled"
RANDOM_CATEGORY = "random-category"
RANDOM_VECTOR = "random-control"
TWICE = "two-pass"
FORCED = "forced-respond"
FIRST = "first-token"
BIASED = "logit-bias"
CAST = "cast"
REFUSE, COMPLY = "fixed-refuse", "fixed-comply"

P1_BIAS = 5.0
FORCING = 100.0
SWEEP = ((0.0, 0.0), (1.0, 1.0), (0.5, 0.5), (0.1, 0.8))
"""Pairs (comply_below, refuse_above) asked for: always refuse and always comply under the gate's own categories,
of which, with unsteered answers, the rates at all thresholds follow; P1's hard sign; a neutral band."""

JUDGED = (Group.OVER_REFUSAL, Group.REFUSAL, Group.ATTACKS, Group.TOPIC)
EVERYWHERE = (*JUDGED, Group.ABILITY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to ask.

    Attributes:
        name: in reports.
        what: one sentence for the report.
        steering: the `steering` field.
        logit_bias: added to logits at every position, by token id.
        is_short: only the first token is asked for, where the model decides by it; judges of text do not apply then.
        is_whole: every answer is asked for whole, not only those of a sample.
        groups: suites of these groups are asked.
        pair: thresholds of a point on the curve.
        fires: for a condition computed outside the engine: by prompt key, whether `steering` is sent or mode off.
        reads_loss: probabilities of the answer's own tokens are kept in the ability group.
        reads_first: probabilities of the first token are kept.
        is_shown: it has a row of its own in tables; others feed curves.
    """

    name: str
    what: str
    steering: Mapping[str, Any]
    logit_bias: Mapping[str, float] = field(default_factory=dict)
    is_short: bool = False
    is_whole: bool = False
    groups: tuple[Group, ...] = JUDGED
    pair: tuple[float, float] | None = None
    fires: Mapping[str, bool] | None = None
    reads_loss: bool = False
    reads_first: bool = False
    is_shown: bool = True

    def steering_for(self, key: str) -> dict[str, Any]:
        """The `steering` field for one prompt."""
        if self.fires is not None and not self.fires.get(key, False):
            return {"mode": "off"}
        return dict(self.steering)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arms:
    """Arms that can be asked, and the others by name with the reason."""

    arms: tuple[Arm, ...]
    skipped: dict[str, str]


_PROFILES = {
    CATEGORICAL: ("p1-categorical", "P1's Algorithm 1 in the chat template: hard sign, category by the refusal tokens"),
    LOW_RANK: ("low-rank", "P1's learned low-rank vector, gated"),
    POOLED: ("pooled", "one vector for all categories, gated: what R4 asks to be compared with"),
    "null-space": ("null-space", "AlphaSteer's map into the null space of benign prompts, gated"),
    "benign-refusal": ("benign-refusal", "comply edits from the model's own refusals of benign prompts, gated"),
    RANDOM_CATEGORY: ("random-category", "control: each category gets another category's edit of auto, same gate"),
    RANDOM_VECTOR: ("random-control", "control: a random direction of the same norm, same gate"),
}


def build_arms(
    server: Server,
    *,
    respond_id: int | None,
    cast: Mapping[str, bool] | str,
    sweep: Sequence[tuple[float, float]] = SWEEP,
    extra: Sequence[Arm] = (),
) -> Arms:
    """The arms a server can be asked.

    Args:
        respond_id: id of `[respond]`; None where the model has none or no bundle folder was given.
        cast: by prompt key whether CAST's condition fires, or why that is not known.
        extra: arms of the command line.
    """
    found = [
        Arm(
            name=UNSTEERED, what="no edit", steering={"mode": "off"}, groups=EVERYWHERE, is_whole=True, reads_loss=True
        ),
    ]
    skipped: dict[str, str] = {}
    gated = [
        Arm(
            name=AUTO,
            what=f"the default profile, {server.default_profile!r}: its gate decides",
            steering={"mode": "auto", "report": "full"},
            groups=EVERYWHERE,
            is_whole=True,
            reads_loss=True,
        ),
        *(
            Arm(name=name, what=what, steering={"mode": "auto", "profile": profile}, groups=EVERYWHERE)
            for name, (profile, what) in _PROFILES.items()
        ),
    ]
    if server.has_decision_tokens:
        gated.append(
            Arm(
                name=TWICE,
                what="the default profile, its category by the model's refusal tokens in a pass before",
                steering={"mode": "auto", "category_source": "refusal_tokens"},
                is_short=True,
                groups=(Group.OVER_REFUSAL, Group.REFUSAL),
            )
        )
    else:
        skipped[TWICE] = "the served model has no refusal tokens"
    gated += [
        Arm(
            name=f"thresholds {low:g} / {high:g}",
            what=f"auto that complies up to {low:g} and refuses from {high:g}",
            steering={"mode": "auto", "thresholds": {"comply_below": low, "refuse_above": high}},
            is_short=True,
            pair=(low, high),
            is_shown=False,
        )
        for low, high in sweep
    ]
    for arm in gated:
        reason = _why_not(arm, server)
        if reason:
            skipped[arm.name] = reason
        else:
            found.append(arm)
    if server.has_decision_tokens:
        what = "R1: no edit; the first token's probabilities, of which every threshold on them follows"
        found.append(
            Arm(name=FIRST, what=what, steering={"mode": "off"}, is_short=True, reads_first=True, is_shown=False)
        )
    found += [
        Arm(name=name, what=f"fixed sign: every prompt steered to {mode}, no gate", steering={"mode": mode})
        for name, mode in ((REFUSE, "refuse"), (COMPLY, "comply"))
    ]
    _add_first_token_arms(found, skipped, server, respond_id)
    if isinstance(cast, str):
        skipped[CAST] = cast
    else:
        what = "CAST: mode refuse where cos(h, tanh(proj_c h)) passes its threshold, computed outside the engine"
        found.append(
            # Asked for like the unsteered arm, so that where nothing fires its answers serve both.
            Arm(
                name=CAST,
                what=what,
                steering={"mode": "refuse"},
                groups=EVERYWHERE,
                fires=cast,
                is_whole=True,
                reads_loss=True,
            )
        )
    return Arms(arms=(*found, *extra), skipped=skipped)


def arm_from_option(text: str) -> Arm:
    """An arm given as `name={"mode": ...}` on the command line.

    Raises:
        InvalidSpec: not of that form.
    """
    name, separator, value = text.partition("=")
    try:
        steering = json.loads(value)
    except ValueError as error:
        raise InvalidSpec(f"--arm {text!r}: after '=' comes the steering field as JSON: {error}") from error
    if not separator or not name.strip() or not isinstance(steering, dict):
        raise InvalidSpec(f"--arm must be name={{...}} with a JSON object, got {text!r}")
    return Arm(name=name.strip(), what=f"asked for on the command line: {value}", steering=steering, groups=EVERYWHERE)


def pair_from_option(text: str) -> tuple[float, float]:
    """Thresholds given as `comply_below:refuse_above`.

    Raises:
        InvalidSpec: not two ordered probabilities.
    """
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise InvalidSpec(f"--sweep must be comply_below:refuse_above, such as 0.1:0.8, got {text!r}") from error
    if not 0.0 <= low <= high <= 1.0:
        raise InvalidSpec(f"--sweep needs 0 <= comply_below <= refuse_above <= 1, got {text!r}")
    return low, high


def _why_not(arm: Arm, server: Server) -> str:
    if not server.has_gate:
        return "no loaded bundle has a gate, so that mode auto cannot be asked"
    profile = arm.steering.get("profile")
    if profile is not None and profile not in server.profiles:
        return f"no loaded bundle has the profile {profile!r}; profiles: {list(server.profiles)}"
    asked = profile or server.default_profile
    if server.gated is not None and asked not in server.gated:
        return f"the profile {asked!r} has no gate"
    return ""


def _add_first_token_arms(found: list[Arm], skipped: dict[str, str], server: Server, respond_id: int | None) -> None:
    """R1's baselines, which need the id of `[respond]`."""
    if respond_id is None:
        why = (
            "needs the id of [respond]: give the served bundle's folder with --bundle"
            if server.has_decision_tokens
            else "the served model has no refusal tokens"
        )
        skipped.update({BIASED: why, FORCED: why})
        return
    found += [
        Arm(
            name=BIASED,
            what=f"R1, P1: no edit, logit bias {P1_BIAS:+g} on [respond] (the API adds it at every position)",
            steering={"mode": "off"},
            logit_bias={str(respond_id): P1_BIAS},
        ),
        Arm(
            name=FORCED,
            what="R1: no edit, [respond] forced as the first token; the API would force it at every position, so that "
            "only the decision is asked for and judges of text do not apply",
            steering={"mode": "off"},
            logit_bias={str(respond_id): FORCING},
            is_short=True,
        ),
    ]
