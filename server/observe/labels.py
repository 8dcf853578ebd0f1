"""Labels: the closed sets that values of metric labels come from, so that no client can make new series.

Bundles come and go while a server runs, and a series once made stays: what was let in counts for good, and whatever
comes when a set is full is `other`. Knows nothing of HTTP, vLLM or torch.
"""

from __future__ import annotations

from collections.abc import Iterable

from server.catalog import BundleView, LiveCatalog

NONE = "none"
"""Value where there is no category or no profile."""

OTHER = "other"
"""Value of all that its set has no room for."""

MOST_PROFILES = 50
MOST_CATEGORIES = 64
MOST_CATEGORIES_OF_A_BUNDLE = 16


class Closed:
    """A set of label values that is full one day.

    Args:
        most: values it holds, beside `none` and `other`.
        known: those that are in from the start.
    """

    def __init__(self, most: int, known: Iterable[str] = ()) -> None:
        self._most = most
        self._values = {*known}

    def __call__(self, value: str | None) -> str:
        """The value, if it is in the set or there is room left; `none` for None."""
        if value is None or value == NONE:
            return NONE
        if value in self._values:
            return value
        if len(self._values) >= self._most:
            return OTHER
        self._values.add(value)
        return value


class Labels:
    """Profiles and categories of the loaded bundles as label values.

    Args:
        catalog: in force; names that no loaded bundle has are let in nowhere.
    """

    def __init__(self, catalog: LiveCatalog) -> None:
        self._catalog = catalog
        self._profiles = Closed(MOST_PROFILES)
        self._categories = Closed(MOST_CATEGORIES)

    def profile(self, name: str | None) -> str:
        """A profile, by its short name."""
        if name is None or name == NONE:
            return NONE
        return self._profiles(name) if self._is_loaded(name) else OTHER

    def category(self, name: str | None, bundle: BundleView) -> str:
        """A category of a bundle, if it is among the bundle's first."""
        if name is None:
            return NONE
        first = list(bundle.categories)[:MOST_CATEGORIES_OF_A_BUNDLE]
        return self._categories(name) if name in first else OTHER

    def _is_loaded(self, name: str) -> bool:
        return any(name in bundle.profiles for bundle in self._catalog.now.bundles)
