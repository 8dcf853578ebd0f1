"""Label values come from closed sets, whatever clients send and however many bundles come and go."""

from __future__ import annotations

import dataclasses

from server.catalog import BundleView, CategoryView, LiveCatalog
from server.effects import Effect
from server.observe.labels import (
    MOST_CATEGORIES,
    MOST_CATEGORIES_OF_A_BUNDLE,
    MOST_PROFILES,
    NONE,
    OTHER,
    Closed,
    Labels,
)
from server.observe.metrics import Metrics
from server.policy import SteeringSpec, resolve
from server.verdicts import UNKNOWN
from tests.fakes import make_bundle, make_catalog


def test_a_full_set_takes_in_no_more() -> None:
    """What was in stays in, what comes later is other, and nothing is none."""
    closed = Closed(2, known=["a"])
    assert [closed(value) for value in ("a", "b", "c", "a", "b", None, NONE)] == ["a", "b", OTHER, "a", "b", NONE, NONE]


def wide(number: int, categories: int, profiles: int) -> BundleView:
    """A bundle of so many categories and profiles, all named by its number."""
    bundle = make_bundle(name=f"bundle-{number}", digest=f"sha256:{number:064x}")
    profile = bundle.profiles["refusal-control"]
    names = [f"category {number}.{each}" for each in range(categories)]
    return dataclasses.replace(
        bundle,
        categories={name: CategoryView(name=name) for name in names},
        profiles={
            name: dataclasses.replace(profile, name=name, default_category=names[0])
            for name in (f"profile-{number}.{each}" for each in range(profiles))
        },
        default_profile=f"profile-{number}.0",
    )


def test_only_loaded_names_become_labels() -> None:
    """A name that no bundle has is other, and takes no room."""
    bundle = make_bundle()
    labels = Labels(LiveCatalog(make_catalog(bundle)))
    assert labels.profile("evil") == OTHER
    assert labels.category("evil", bundle) == OTHER
    assert (labels.profile("refusal-control"), labels.profile(None)) == ("refusal-control", NONE)
    assert (labels.category("Safety", bundle), labels.category(None, bundle)) == ("Safety", NONE)


def test_a_bundle_has_so_many_categories_of_its_own() -> None:
    """The first of them, in the bundle's order."""
    bundle = wide(0, categories=30, profiles=1)
    labels = Labels(LiveCatalog(make_catalog(bundle)))
    told = [labels.category(name, bundle) for name in bundle.categories]
    assert told.count(OTHER) == 30 - MOST_CATEGORIES_OF_A_BUNDLE
    assert told[0] == "category 0.0"


def test_bundles_that_come_and_go_make_a_bounded_number_of_series() -> None:
    """A hundred bundles of 20 categories and 10 profiles, one after the other: the sets fill, and then no more."""
    first = make_bundle()
    catalog = LiveCatalog(make_catalog(first))
    metrics = Metrics(catalog, engine_version="")
    for number in range(100):
        bundle = wide(number, categories=20, profiles=10)
        catalog.add(bundle)
        for profile in bundle.profiles:
            for category in bundle.categories:
                spec = SteeringSpec(profile=profile)
                resolution = resolve(spec, catalog.now, plan_id="p")
                effect = Effect(decision="refuse", category=category)
                metrics.answered(resolution, [effect], [UNKNOWN])
            metrics.requests.labels("/v1/chat/completions", metrics.labels.profile(profile), "200").inc()
        metrics.exposition()
        catalog.remove(bundle.digest)
    profiles = {sample.labels["profile"] for sample in next(iter(metrics.requests.collect())).samples}
    categories = {sample.labels["category"] for sample in next(iter(metrics.decisions.collect())).samples}
    assert len(profiles) == MOST_PROFILES  # one of them is other; refusal-control had its place before
    assert len(categories) == MOST_CATEGORIES + 1
    assert OTHER in profiles & categories
    assert metrics.exposition().count(b"\n") < 2000


def test_error_codes_are_bounded() -> None:
    """Codes are the project's own, and even if they were not there is an end to them."""
    metrics = Metrics(LiveCatalog(make_catalog()), engine_version="")
    for number in range(1000):
        metrics.failed(f"code_{number}")
    codes = {sample.labels["code"] for sample in next(iter(metrics.errors.collect())).samples}
    assert len(codes) == 65
