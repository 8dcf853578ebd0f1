"""The catalog: what the loaded bundles offer, in the form the gateway looks things up in.

A light view without tensors. Knows nothing of torch, vLLM or HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from steering.errors import BundleFormatError, UnknownName
from steering.plan import Mode, Scope

if TYPE_CHECKING:  # steering.bundle imports torch, which the gateway's own process parts do without
    from steering.bundle import Bundle


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
class ProfileView:
    """A ready-to-use setting; `refuse` and `comply` name an edit by category."""

    name: str
    description: str
    refuse: Mapping[str, str]
    comply: Mapping[str, str]
    default_category: str
    strength: float
    scope: Scope

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
        is_transferred: the bundle was made for another model and accepted for this one by the operator.
    """

    name: str
    version: str
    label: str
    digest: str
    categories: Mapping[str, CategoryView]
    edits: Mapping[str, EditView]
    profiles: Mapping[str, ProfileView]
    default_profile: str
    respond: str | None = None
    respond_id: int | None = None
    is_transferred: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """Every loaded bundle, the first of them being the default one.

    Raises:
        BundleFormatError: no bundle, two of one name, or a profile whose default strength an edit of it is not
            certified for.
    """

    bundles: tuple[BundleView, ...]
    default_mode: Mode = Mode.OFF
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
                _check_default_strength(bundle, profile)
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


def catalog_of(bundles: Iterable[tuple[Bundle, bool]], *, default_mode: Mode = Mode.OFF) -> Catalog:
    """The catalog of loaded bundles.

    Args:
        bundles: each with whether it is transferred, the default one first.
        default_mode: mode of requests that name none.
    """
    return Catalog(
        bundles=tuple(_view(bundle, is_transferred=transferred) for bundle, transferred in bundles),
        default_mode=default_mode,
    )


def _view(bundle: Bundle, *, is_transferred: bool) -> BundleView:
    manifest = bundle.manifest
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
            )
            for profile in manifest.profiles
        },
        default_profile=manifest.default_profile,
        respond=manifest.respond.token if manifest.respond else None,
        respond_id=manifest.respond.token_id if manifest.respond else None,
        is_transferred=is_transferred,
    )


def _check_default_strength(bundle: BundleView, profile: ProfileView) -> None:
    for name in {*profile.refuse.values(), *profile.comply.values()}:
        edit = bundle.edits[name]
        if not edit.minimum <= profile.strength <= edit.maximum:
            raise BundleFormatError(
                f"bundle {bundle.name!r}: profile {profile.name!r} has strength {profile.strength}, "
                f"its edit {name!r} is certified for {edit.minimum} to {edit.maximum}"
            )
