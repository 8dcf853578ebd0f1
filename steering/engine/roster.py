"""Roster: which bundles requests may name, and which requests name them. The scheduler's side of loading.

A request counts from the moment the scheduler accepts it, waiting, running or preempted, until it has ended; no worker
sees all of that. So the scheduler decides when an unloaded bundle is released, and a step carries it to every rank.
Knows nothing of vLLM or tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from steering.errors import InvalidSpec, UnknownName
from steering.plan import Plan, Reasoning

if TYPE_CHECKING:
    from steering.bundle import Bundle

MOST_CHECKED = 1024

RELEASED = "trimtab_released"
"""Attribute of vLLM's `SchedulerOutput`: digests whose place in the bank is free from this step on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleNames:
    """What plans may name of a bundle: edits, the categories of each profile's gate, its response probe, and whether
    it has a profile that spares reasoning.
    """

    edits: frozenset[str]
    gates: Mapping[str, frozenset[str]]
    has_response: bool = False
    is_sparing: bool = False

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        """The names of a bundle."""
        gated = [profile for profile in bundle.manifest.profiles if profile.gate is not None]
        return cls(
            edits=frozenset(bundle.edits),
            gates={
                profile.name: frozenset(bundle.probes[profile.gate.probe].categories)
                for profile in gated
                if profile.gate is not None
            },
            has_response=bundle.manifest.response is not None,
            is_sparing=bundle.manifest.is_sparing,
        )

    def to_fields(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "edits": sorted(self.edits),
            "gates": {profile: sorted(categories) for profile, categories in self.gates.items()},
            "has_response": self.has_response,
            "is_sparing": self.is_sparing,
        }

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """What `to_fields` wrote."""
        return cls(
            edits=frozenset(fields["edits"]),
            gates={profile: frozenset(categories) for profile, categories in fields["gates"].items()},
            has_response=fields["has_response"],
            is_sparing=fields["is_sparing"],
        )


class Roster:
    """Bundles by digest: open to requests, or closed and held by those that were accepted before.

    Args:
        bundles: names of those that are open from the start.
    """

    def __init__(self, bundles: Mapping[str, BundleNames]) -> None:
        self._open = dict(bundles)
        self._checked: dict[int, Plan] = {}
        """Plans that were found well since the last order, by identity: many requests share one (`Plan.shared`)."""
        self._closed: dict[str, BundleNames] = {}
        self._bundle_of: dict[str, str] = {}
        """By request."""
        self._requests: Counter[str] = Counter()
        """How many name a bundle."""

    @property
    def has_released(self) -> bool:
        """Whether a closed bundle is named by no request."""
        return bool(self._closed) and any(not self._requests[digest] for digest in self._closed)

    def check(self, plan: Plan) -> None:
        """Whether every name of a plan is one of an open bundle.

        Raises:
            UnknownName: one is not.
        """
        if id(plan) in self._checked:
            return
        self._check(plan)
        if len(self._checked) >= MOST_CHECKED:
            self._checked.clear()
        self._checked[id(plan)] = plan

    def _check(self, plan: Plan) -> None:
        names = self._open.get(plan.bundle)
        if names is None:
            why = "is being unloaded" if plan.bundle in self._closed else "is not loaded"
            raise UnknownName(f"bundle {plan.bundle} {why}; loaded: {sorted(self._open)}")
        if plan.response and not names.has_response:
            raise UnknownName(f"bundle {plan.bundle} has no response probe")
        if plan.reasoning is Reasoning.SPARED and not names.is_sparing:
            raise UnknownName(f"no profile of bundle {plan.bundle} spares reasoning")
        if plan.gate is None:
            if plan.edit is not None and plan.edit not in names.edits:
                raise UnknownName(f"no edit {plan.edit!r} of bundle {plan.bundle}; it has {sorted(names.edits)}")
            return
        categories = names.gates.get(plan.gate.profile)
        if categories is None:
            raise UnknownName(
                f"no gate {plan.gate.profile!r} of bundle {plan.bundle}; it has gates in {sorted(names.gates)}"
            )
        if not categories.issuperset(plan.gate.categories or ()):
            raise UnknownName(
                f"gate {plan.gate.profile!r} has the categories {sorted(categories)}, not all of "
                f"{list(plan.gate.categories or ())}"
            )

    def accept(self, request_id: str, digest: str) -> None:
        """A request that names an open bundle was accepted."""
        if request_id not in self._bundle_of:
            self._bundle_of[request_id] = digest
            self._requests[digest] += 1

    def end(self, request_ids: Iterable[str]) -> None:
        """Requests ended, however they did; others than steered ones are ignored."""
        if self._bundle_of:
            for request_id in request_ids:
                digest = self._bundle_of.pop(request_id, None)
                if digest is not None:
                    self._requests[digest] -= 1

    def take_released(self) -> tuple[str, ...]:
        """Closed bundles that no request names, in an order that is the same everywhere; each is told once."""
        released = tuple(sorted(digest for digest in self._closed if not self._requests[digest]))
        for digest in released:
            del self._closed[digest], self._requests[digest]
        return released

    def obey(self, order: str, digest: str, names: Mapping[str, Any] | None = None) -> bool:
        """Carry out an order.

        Args:
            order: "open": requests may name the bundle from now on; every rank has it in its bank. "close": none may
                any more; what has been accepted is finished. "revive": open one again that is closed and not released.
            digest: of the bundle.
            names: `BundleNames.to_fields`, for "open".

        Returns:
            Whether it is as ordered; False where there is nothing to close or to revive.

        Raises:
            InvalidSpec: another order, or one to open without names.
        """
        self._checked.clear()
        if order == "open" and names is not None:
            self._closed.pop(digest, None)
            self._open[digest] = BundleNames.from_fields(names)
            return True
        if order == "close":
            if digest in self._open:
                self._closed[digest] = self._open.pop(digest)
            return digest in self._closed
        if order == "revive":
            if digest in self._closed:
                self._open[digest] = self._closed.pop(digest)
            return digest in self._open
        raise InvalidSpec(f"order {order!r} of bundle {digest} cannot be carried out; open, close and revive can")
