"""Peers: other ways to the same edit, as far as they are installed here.

Our own hooks on transformers always are; packages are found by name and never fetched. Imports none of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from steering.terms import Edit

PLUGIN_GROUP = "vllm.general_plugins"


class Peer(StrEnum):
    """What is measured beside the engine. All but the last run on transformers, in batches of one length.

    `PLAIN` is transformers unsteered, `HOOKS` our own forward hooks with the scope of our plans. The packages add their
    vector at every position, prompts and all, which is what they offer.
    """

    PLAIN = "transformers"
    HOOKS = "transformers with hooks"
    STEERING_VECTORS = "steering-vectors"
    REPENG = "repeng"
    HOTWIRE = "hotwire-vllm"


PACKAGES = {
    Peer.PLAIN: "transformers",
    Peer.HOOKS: "transformers",
    Peer.STEERING_VECTORS: "steering-vectors",
    Peer.REPENG: "repeng",
    Peer.HOTWIRE: "hotwire-vllm",
}


def installed() -> dict[Peer, str | None]:
    """Version of each peer's package here; None where it is not installed."""
    found: dict[Peer, str | None] = {}
    for peer, package in PACKAGES.items():
        try:
            found[peer] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[peer] = None
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherPlugin:
    """Another plugin of vLLM: what makes vLLM load it and no other, and what a request says to it.

    Attributes:
        environment: of its engine.
        key: of `SamplingParams.extra_args`.
        order: under it.
    """

    environment: dict[str, str]
    key: str
    order: str


def hotwire(edit: Edit, *, layers: int, folder: Path) -> OtherPlugin:
    """hotwire-vllm 0.1 with the same addition: a file of one vector per layer, asked for by its name.

    Args:
        edit: an addition at one layer.
        layers: of the model.
        folder: for the file; torch's own format, which is what hotwire reads.
    """
    (terms,) = edit.layers
    vectors = torch.zeros(layers, edit.width)
    vectors[terms.layer] = terms.bias @ terms.write
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(vectors, folder / f"{edit.name}.pt")
    mine = [point.name for point in metadata.entry_points(group=PLUGIN_GROUP) if _owner(point) == "hotwire-vllm"]
    order = {"id": edit.name, "layer": terms.layer, "scale": 1.0}
    return OtherPlugin(
        environment={"VLLM_PLUGINS": ",".join(mine), "HOTWIRE_VECTORS": str(folder.resolve())},
        key="hotwire",
        order=json.dumps(order),
    )


def _owner(point: Any) -> str | None:
    return None if point.dist is None else str(point.dist.name)
