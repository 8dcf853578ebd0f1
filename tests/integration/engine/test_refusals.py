"""What steering is not proved to work with does not start, and says its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steering.bundle import save_bundle
from steering.engine.compat import ARCHITECTURES
from steering.fingerprint import fingerprint_of
from tests.integration.engine.configurations import Configurations, Told, tell
from tests.integration.engine.conftest import Tiny
from tests.integration.engine.driver import EngineFailed, play
from tests.integration.engine.scenario import Scenario
from tests.tiny_models import FAMILIES, make_tiny_model

ACCEPTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "ngram": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
    "tensor parallel": {"tensor_parallel_size": 2},
    "without prefix caching": {"enable_prefix_caching": False},
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "enable_lora": ("True", {"enable_lora": True}),
    "speculative_config": (
        "draft_model",
        {"speculative_config": {"method": "draft_model", "model": "", "num_speculative_tokens": 2}},
    ),
    "pipeline_parallel_size": ("2", {"pipeline_parallel_size": 2}),
    "data_parallel_size": ("2", {"data_parallel_size": 2}),
    "decode_context_parallel_size": ("2", {"decode_context_parallel_size": 2, "tensor_parallel_size": 2}),
    "kv_transfer_config": ("True", {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}),
    "kv_transfer_config by kv_offloading_size": ("True", {"kv_offloading_size": 1.0}),
    "api_server_count": ("2", {"_api_process_count": 2}),
    "enable_prompt_embeds": ("True", {"enable_prompt_embeds": True}),
    "runner": ("pooling", {"runner": "pooling", "convert": "embed"}),
    "kv_sharing_fast_prefill": ("True", {"kv_sharing_fast_prefill": True}),
}
"""By the option that is named, as vLLM's own configuration has it after its own checks: the value that is named with
it, and what was asked. What vLLM itself refuses on a CPU is checked in `tests/unit/engine/test_compat.py`."""


GONE = "a bundle that is gone"


@pytest.fixture(scope="module")
def told(tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What the check says of every configuration above."""
    model = tiny("llama")
    arguments = {**ACCEPTED, **{option: given for option, (_, given) in REFUSED.items()}}
    arguments["speculative_config"]["speculative_config"]["model"] = str(model.model)
    arguments[GONE] = {"additional_config": {"trimtab": {"bundles": ["absent"]}}}
    question = Configurations(model=str(model.model), bundle=model.bundle_path, arguments=arguments)
    return tell(question, tmp_path_factory.mktemp("configurations"))


@pytest.mark.parametrize("option", REFUSED)
def test_unproved_option_of_vllm_is_refused_by_name(option: str, told: Told) -> None:
    """On vLLM's own configuration object: the message names the option, its value and what to do, and no other."""
    (value, _), named = REFUSED[option], option.split(" ", maxsplit=1)[0]
    assert told.messages[option].startswith(f"steering does not work with these engine options: {named}={value}: ")
    assert not [other for other in REFUSED if other != named and f"{other}=" in told.messages[option]]


def test_a_bundle_that_is_gone_stops_the_start(told: Told) -> None:
    """Read by scheduler and model before anything is served, also where no gateway has looked at it before."""
    assert "cannot read absent/manifest.json" in told.messages[GONE]


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_proved_is_accepted(name: str, told: Told) -> None:
    """Options that a test of this suite runs an engine with are not refused."""
    assert told.messages[name] == ""


def test_no_architecture_of_the_table_takes_more_than_text(told: Told) -> None:
    """Of vLLM's multimodal classes none has a steered one in its place, so that none starts with a bundle."""
    assert len(told.multimodal) > 50
    assert not set(told.multimodal) & set(ARCHITECTURES)


def test_an_engine_checks_its_configuration(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """What is refused above does not start: one engine for all, as they go through one check."""
    model = tiny("llama")
    scenario = Scenario(model=str(model.model), bundle=model.bundle_path, rounds=[], arguments={"enable_lora": True})
    with pytest.raises(EngineFailed, match=r"UnsupportedConfiguration.*enable_lora=True"):
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
