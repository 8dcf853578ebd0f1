"""What steering is not proved to work with does not start, and says its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steering.bundle import save_bundle
from steering.fingerprint import fingerprint_of
from tests.integration.engine.conftest import Tiny
from tests.integration.engine.driver import EngineFailed, Scenario, play
from tests.tiny_models import FAMILIES, make_tiny_model


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}}, "ngram"),
        ({"enable_lora": True}, "enable_lora"),
        ({"worker_cls": "auto"}, "worker_cls"),
    ],
)
def test_unproved_option_is_refused_by_name(
    arguments: dict[str, Any], named: str, tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    """The engine does not start, and its message names the option and what to do."""
    model = tiny("llama")
    scenario = Scenario(model=str(model.model), bundle=model.bundle_path, rounds=[], arguments=arguments)
    with pytest.raises(EngineFailed, match=rf"UnsupportedConfiguration.*{named}"):
        play(scenario, tmp_path, fresh=True)


def test_architecture_outside_the_table_is_refused_by_name(
    tiny: Callable[[str], Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle for a family the plugin has no class for does not start an unsteered engine."""
    monkeypatch.setitem(FAMILIES, "stablelm", ("StableLmConfig", {}))
    model = make_tiny_model("stablelm", tmp_path)
    edits = dict(tiny("llama").bundle.edits)
    strength = {"minimum": 0.0, "maximum": 4.0, "measured": "not measured: a test bundle"}
    manifest = {
        "name": "tiny-stablelm",
        "version": "1",
        "model": fingerprint_of(model).model_dump(),
        "categories": [{"name": "test"}],
        "edits": [{"name": name, "purpose": "refuse", "dose": "as made", "strength": strength} for name in edits],
        "profiles": [{"name": "test", "refuse": {"test": "add"}, "default_category": "test"}],
        "default_profile": "test",
    }
    bundle = save_bundle(tmp_path / "bundle", manifest, edits)
    scenario = Scenario(model=str(model), bundle=str(bundle.path), rounds=[])
    with pytest.raises(EngineFailed, match=r"UnsupportedArchitecture.*StableLmForCausalLM"):
        play(scenario, tmp_path / "run", fresh=True)
