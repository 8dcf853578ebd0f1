"""Tiny models, one bundle of every kind of edit, and oracles, shared by the engine tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from steering.bundle import Bundle, save_bundle
from steering.fingerprint import fingerprint_of
from steering.terms import Edit, LayerTerms, ablated_direction, added_direction, low_rank_map, repositioned_direction
from tests.integration.engine.driver import close_hosts
from tests.integration.engine.gates import Gated, make_gated
from tests.oracle import Oracle
from tests.tiny_models import WIDTH, make_tiny_model


def _unit(seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)), dim=0)


def _stacked(*terms: LayerTerms) -> LayerTerms:
    parts = {name: torch.cat([getattr(term, name) for term in terms]) for name in ("read", "write", "gain", "bias")}
    return LayerTerms(layer=terms[0].layer, **parts)


def all_kinds_of_edits(scale: float) -> dict[str, Edit]:
    """One edit of every kind of design §2; `scale` is of the order of the residual's norm."""
    matrix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)) / WIDTH**0.5
    layers: dict[str, tuple[LayerTerms, ...]] = {
        "add": (added_direction(layer=1, direction=_unit(1), coefficient=scale),),
        "add everywhere": tuple(
            added_direction(layer=layer, direction=_unit(2 + layer), coefficient=scale / 4) for layer in range(4)
        ),
        "ablate": (ablated_direction(layer=0, direction=_unit(1)), ablated_direction(layer=2, direction=_unit(6))),
        "reposition": (repositioned_direction(layer=2, direction=_unit(7), target=-scale),),
        "low rank": (low_rank_map(layer=1, matrix=matrix, rank=8),),
        "several terms": (
            _stacked(
                added_direction(layer=1, direction=_unit(3), coefficient=scale / 2),
                ablated_direction(layer=1, direction=_unit(4)),
                repositioned_direction(layer=1, direction=_unit(5), target=scale / 3),
            ),
        ),
    }
    return {name: Edit(name=name, layers=terms) for name, terms in layers.items()}


@dataclass(frozen=True)
class Tiny:
    """A tiny model, its bundle and its oracle."""

    model: Path
    bundle: Bundle
    oracle: Oracle

    @property
    def bundle_path(self) -> str:
        """Folder of the bundle."""
        return str(self.bundle.path)


@pytest.fixture(scope="session", autouse=True)
def _engine_processes() -> Iterator[None]:
    """End the engine processes with the session."""
    yield
    close_hosts()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """Make a tiny model of a family with a bundle; each family once."""
    folder = tmp_path_factory.mktemp("tiny")
    made: dict[str, Tiny] = {}

    def make(family: str) -> Tiny:
        if family not in made:
            model = make_tiny_model(family, folder)
            edits = all_kinds_of_edits(scale=8.0)
            strength = {"minimum": 0.0, "maximum": 4.0, "measured": "not measured: a test bundle"}
            manifest = {
                "name": f"tiny-{family.replace('_', '-')}",
                "version": "1",
                "model": fingerprint_of(model).model_dump(),
                "categories": [{"name": "test"}],
                "edits": [
                    {"name": name, "purpose": "refuse", "category": "test", "dose": "as made", "strength": strength}
                    for name in edits
                ],
                "profiles": [{"name": "test", "refuse": {"test": "add"}, "default_category": "test"}],
                "default_profile": "test",
            }
            bundle = save_bundle(folder / f"{family}-bundle", manifest, edits)
            made[family] = Tiny(model, bundle, Oracle(model, edits))
        return made[family]

    return make


@pytest.fixture(scope="session")
def gated(tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory) -> Gated:
    """The tiny Llama with gates and a response probe in its bundle."""
    return make_gated(tiny("llama"), tmp_path_factory.mktemp("gated") / "bundle")
