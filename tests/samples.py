"""Random terms, edits, bundles and plans of any shape, for tests of whatever reads them.

Knows nothing of vLLM or HTTP.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering.bundle import Bundle, save_bundle
from steering.fingerprint import Fingerprint
from steering.gate import Probe
from steering.manifest import Manifest
from steering.plan import GateOrder, Plan, Scope
from steering.terms import Edit, LayerTerms

WIDTH = 16
LAYERS = 4
DIGEST = "sha256:" + "0" * 64


def unit_rows(count: int, width: int, generator: torch.Generator) -> Tensor:
    """[count, width] float32, rows of norm 1."""
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=-1)


def random_terms(*, layer: int, rank: int, width: int = WIDTH, seed: int = 0, is_read: bool = True) -> LayerTerms:
    """`rank` terms with gain and bias; without reads, terms that only add."""
    generator = torch.Generator().manual_seed(seed)
    gain = torch.randn(rank, generator=generator) if is_read else torch.zeros(rank)
    return LayerTerms(
        layer=layer,
        read=unit_rows(rank, width, generator),
        write=unit_rows(rank, width, generator),
        gain=gain,
        bias=torch.randn(rank, generator=generator),
    )


def random_edit(name: str, *, ranks: dict[int, int], width: int = WIDTH, seed: int = 0) -> Edit:
    """An edit with `ranks[layer]` terms at each of its layers."""
    return Edit(
        name=name,
        layers=tuple(
            random_terms(layer=layer, rank=rank, width=width, seed=1000 * seed + layer)
            for layer, rank in sorted(ranks.items())
        ),
    )


def random_probe(
    name: str, *, layer: int, categories: tuple[str, ...], width: int = WIDTH, seed: int = 0, scale: float = 1.0
) -> Probe:
    """A probe whose scores of residuals of that scale are about standard normal."""
    generator = torch.Generator().manual_seed(seed)
    return Probe(
        name=name,
        layer=layer,
        categories=categories,
        weight=torch.randn(len(categories) + 1, width, generator=generator) / (scale * width**0.5),
        bias=torch.randn(len(categories) + 1, generator=generator) / 4,
    )


def with_gates(
    manifest: dict[str, Any],
    gates: dict[str, tuple[Probe, dict[str, str], dict[str, str]]],
    *,
    thresholds: tuple[float, float] = (0.4, 0.6),
) -> dict[str, Any]:
    """The manifest with a profile for each gate: its probe, and the edits to refuse and to comply by category."""
    names = dict.fromkeys(category for probe, _, _ in gates.values() for category in probe.categories)
    known = [category["name"] for category in manifest["categories"]]
    probes = {probe.name: probe for probe, _, _ in gates.values()}
    return {
        **manifest,
        "categories": [*manifest["categories"], *({"name": name} for name in names if name not in known)],
        "probes": [
            {"name": probe.name, "layer": probe.layer, "categories": list(probe.categories)}
            for probe in probes.values()
        ],
        "profiles": [
            *manifest["profiles"],
            *(
                {
                    "name": name,
                    "refuse": refuse,
                    "comply": comply,
                    "default_category": probe.categories[0],
                    "gate": {"probe": probe.name, "comply_below": thresholds[0], "refuse_above": thresholds[1]},
                }
                for name, (probe, refuse, comply) in gates.items()
            ),
        ],
    }


def with_response(manifest: dict[str, Any], probe: Probe, tokens: int) -> dict[str, Any]:
    """The manifest with a response probe that reads up to so many generated tokens."""
    record = {
        "name": probe.name,
        "layer": probe.layer,
        "position": "generated_tokens",
        "tokens": tokens,
        "categories": [],
    }
    return {**manifest, "probes": [*manifest.get("probes", ()), record], "response_probe": probe.name}


def manifest_of(edits: dict[str, Edit], *, width: int = WIDTH, layers: int = LAYERS) -> dict[str, Any]:
    """The fields `save_bundle` takes: one category, one profile that uses the first edit for both sides."""
    first = next(iter(edits))
    return {
        "name": "sample",
        "version": "1",
        "model": {
            "architecture": "LlamaForCausalLM",
            "hidden_size": width,
            "layers": layers,
            "vocabulary": 64,
            "config_digest": DIGEST,
            "weights_digest": DIGEST,
            "tokenizer_digest": DIGEST,
            "chat_template_digest": DIGEST,
        },
        "categories": [{"name": "safety", "token": "[Safety]", "token_id": 5}],
        "respond": {"token": "[respond]", "token_id": 6},
        "edits": [
            {
                "name": name,
                "purpose": "control",
                "category": "safety",
                "dose": "as drawn",
                "strength": {"minimum": 0.0, "maximum": 2.0, "measured": "not at all: random numbers"},
                "provenance": {"method": "random", "seed": 0},
            }
            for name in edits
        ],
        "profiles": [
            {
                "name": "default",
                "refuse": {"safety": first},
                "comply": {"safety": first},
                "default_category": "safety",
                "strength": 1.0,
                "scope": "generated",
            }
        ],
        "default_profile": "default",
    }


def write_bundle(path: Path, edits: dict[str, Edit], *, width: int = WIDTH, layers: int = LAYERS) -> Bundle:
    """Write a bundle of these edits into `path` and read it back."""
    return save_bundle(path, manifest_of(edits, width=width, layers=layers), edits)


def bundle_in_memory(
    edits: dict[str, Edit],
    *,
    width: int = WIDTH,
    layers: int = LAYERS,
    digest: str = DIGEST,
    gates: dict[str, tuple[Probe, dict[str, str], dict[str, str]]] | None = None,
    response: tuple[Probe, int] | None = None,
    reasoning_end: int | None = None,
) -> Bundle:
    """A bundle without files; its digest is whatever the test calls it. `response`: a probe, and how many tokens;
    `reasoning_end`: the id of a token, up to which its first profile spares reasoning.
    """
    fields = with_gates(manifest_of(edits, width=width, layers=layers), gates or {}) | {"tensors_digest": DIGEST}
    if reasoning_end is not None:
        fields["reasoning_end"] = {"token": "</think>", "token_id": reasoning_end}
        fields["profiles"][0]["reasoning"] = "spared"
    if response is not None:
        fields = with_response(fields, *response)
    fields["edits"] = [
        record | {"layers": [terms.layer for terms in edits[record["name"]].layers]} for record in fields["edits"]
    ]
    probes = {probe.name: probe for probe, _, _ in (gates or {}).values()}
    if response is not None:
        probes[response[0].name] = response[0]
    return Bundle(manifest=Manifest.model_validate(fields), edits=edits, probes=probes, digest=digest)


def plan_for(
    edit: str | None,
    *,
    bundle: str = DIGEST,
    strength: float = 1.0,
    scope: Scope = Scope.GENERATED,
    plan_id: str = "plan",
    response: bool = False,
) -> Plan:
    """A plan that names one edit of a bundle, or with `response` has the answer observed."""
    return Plan(id=plan_id, bundle=bundle, edit=edit, strength=strength, scope=scope, response=response)


def gate_plan(
    profile: str,
    *,
    bundle: str = DIGEST,
    strength: float = 1.0,
    plan_id: str = "plan",
    comply_below: float = 0.4,
    refuse_above: float = 0.6,
    **order: Any,
) -> Plan:
    """A plan that lets the gate of a profile decide."""
    gate = GateOrder(profile=profile, comply_below=comply_below, refuse_above=refuse_above, **order)
    return Plan(id=plan_id, bundle=bundle, gate=gate, strength=strength)


def fingerprint(**changed: Any) -> Fingerprint:
    """The fingerprint that sample manifests name, with some fields changed."""
    return Fingerprint.model_validate(manifest_of({"e": random_edit("e", ranks={0: 1})})["model"] | changed)
