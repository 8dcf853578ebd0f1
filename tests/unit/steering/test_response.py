"""The response probe: its reference, and what a manifest may say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steering.bundle import load_bundle, save_bundle
from steering.errors import BundleFormatError
from steering.gate import Probe
from steering.response import response_score
from tests.samples import WIDTH, manifest_of, random_edit, random_probe, with_gates

PROBE = random_probe("response", layer=1, categories=(), seed=3)
EDITS = {"e": random_edit("e", ranks={0: 1})}


def record(**changed: Any) -> dict[str, Any]:
    """A response probe as a manifest has it."""
    return {"name": "response", "position": "generated_tokens", "tokens": 4, **changed}


def test_the_score_is_the_mean_over_the_tokens_there_are() -> None:
    """Of up to `tokens`; those beyond are not read, those that are no number do not count; of none comes nothing."""
    residuals = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0))
    each = (residuals @ PROBE.weight[0] + PROBE.bias[0]).tolist()
    assert response_score(PROBE, residuals, 4) == pytest.approx(sum(each[:4]) / 4, abs=1e-5)
    assert response_score(PROBE, residuals[:2], 4) == pytest.approx(sum(each[:2]) / 2, abs=1e-5)
    residuals[1] = float("nan")
    assert response_score(PROBE, residuals, 2) == pytest.approx(each[0], abs=1e-5)
    assert response_score(PROBE, residuals[1:2], 2) is None
    assert response_score(PROBE, residuals[:0], 2) is None


def test_a_bundle_names_its_response_probe(tmp_path: Path) -> None:
    """Written and read back: layer, tokens and numbers."""
    manifest = {**manifest_of(EDITS), "probes": [record()], "response_probe": "response"}
    save_bundle(tmp_path, manifest, EDITS, {"response": PROBE})
    bundle = load_bundle(tmp_path)
    found = bundle.manifest.response
    assert found is not None
    assert (found.name, found.layer, found.tokens, found.categories) == ("response", 1, 4, ())
    assert torch.equal(bundle.probes["response"].weight, PROBE.weight)


@pytest.mark.parametrize(
    ("changed", "probe", "message"),
    [
        ({"probes": [record(tokens=9)]}, PROBE, "less than or equal to 8"),
        ({"probes": [record(tokens=None)]}, PROBE, "has tokens and no categories"),
        ({"probes": [record(position="last_prompt_token")]}, PROBE, "categories and no tokens"),
        ({"probes": [record()], "response_probe": "other"}, PROBE, "'other' is not among the probes"),
        (
            {"probes": [record()]},
            random_probe("response", layer=1, categories=("safety",)),
            "has tokens and no categories",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changed: dict[str, Any], probe: Probe, message: str) -> None:
    """Position, tokens and categories go together, and the name is that of a probe that reads answers."""
    manifest = {**manifest_of(EDITS), "response_probe": "response", **changed}
    with pytest.raises(BundleFormatError, match=message):
        save_bundle(tmp_path, manifest, EDITS, {"response": probe})


def test_a_gate_cannot_decide_by_a_response_probe(tmp_path: Path) -> None:
    """A gate reads prompts."""
    gate = random_probe("gate", layer=0, categories=("safety",))
    manifest = with_gates(manifest_of(EDITS), {"gated": (gate, {"safety": "e"}, {})})
    manifest["profiles"][-1]["gate"]["probe"] = "response"
    manifest["probes"].append(record())
    with pytest.raises(BundleFormatError, match="reads answers, and a gate reads prompts"):
        save_bundle(tmp_path, manifest, EDITS, {"gate": gate, "response": PROBE})
