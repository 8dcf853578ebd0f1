"""Probing: what a gate reads of a prompt, and what it would decide, without an answer.

Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from msgspec import structs

from server.access.caller import Caller, Permission
from server.catalog import Catalog
from server.effects import Effect, told_scores
from server.errors import PermissionDenied
from server.policy import Report, Resolution, SteeringSpec
from steering.errors import NotSupported
from steering.plan import CategorySource, Decision, Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What was read of one prompt; `usage` is OpenAI's object."""

    resolution: Resolution
    effect: Effect
    usage: dict[str, Any]

    def to_json(self, model: str) -> dict[str, Any]:
        """As the client gets it."""
        plan, scores = self.resolution.plan, self.effect.scores
        assert plan is not None
        assert plan.gate is not None
        assert scores is not None
        profile, bundle = self.resolution.profile, self.resolution.bundle
        sides = {Decision.REFUSE.value: profile.refuse, Decision.COMPLY.value: profile.comply}
        answer: dict[str, Any] = {
            "object": "steering.probe",
            "model": model,
            "profile": profile.name,
            "bundle": bundle.label,
            "scores": told_scores(scores),
            "decision": self.effect.decision,
            "category": self.effect.category,
            "edit": sides.get(self.effect.decision, {}).get(self.effect.category or ""),
            "thresholds": {"comply_below": plan.gate.comply_below, "refuse_above": plan.gate.refuse_above},
            "graded": plan.gate.is_graded,
            "usage": self.usage,
        }
        if bundle.is_transferred:
            answer["transferred"] = True
        return answer


def spec_of_probe(profile: str | None) -> SteeringSpec:
    """What a probe asks for: the scores of a profile's gate, which names the category by itself."""
    return SteeringSpec(profile=profile, mode=Mode.AUTO, category_source=CategorySource.PROBE, report=Report.FULL)


def check_probing(caller: Caller, profile: str | None, catalog: Catalog) -> None:
    """Raise what keeps a caller from reading scores of a profile.

    Raises:
        PermissionDenied: the key may not read scores, which tell how to word a prompt so that a gate lets it pass.
        UnknownName: no such profile.
        NotSupported: it has no gate.
    """
    if Permission.SCORES not in caller.permissions:
        raise PermissionDenied(
            f"key {caller.key_id} lacks the permission {Permission.SCORES.value!r}, which reading scores needs",
            reason="scope",
        )
    _, found = catalog.profile(profile)
    if found.gate is None:
        raise NotSupported(
            f"profile {found.name!r} has no gate, and so no probe; profiles with a gate: "
            f"{list(catalog.gated_profile_names)}",
            parameter="profile",
        )


def observed(resolution: Resolution) -> Resolution:
    """The same with a gate that decides and edits nothing; the one token that comes with it is not read either."""
    plan = resolution.plan
    assert plan is not None
    assert plan.gate is not None
    gate = structs.replace(plan.gate, is_observed=True)
    return structs.replace(resolution, plan=structs.replace(plan, gate=gate, response=False))
