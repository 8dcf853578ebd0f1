"""Rollout: which requests of a profile are steered, and which are only decided on and counted.

A share of 1 steers them all and one of 0 none, which is a shadow of the profile. Pure: the same request id and profile
always fall on the same side. Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec import structs

from server.catalog import BundleView, Catalog, ProfileView
from server.policy import Resolution
from steering.errors import UnsupportedConfiguration
from steering.plan import Plan, Reasoning

EVERY = "*"
"""Stands for all profiles that have no share of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Shares of requests that are steered, by profile.

    Attributes:
        shares: 0 to 1 by profile, as `name`, `bundle/name` or `*`; the more exact one counts. Without any, 1.
    """

    shares: Mapping[str, float] = field(default_factory=dict)

    def check(self, catalog: Catalog) -> None:
        """Refuse a share of a profile that is not there, which would leave the one that was meant fully steered.

        Raises:
            UnsupportedConfiguration: no loaded bundle has a profile of that name.
        """
        known = {name for bundle in catalog.bundles for profile in bundle.profiles for name in _names(bundle, profile)}
        unknown = sorted(set(self.shares) - known - {EVERY})
        if unknown:
            raise UnsupportedConfiguration(
                f"TRIMTAB_ENFORCED_SHARE names {unknown}, which no loaded bundle has; profiles: {sorted(known)}, and "
                f"{EVERY!r} for all others, also those of bundles loaded later"
            )

    def share(self, bundle: BundleView, profile: ProfileView) -> float:
        """Of a profile's requests, how many are steered."""
        names = (f"{bundle.name}/{profile.name}", profile.name, EVERY)
        return next((self.shares[name] for name in names if name in self.shares), 1.0)

    def apply(self, resolution: Resolution, request_id: str) -> Resolution:
        """The resolution, or its shadow where this request is not among those that are steered.

        The shadow of a gate decides and edits nothing. An edit that a request names is left out. What is not to be
        steered anyway stays as it is.
        """
        plan = resolution.plan
        if plan is None or not self.shares:
            return resolution
        bundle, profile = resolution.bundle, resolution.profile
        if drawn(profile.name, request_id) < self.share(bundle, profile):
            return resolution
        if plan.gate is not None:
            gate = structs.replace(plan.gate, is_observed=True)
            observed = structs.replace(plan, gate=gate, reasoning=Reasoning.EDITED)
            return structs.replace(resolution, plan=observed, is_shadow=True)
        observation = None
        if bundle.reader is not None:
            observation = Plan(id=plan.id, bundle=plan.bundle, strength=1.0, response=True)
        return structs.replace(resolution, plan=None, observation=observation, is_shadow=True)


def drawn(*words: str) -> float:
    """A number from 0 to 1, without 1, that hangs on these words alone and is even over many."""
    digest = hashlib.sha256("\0".join(words).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _names(bundle: BundleView, profile: str) -> tuple[str, str]:
    return profile, f"{bundle.name}/{profile}"
