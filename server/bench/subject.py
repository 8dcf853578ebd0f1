"""Subject: the model, bundle and plans that a bench is about.

What an edit costs depends on its layers and ranks and not on its numbers, so that a model without a bundle is measured
with random directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from server.bench.drawn import one_layer_bundle
from steering.bundle import Bundle, load_bundle
from steering.errors import OperatorError
from steering.fingerprint import fingerprint_of
from steering.manifest import Profile
from steering.plan import GateOrder, Plan

DEMO = Path(__file__).resolve().parents[2] / "artifacts" / "demo"
EDITS = 8


class Kind(StrEnum):
    """What the requests of a batch ask for: one edit for all, all different, or a gate that decides."""

    STEERED = "steered"
    DISTINCT = "distinct"
    AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is measured.

    Attributes:
        model: local folder.
        bundle: checked.
        is_random: the bundle was drawn for this run.
    """

    model: Path
    bundle: Bundle
    is_random: bool

    @property
    def facts(self) -> dict[str, object]:
        """For the report; names and digests, no paths."""
        layers = sorted({layer for edit in self.bundle.manifest.edits for layer in edit.layers})
        return {
            "model": self.model.resolve().name if self.model != DEMO / "model" else "demo",
            "fingerprint": self.bundle.manifest.model.model_dump(),
            "bundle": "random directions" if self.is_random else self.bundle.label,
            "edits": len(self.bundle.edits),
            "layers": layers,
        }

    def plans(self, count: int, kind: Kind) -> list[Plan]:
        """Plans of one batch; see `Kind`.

        Raises:
            OperatorError: gates are to decide, and the bundle has none.
        """
        profile = self._gated if kind is Kind.AUTO else self.bundle.manifest.profiles[0]
        names = list(self.bundle.edits)
        first = next(iter({**profile.comply, **profile.refuse}.values()), names[0])
        if kind is Kind.AUTO:
            # The hard sign: every request is edited, so that all the work there can be is done.
            order = GateOrder(profile=profile.name, comply_below=0.5, refuse_above=0.5)
            return [
                Plan(id=f"bench-{number}", bundle=self.bundle.digest, gate=order, strength=profile.strength)
                for number in range(count)
            ]
        return [
            Plan(
                id=f"bench-{number}",
                bundle=self.bundle.digest,
                edit=names[number % len(names)] if kind is Kind.DISTINCT else first,
                strength=profile.strength * (0.5 + (number + 1) / count) if kind is Kind.DISTINCT else profile.strength,
            )
            for number in range(count)
        ]

    def layers(self, kind: Kind) -> set[int]:
        """Layers that plans of this kind may edit: all of them where edits are named, some where a gate decides."""
        if kind is Kind.AUTO:
            profile = self._gated
            names = {*profile.refuse.values(), *profile.comply.values()}
        else:
            names = {str(plan.edit) for plan in self.plans(len(self.bundle.edits), kind)}
        return {terms.layer for name in names for terms in self.bundle.edits[name].layers}

    @property
    def _gated(self) -> Profile:
        default = self.bundle.manifest.profile(self.bundle.manifest.default_profile)
        for profile in (default, *self.bundle.manifest.profiles):
            if profile.gate is not None:
                return profile
        raise OperatorError(f"bundle {self.bundle.label} has no profile with a gate to measure")


def subject_of(model: Path | None, bundle: Path | None, folder: Path) -> Subject:
    """The model and bundle to measure; the demo where none is named.

    Args:
        model: local folder; None takes the demo.
        bundle: folder; None takes the demo's, or for another model random directions written into `folder`.
        folder: for this run, removed afterwards by the caller.

    Raises:
        OperatorError: there is no such model or bundle, or they do not belong together.
    """
    where = model or DEMO / "model"
    if not where.is_dir():
        raise OperatorError(f"no model folder at {where}; name one with --model")
    found = fingerprint_of(where)
    if bundle is None and model is None and (DEMO / "bundle").is_dir():
        bundle = DEMO / "bundle"
    if bundle is None:
        return Subject(model=where, bundle=one_layer_bundle(folder / "bundle", found, directions=EDITS), is_random=True)
    loaded = load_bundle(bundle)
    loaded.manifest.model.check(found, bundle=loaded.manifest.name)
    return Subject(model=where, bundle=loaded, is_random=False)
