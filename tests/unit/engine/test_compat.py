"""Compatibility: what is not proved is refused at start, by the name of its option."""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest

from steering.engine.compat import ARCHITECTURES, check_configuration, class_location, startable
from steering.errors import UnsupportedArchitecture, UnsupportedConfiguration

NOTHING: Any = SimpleNamespace(bundles=(), capture=None)
"""Options that serve no bundle and capture nothing, as far as they are read."""


def configuration(**changed: Any) -> Any:
    """The parts of vLLM's configuration that are read, as a server of two GPUs has them, with some changed."""
    parts: dict[str, dict[str, Any]] = {
        "parallel_config": {
            "tensor_parallel_size": 2,
            "pipeline_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "data_parallel_size": 1,
            "enable_dbo": False,
            "_api_process_count": 1,
            "enable_expert_parallel": False,
            "distributed_executor_backend": "mp",
            "enable_batch_sharded_sampling": None,
        },
        "model_config": {"enable_prompt_embeds": False, "enable_sleep_mode": False, "runner_type": "generate"},
        "cache_config": {"kv_sharing_fast_prefill": False},
        "compilation_config": {"pass_config": SimpleNamespace(enable_sp=False)},
    }
    whole: dict[str, Any] = {"speculative_config": None, "lora_config": None, "kv_transfer_config": None}
    for name, value in changed.items():
        if name in whole:
            whole[name] = value
        else:
            next(part for part in parts.values() if name in part)[name] = value
    return SimpleNamespace(**whole, **{name: SimpleNamespace(**part) for name, part in parts.items()})


def test_a_plain_server_is_accepted() -> None:
    """Two devices, no option out of the ordinary."""
    check_configuration(configuration(), NOTHING)


def test_a_later_rank_of_a_dense_model_is_refused() -> None:
    """VLLM tells each that it is alone (`reconfigure_for_independent_dp_rank`); its index says that it is not, and one
    rank that does not start ends the start of all.
    """
    alone = configuration(data_parallel_size=1)
    alone.parallel_config.data_parallel_index = 0
    check_configuration(alone, NOTHING)
    alone.parallel_config.data_parallel_index = 1
    with pytest.raises(UnsupportedConfiguration, match=r"data_parallel_size=more than 1 \(this is rank 1\): start one"):
        check_configuration(alone, NOTHING)


REFUSED = {
    "pipeline_parallel_size": 2,
    "decode_context_parallel_size": 2,
    "prefill_context_parallel_size": 2,
    "data_parallel_size": 4,
    "enable_dbo": True,
    "_api_process_count": 2,
    "enable_expert_parallel": True,
    "distributed_executor_backend": "ray",
    "enable_batch_sharded_sampling": True,
    "speculative_config": SimpleNamespace(method="eagle3"),
    "lora_config": SimpleNamespace(),
    "kv_transfer_config": SimpleNamespace(),
    "enable_prompt_embeds": True,
    "enable_sleep_mode": True,
    "runner_type": "pooling",
    "kv_sharing_fast_prefill": True,
    "pass_config": SimpleNamespace(enable_sp=True),
}
NAMED = {
    "_api_process_count": "api_server_count",
    "pass_config": "enable_sp",
    "lora_config": "enable_lora",
    "runner_type": "runner",
}


@pytest.mark.parametrize("option", REFUSED)
def test_each_unproved_option_is_refused_by_name(option: str) -> None:
    """The message has the option as the operator knows it."""
    with pytest.raises(UnsupportedConfiguration, match=rf"{NAMED.get(option, option)}="):
        check_configuration(configuration(**{option: REFUSED[option]}), NOTHING)


def test_all_refusals_are_named_at_once() -> None:
    """The operator sees every option to change in one start."""
    with pytest.raises(UnsupportedConfiguration) as caught:
        check_configuration(configuration(**REFUSED), NOTHING)
    for option in REFUSED:
        assert f"{NAMED.get(option, option)}=" in str(caught.value)


NGRAM = SimpleNamespace(method="ngram")


def bundle(*, response: object = None, is_sparing: bool = False) -> SimpleNamespace:
    """What is read of a bundle."""
    return SimpleNamespace(manifest=SimpleNamespace(response=response, is_sparing=is_sparing))


def test_ngram_speculation_is_accepted() -> None:
    """Where everything that is edited goes by position."""
    check_configuration(configuration(speculative_config=NGRAM), SimpleNamespace(bundles=(bundle(),), capture=None))


@pytest.mark.parametrize(
    ("bundles", "capture", "is_v2", "named"),
    [
        ((bundle(), bundle(response=object())), None, False, "ngram with a bundle's response probe"),
        ((bundle(is_sparing=True),), None, False, "ngram with a profile that spares reasoning"),
        ((), object(), False, "ngram with capture"),
        ((bundle(),), None, True, "ngram with model runner V2"),
    ],
)
def test_ngram_speculation_is_refused_where_drafts_would_be_read(
    bundles: tuple[Any, ...], capture: object, is_v2: bool, named: str
) -> None:
    """What looks at tokens would take a rejected draft for an answer; the message names the pair."""
    config = configuration(speculative_config=NGRAM)
    config.use_v2_model_runner = is_v2
    with pytest.raises(UnsupportedConfiguration, match=f"speculative_config={named}:"):
        check_configuration(config, SimpleNamespace(bundles=bundles, capture=capture))


def test_options_an_older_vllm_lacks_are_no_refusal() -> None:
    """A parallel option that does not exist there cannot have been set."""
    config = configuration()
    del config.parallel_config.decode_context_parallel_size, config.parallel_config.enable_dbo
    check_configuration(config, NOTHING)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, str]]:
    """A stand-in for vLLM's table of model classes, by its import path."""
    table = {"LlamaForCausalLM": ("llama", "LlamaForCausalLM"), "Gemma3ForCausalLM": ("own.gemma", "Gemma")}
    path = ""
    for part in ("vllm", "model_executor", "models", "registry"):
        path = f"{path}.{part}".removeprefix(".")
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    sys.modules[path]._VLLM_MODELS = table  # type: ignore[attr-defined]
    return table


def test_class_location_follows_vllms_table(registry: dict[str, tuple[str, str]]) -> None:
    """Short module names lie in vLLM's models package, dotted ones are whole."""
    assert class_location("LlamaForCausalLM") == ("vllm.model_executor.models.llama", "LlamaForCausalLM")
    assert class_location("Gemma3ForCausalLM") == ("own.gemma", "Gemma")


def test_an_architecture_outside_the_table_is_refused_by_name(registry: dict[str, tuple[str, str]]) -> None:
    """The message lists what is supported, also where vLLM itself has the model."""
    registry["OPTForCausalLM"] = ("opt", "OPTForCausalLM")
    with pytest.raises(
        UnsupportedArchitecture, match=r"'OPTForCausalLM' is not supported; supported: .*LlamaForCausalLM"
    ):
        class_location("OPTForCausalLM")


def test_an_architecture_this_vllm_lacks_is_refused(registry: dict[str, tuple[str, str]]) -> None:
    """In our table, not in vLLM's: an older vLLM."""
    with pytest.raises(UnsupportedArchitecture, match="no model class for 'GptOssForCausalLM'"):
        class_location("GptOssForCausalLM")


def test_the_families_of_the_design_are_in_the_table() -> None:
    """Llama with Mistral, Qwen2, Qwen3, Qwen3-MoE, Qwen3-Next, Gemma 2 and 3, Phi-3, Mixtral, gpt-oss."""
    for family in (
        "Llama",
        "Mistral",
        "Qwen2",
        "Qwen3",
        "Qwen3Moe",
        "Qwen3Next",
        "Gemma2",
        "Gemma3",
        "Phi3",
        "Mixtral",
        "GptOss",
    ):
        assert f"{family}ForCausalLM" in ARCHITECTURES


def test_an_engine_can_be_started_where_numba_is_loaded() -> None:
    """VLLM looks at every value of every module when it starts on a CPU: inside `startable` it gets through."""
    import numba  # noqa: F401 - loads what stands in the way

    def scan() -> None:
        for module in list(sys.modules.values()):
            for value in list((getattr(module, "__dict__", None) or {}).values()):
                if hasattr(value, "__dict__"):
                    vars(value).get("kernel")

    with pytest.raises(AttributeError, match="_lib_fn_wrapper"):
        scan()
    with startable():
        scan()
    assert "llvmlite.binding.ffi" in sys.modules
