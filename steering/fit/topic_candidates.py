"""Configurations of a topic's edit: method, layers, α and form, and the bundle through which an engine tries them all.

Additive configurations of the same layers share one edit and differ in strength, so that one batch holds many doses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steering.bundle import Bundle, save_bundle
from steering.engine.asks import EditOrder
from steering.fit.topic_directions import Method
from steering.fit.topic_edits import topic_edit
from steering.fit.topic_fit import TopicFit
from steering.fit.topic_settings import TopicSettings
from steering.fit.topic_vectors import Vectors
from steering.plan import Reasoning, Scope
from steering.terms import Edit

FREE, GATED = "free", "gated"
"""Variants: a free edit is asked for by name, at any position; a gated one begins where its gate decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One configuration.

    Attributes:
        variant: `FREE` or `GATED`.
        layers: the highest ranked ones, ascending.
        alpha: negative removes refusal, positive induces it.
        scope: positions it edits.
        reasoning: whether that of a thinking model is among them.
    """

    method: Method
    variant: str
    layers: tuple[int, ...]
    alpha: float
    is_reposition: bool
    scope: Scope
    reasoning: Reasoning = Reasoning.EDITED

    @property
    def edit(self) -> str:
        """Name of its edit in the bundle of candidates."""
        name = f"{self.method}-{self.variant}-{'induce' if self.alpha > 0 else 'remove'}-{len(self.layers)}"
        return f"{name}-reposition-{abs(self.alpha):g}" if self.is_reposition else name

    @property
    def strength(self) -> float:
        """Of that edit: additive ones are stored at α = ±1."""
        return 1.0 if self.is_reposition else abs(self.alpha)

    def order(self, bundle: str, share: float = 1.0) -> EditOrder:
        """What the engine is asked for; `share` multiplies the dose."""
        return EditOrder(
            bundle=bundle,
            edit=self.edit,
            strength=share * self.strength,
            scope=self.scope,
            reasoning=self.reasoning,
        )

    def made(self, vectors: Vectors, name: str) -> Edit:
        """The edit of this configuration alone, at strength 1."""
        return topic_edit(name, vectors.parts(self.method, self.layers), self.alpha, is_reposition=self.is_reposition)

    def to_json(self) -> dict[str, Any]:
        """For stage files."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Candidate:
        """Read what `to_json` gave."""
        fields = {key: facts[key] for key in ("variant", "alpha", "is_reposition")}
        return cls(
            **fields,
            method=Method(facts["method"]),
            layers=tuple(facts["layers"]),
            scope=Scope(facts["scope"]),
            reasoning=Reasoning(facts["reasoning"]),
        )

    def __str__(self) -> str:
        form = "reposition" if self.is_reposition else "add"
        return f"{self.method} {form} top {len(self.layers)} α {self.alpha:g} ({self.variant})"


def removal_candidates(settings: TopicSettings, vectors: Vectors, gate_layer: int | None) -> list[Candidate]:
    """Every configuration that removal is searched among; with given doses, those alone.

    Args:
        gate_layer: where a gate decides; None without one.
    """
    variants: list[tuple[str, int, Scope]] = [(FREE, 0, settings.scope)]
    if gate_layer is not None:
        variants.append((GATED, gate_layer, Scope.GENERATED))
    found = []
    for variant, first, scope in variants:
        for method in settings.methods:
            ranking = [one.layer for one in vectors.ranking(method, at_least=first)]
            if not ranking:
                continue
            for count, alpha, is_reposition in _configurations(settings, method, len(ranking)):
                found.append(
                    Candidate(
                        method=method,
                        variant=variant,
                        layers=tuple(sorted(ranking[:count])),
                        alpha=alpha,
                        is_reposition=is_reposition,
                        scope=scope,
                        reasoning=settings.reasoning,
                    )
                )
    return found


def counts_of(wanted: Iterable[int], available: int) -> list[int]:
    """Numbers of layers that a ranking of `available` allows; all of it where more were wanted."""
    return sorted({min(count, available) for count in wanted if count > 0})


def write_candidates(
    fit: TopicFit,
    vectors: Vectors,
    candidates: Sequence[Candidate],
    path: Path,
    reasoning_end: Mapping[str, Any] | None,
) -> Bundle:
    """The bundle of all candidates' edits; for this fit's engine alone, and certified for nothing.

    Args:
        reasoning_end: as the manifest has it; None for a model that does not think.
    """
    profile: dict[str, Any] = {"name": "candidates", "default_category": fit.settings.category}
    if fit.settings.reasoning is Reasoning.SPARED:
        profile |= {"scope": Scope.GENERATED.value, "reasoning": Reasoning.SPARED.value}
    edits: dict[str, Edit] = {}
    records = []
    most = max(abs(one.alpha) for one in candidates) * max((1.0, *fit.settings.strengths))
    for one in candidates:
        if one.edit in edits:
            continue
        unit = one.alpha if one.is_reposition else (1.0 if one.alpha > 0 else -1.0)
        parts = vectors.parts(one.method, one.layers)
        edits[one.edit] = topic_edit(one.edit, parts, unit, is_reposition=one.is_reposition)
        records.append(
            {
                "name": one.edit,
                "purpose": "refuse" if one.alpha > 0 else "comply",
                "category": fit.settings.category,
                "dose": f"α = {unit:g}",
                "strength": {"minimum": 0.0, "maximum": max(1.0, most), "measured": "not measured: a candidate"},
            }
        )
    reading, probes = fit.response()
    manifest = {
        "name": "topic-candidates",
        "version": "1",
        "model": fit.fingerprint,
        "categories": [{"name": fit.settings.category}],
        "edits": records,
        "reasoning_end": reasoning_end,
        "profiles": [profile],
        "default_profile": "candidates",
        **reading,
    }
    return save_bundle(path, manifest, edits, probes)


def _configurations(settings: TopicSettings, method: Method, available: int) -> list[tuple[int, float, bool]]:
    if settings.doses:
        dose = settings.doses.get(method)
        return [] if dose is None else [(min(dose.count, available), dose.alpha, False)]
    forms = (False, True) if settings.repositions else (False,)
    return [
        (count, -alpha, is_reposition)
        for is_reposition in forms
        for count in counts_of(settings.counts, available)
        for alpha in settings.alphas
    ]
