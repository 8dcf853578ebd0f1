"""The catalog: what the loaded bundles offer, in the form the gateway looks things up in.

A light view without tensors. Knows nothing of torch, vLLM or HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from server.observe.reference import fit_reference
from steering.errors import BundleFormatError, NotSupported, UnknownName
from steering.plan import CategorySource, Mode, Reasoning, Scope

if TYPE_CHECKING:  # steering.bundle imports torch, which the gateway's own process parts do without
    from steering.bundle import Bundle
    from steering.manifest import GateSettings, ProbeRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryView:
    """A refusal category; `token` and `token_id` where the model names it by a token of its own."""

    name: str
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EditView:
    """An edit without its numbers; strengths from `minimum` to `maximum` are certified, `measured` says how."""

    name: str
    purpose: str
    category: str | None
    layers: tuple[int, ...]
    dose: str
    minimum: float
    maximum: float
    measured: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PointView:
    """An operating point: a threshold, and the shares it flags of prompts to refuse and of prompts to answer."""

    name: str
    threshold: float
    true_positive_rate: float
    false_positive_rate: float
    positives: int
    negatives: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeView:
    """A probe without its numbers: where it reads, what it tells apart, and what its thresholds cost."""

    name: str
    layer: int
    categories: tuple[str, ...]
    operating_points: tuple[PointView, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseView:
    """The response probe without its numbers: it reads up to `tokens` generated tokens at the output of `layer`, and
    answers at or above the probability `threshold` count as refusals.
    """

    name: str
    layer: int
    tokens: int
    threshold: float = 0.5
    operating_points: tuple[PointView, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GateView:
    """How a profile decides by itself; thresholds of the refusal probability as in `steering.plan.GateOrder`."""

    probe: ProbeView
    comply_below: float
    refuse_above: float
    is_graded: bool = False
    category_source: CategorySource = CategorySource.PROBE


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileView:
    """A ready-to-use setting; `refuse` and `comply` name an edit by category, `gate` decides between them, `reasoning`
    says whether that of a thinking model is edited as well.
    """

    name: str
    description: str
    refuse: Mapping[str, str]
    comply: Mapping[str, str]
    default_category: str
    strength: float
    scope: Scope
    gate: GateView | None = None
    reasoning: Reasoning = Reasoning.EDITED

    @property
    def default_mode(self) -> Mode:
        """Mode of requests that name none."""
        return Mode.OFF if self.gate is None else Mode.AUTO

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Modes a client may ask of this profile."""
        possible = {Mode.AUTO: self.gate is not None, Mode.REFUSE: bool(self.refuse), Mode.COMPLY: bool(self.comply)}
        return (*(mode for mode, is_possible in possible.items() if is_possible), Mode.OFF)

    def edits(self, mode: Mode) -> Mapping[str, str]:
        """Names of the edits by category that serve a mode; none for modes that edit nothing by themselves."""
        return {Mode.REFUSE: self.refuse, Mode.COMPLY: self.comply}.get(mode, {})


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleView:
    """A loaded bundle.

    Attributes:
        label: `name@sha256:` and 12 digits, as answers and metrics name it.
        digest: `sha256:` and 64 digits, as plans and worker reports name it.
        respond_id: token id of the token that begins an answer, where the model has one.
        response: says of an answer whether it refuses; None where the bundle has no such probe.
        references: by probe, how many of its calibration prompts scored in each bin of `server/observe/reference.py`,
            where the bundle's report tells.
        is_thinking: the model reasons before it answers.
        is_transferred: its edits, probes and thresholds were measured on another model; accepted for this one by the
            operator, at the start of this server or when the bundle was made.
    """

    name: str
    version: str
    label: str
    digest: str
    categories: Mapping[str, CategoryView]
    edits: Mapping[str, EditView]
    profiles: Mapping[str, ProfileView]
    default_profile: str
    probes: Mapping[str, ProbeView] = field(default_factory=dict)
    respond: str | None = None
    respond_id: int | None = None
    response: ResponseView | None = None
    references: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    is_thinking: bool = False
    is_transferred: bool = False

    @property
    def reader(self) -> ResponseView | None:
        """The response probe where answers are to be read: a model that says by a token that it refuses needs none."""
        return None if self._has_tokens else self.response

    @property
    def is_blind(self) -> bool:
        """Whether nothing here can say of an answer that it refuses."""
        return not self._has_tokens and self.response is None

    @property
    def _has_tokens(self) -> bool:
        return any(category.token_id is not None for category in self.categories.values())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Catalog:
    """Every loaded bundle, the first of them being the default one. Equal to itself alone: what is worked out of one is
    kept by it.

    Raises:
        BundleFormatError: no bundle, two of one name, or a graded gate over an edit that is not certified for the
            small strengths it would choose.
    """

    bundles: tuple[BundleView, ...]
    _by_name: dict[str, tuple[BundleView, ProfileView]] = field(init=False, repr=False)
    _ambiguous: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        names = [bundle.name for bundle in self.bundles]
        if not names or len(names) != len(set(names)):
            raise BundleFormatError(f"a server needs one or more bundles of different names, got {names}")
        short: dict[str, list[tuple[BundleView, ProfileView]]] = {}
        full: dict[str, tuple[BundleView, ProfileView]] = {}
        for bundle in self.bundles:
            for profile in bundle.profiles.values():
                _check_graded(bundle, profile)
                short.setdefault(profile.name, []).append((bundle, profile))
                full[f"{bundle.name}/{profile.name}"] = (bundle, profile)
        unique = {name: found[0] for name, found in short.items() if len(found) == 1}
        object.__setattr__(self, "_by_name", full | unique)
        object.__setattr__(self, "_ambiguous", frozenset(short) - frozenset(unique))

    @property
    def default(self) -> tuple[BundleView, ProfileView]:
        """The default bundle and its default profile."""
        bundle = self.bundles[0]
        return bundle, bundle.profiles[bundle.default_profile]

    @property
    def gated_profile_names(self) -> tuple[str, ...]:
        """Those of `profile_names` that have a gate."""
        return tuple(name for name in self.profile_names if self._by_name[name][1].gate is not None)

    @property
    def profile_names(self) -> tuple[str, ...]:
        """Every name a client may send as `steering.profile`: short where it is unique, else `bundle/profile`."""
        return tuple(
            profile.name if profile.name not in self._ambiguous else f"{bundle.name}/{profile.name}"
            for bundle in self.bundles
            for profile in bundle.profiles.values()
        )

    @property
    def categories(self) -> frozenset[str]:
        """Names of all categories of all bundles: the closed set of a metric label."""
        return frozenset(name for bundle in self.bundles for name in bundle.categories)

    def profile(self, name: str | None) -> tuple[BundleView, ProfileView]:
        """The profile a client names, with its bundle; the default one for None.

        Raises:
            UnknownName: no such profile, or several bundles have one of that name.
        """
        if name is None:
            return self.default
        found = self._by_name.get(name)
        if found is None:
            why = "is in several bundles" if name in self._ambiguous else "is not loaded"
            raise UnknownName(
                f"profile {name!r} {why}; profiles: {list(self.profile_names)}", parameter="steering.profile"
            )
        return found


class LiveCatalog:
    """The catalog in force: bundles come and go while requests run, and each keeps what it was resolved against."""

    def __init__(self, catalog: Catalog) -> None:
        self._now = catalog

    @property
    def now(self) -> Catalog:
        """The catalog at this moment."""
        return self._now

    def add(self, bundle: BundleView) -> None:
        """Offer one more bundle.

        Raises:
            BundleFormatError: one of its name is there, or it cannot be offered at all.
        """
        self._now = Catalog(bundles=(*self._now.bundles, bundle))

    def remove(self, digest: str) -> BundleView:
        """Offer a bundle no more; returns it.

        Raises:
            UnknownName: no such bundle.
            NotSupported: the default one, which requests without a `steering` field need.
        """
        bundles = self._now.bundles
        found = next((bundle for bundle in bundles if bundle.digest == digest), None)
        if found is None:
            raise UnknownName(f"no bundle {digest!r} is loaded; bundles: {[one.label for one in bundles]}")
        if found is bundles[0]:
            raise NotSupported(
                f"bundle {found.label} is the default one, which every request without a profile needs; start the "
                "server with another first --bundle to do without it"
            )
        self._now = Catalog(bundles=tuple(bundle for bundle in bundles if bundle is not found))
        return found


def view_of(bundle: Bundle, *, is_transferred: bool) -> BundleView:
    """What the gateway needs to know of a bundle."""
    manifest = bundle.manifest
    probes = {
        record.name: ProbeView(
            name=record.name,
            layer=record.layer,
            categories=record.categories,
            operating_points=tuple(PointView(**point.model_dump()) for point in record.operating_points),
        )
        for record in manifest.probes
        if record.tokens is None
    }
    return BundleView(
        name=manifest.name,
        version=manifest.version,
        label=bundle.label,
        digest=bundle.digest,
        categories={
            category.name: CategoryView(name=category.name, token=category.token, token_id=category.token_id)
            for category in manifest.categories
        },
        edits={
            record.name: EditView(
                name=record.name,
                purpose=record.purpose,
                category=record.category,
                layers=record.layers,
                dose=record.dose,
                minimum=record.strength.minimum,
                maximum=record.strength.maximum,
                measured=record.strength.measured,
            )
            for record in manifest.edits
        },
        profiles={
            profile.name: ProfileView(
                name=profile.name,
                description=profile.description,
                refuse=profile.refuse,
                comply=profile.comply,
                default_category=profile.default_category,
                strength=profile.strength,
                scope=profile.scope,
                gate=_gate(profile.gate, probes),
                reasoning=Reasoning(profile.reasoning),
            )
            for profile in manifest.profiles
        },
        default_profile=manifest.default_profile,
        probes=probes,
        respond=manifest.respond.token if manifest.respond else None,
        respond_id=manifest.respond.token_id if manifest.respond else None,
        response=_response(manifest.response),
        references={probe.name: fit_reference(bundle.path, probe.layer) for probe in probes.values()},
        is_thinking=manifest.reasoning_end is not None,
        is_transferred=is_transferred or manifest.transfer is not None,
    )


def _check_graded(bundle: BundleView, profile: ProfileView) -> None:
    if profile.gate is None or not profile.gate.is_graded:
        return
    for name in sorted({*profile.refuse.values(), *profile.comply.values()}):
        if bundle.edits[name].minimum > 0:
            raise BundleFormatError(
                f"bundle {bundle.name!r}: the gate of profile {profile.name!r} is graded, which takes strengths from 0 "
                f"on; its edit {name!r} is certified from {bundle.edits[name].minimum} on"
            )


def _response(record: ProbeRecord | None) -> ResponseView | None:
    """The first operating point is the one that is used."""
    if record is None or record.tokens is None:
        return None
    points = tuple(PointView(**point.model_dump()) for point in record.operating_points)
    return ResponseView(
        name=record.name,
        layer=record.layer,
        tokens=record.tokens,
        threshold=points[0].threshold if points else 0.5,
        operating_points=points,
    )


def _gate(settings: GateSettings | None, probes: Mapping[str, ProbeView]) -> GateView | None:
    if settings is None:
        return None
    return GateView(
        probe=probes[settings.probe],
        comply_below=settings.comply_below,
        refuse_above=settings.refuse_above,
        is_graded=settings.is_graded,
        category_source=settings.category_source,
    )
