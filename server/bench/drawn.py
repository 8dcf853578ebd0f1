"""Drawn bundles: random directions of every kind that is timed, bound to a model by its fingerprint.

What an edit costs depends on its layers and ranks and not on its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from steering.bundle import Bundle, save_bundle
from steering.fingerprint import Fingerprint
from steering.gate import Probe
from steering.terms import Edit, LayerTerms, added_direction

GATE_PROFILE = "random"
LOW_RANKS = (8, 32)
STRONGEST = 2.0
EVERY_LAYER = "every-layer"


def direction_name(number: int) -> str:
    """Name of a drawn direction's edit."""
    return f"random-{number}"


def low_rank_name(rank: int) -> str:
    """Name of a drawn low-rank edit."""
    return f"low-rank-{rank}"


def one_layer_bundle(path: Path, model: Fingerprint, *, directions: int, ranks: tuple[int, ...] = ()) -> Bundle:
    """Additions of one term, low-rank edits, and a gate, all at the middle layer, written into `path`.

    Args:
        directions: how many additions, 2 at least: the gate chooses between the first two.
        ranks: of the low-rank edits.
    """
    draw = torch.Generator().manual_seed(0)
    layer = model.layers // 2
    edits = {
        direction_name(number): Edit(
            name=direction_name(number),
            layers=(added_direction(layer=layer, direction=_units(1, model, draw)[0], coefficient=1.0),),
        )
        for number in range(directions)
    }
    for rank in ranks:
        terms = LayerTerms(
            layer=layer,
            read=_units(rank, model, draw),
            write=_units(rank, model, draw),
            gain=torch.full((rank,), 0.1),
            bias=torch.full((rank,), 0.1),
        )
        edits[low_rank_name(rank)] = Edit(name=low_rank_name(rank), layers=(terms,))
    probe = Probe(
        name="random",
        layer=layer,
        categories=("any",),
        weight=torch.randn(2, model.hidden_size, generator=draw) / model.hidden_size**0.5,
        bias=torch.zeros(2),
    )
    return _save(path, model, edits, probe)


def every_layer_bundle(path: Path, model: Fingerprint) -> Bundle:
    """One addition of one term at every layer, written into `path`."""
    draw = torch.Generator().manual_seed(1)
    terms = tuple(
        added_direction(layer=layer, direction=_units(1, model, draw)[0], coefficient=1.0)
        for layer in range(model.layers)
    )
    return _save(path, model, {EVERY_LAYER: Edit(name=EVERY_LAYER, layers=terms)}, None)


def _units(count: int, model: Fingerprint, draw: torch.Generator) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, model.hidden_size, generator=draw), dim=-1)


def _save(path: Path, model: Fingerprint, edits: Mapping[str, Edit], probe: Probe | None) -> Bundle:
    names = list(edits)
    gate = {"gate": {"probe": "random", "comply_below": 0.5, "refuse_above": 0.5}} if probe is not None else {}
    manifest = {
        "name": "random",
        "version": "1",
        "model": model.model_dump(),
        "categories": [{"name": "any"}],
        "probes": [] if probe is None else [{"name": probe.name}],
        "edits": [
            {
                "name": name,
                "purpose": "control",
                "category": "any",
                "dose": "random, of unit directions",
                "strength": {
                    "minimum": 0.0,
                    "maximum": STRONGEST,
                    "measured": "not measured: made to be timed",
                },
            }
            for name in names
        ],
        "profiles": [
            {
                "name": GATE_PROFILE,
                "refuse": {"any": names[0]},
                "comply": {"any": names[min(1, len(names) - 1)]},
                "default_category": "any",
                **gate,
            }
        ],
        "default_profile": GATE_PROFILE,
    }
    return save_bundle(path, manifest, edits, {} if probe is None else {probe.name: probe})
