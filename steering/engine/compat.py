"""What the plugin works with: vLLM versions, model architectures, engine options.

Anything not listed and proved by a test is refused at start, by name. Knows nothing of tensors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from steering.errors import UnsupportedArchitecture, UnsupportedConfiguration

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from steering.engine.options import SteeringOptions

ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "model.layers",
    "MistralForCausalLM": "model.layers",
    "Qwen2ForCausalLM": "model.layers",
    "Qwen3ForCausalLM": "model.layers",
    "Qwen3MoeForCausalLM": "model.layers",
    "Qwen3NextForCausalLM": "model.layers",
    "Gemma2ForCausalLM": "model.layers",
    "Gemma3ForCausalLM": "model.layers",
    "Phi3ForCausalLM": "model.layers",
    "MixtralForCausalLM": "model.layers",
    "GptOssForCausalLM": "model.layers",
}
"""vLLM architecture name → path of its list of decoder blocks. Every block listed here returns the pair
(hidden, residual) whose sum is the residual stream; checked in vLLM 0.32 `model_executor/models/*.py`."""


ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # a model is a local folder
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, on the CPU; vLLM's default takes nearly all memory of the machine
}
"""What vLLM and its libraries read from the environment when imported."""


def set_environment() -> None:
    """Set `ENVIRONMENT`; what the operator set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def class_location(architecture: str) -> tuple[str, str]:
    """Module and class of vLLM's own implementation, from vLLM's registry (`_VLLM_MODELS`, 0.25 to 0.33).

    Raises:
        UnsupportedArchitecture: the architecture is not in `ARCHITECTURES`, or this vLLM has no such model.
    """
    from vllm.model_executor.models.registry import _VLLM_MODELS

    if architecture not in ARCHITECTURES:
        raise UnsupportedArchitecture(
            f"architecture {architecture!r} is not supported; supported: {sorted(ARCHITECTURES)}"
        )
    found = _VLLM_MODELS.get(architecture)
    if found is None:
        raise UnsupportedArchitecture(f"this vLLM has no model class for {architecture!r}")
    module, name = found
    return (module if "." in module else f"vllm.model_executor.models.{module}"), name


@contextmanager
def startable() -> Iterator[None]:
    """While inside, an engine can be started in a process that has loaded Numba, as one that steered before has.

    On the CPU vLLM 0.32 looks at `vars()` of every value of every module (`triton_utils.dispatcher._rebind_kernels`),
    and a value of this module of Numba's compiler answers that with a function. It is hidden meanwhile: those who use
    it hold it already.
    """
    name = "llvmlite.binding.ffi"
    hidden = sys.modules.pop(name, None)
    try:
        yield
    finally:
        if hidden is not None:
            sys.modules[name] = hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class _Refusal:
    """One engine option that steering is not proved to work with."""

    option: str
    given: object
    advice: str


def check_configuration(config: VllmConfig, options: SteeringOptions) -> None:
    """Refuse every option of this engine that steering is not proved to work with (design rule 7).

    Args:
        config: of the engine.
        options: what it is to serve; some of it goes with fewer options than the rest.

    Raises:
        UnsupportedConfiguration: names each option, the value given and what to do.
    """
    refusals = [refusal for refusal in _refusals(config, options) if refusal.given]
    if refusals:
        facts = "; ".join(f"{refusal.option}={refusal.given}: {refusal.advice}" for refusal in refusals)
        raise UnsupportedConfiguration(f"steering does not work with these engine options: {facts}")


def _refusals(config: VllmConfig, options: SteeringOptions) -> list[_Refusal]:
    parallel, model, cache = config.parallel_config, config.model_config, config.cache_config

    def above_one(name: str) -> int:
        value = getattr(parallel, name, 1)
        return value if isinstance(value, int) and value > 1 else 0

    index = getattr(parallel, "data_parallel_index", 0)
    is_later_rank = f"more than 1 (this is rank {index})" if isinstance(index, int) and index > 0 else ""
    return [
        _Refusal(
            option="enable_sp",
            given=getattr(getattr(config.compilation_config, "pass_config", None), "enable_sp", False),
            advice="sequence parallelism splits the residual stream over ranks; switch it off",
        ),
        _Refusal(
            option="pipeline_parallel_size", given=above_one("pipeline_parallel_size"), advice="not proved yet; use 1"
        ),
        _Refusal(
            option="decode_context_parallel_size",
            given=above_one("decode_context_parallel_size"),
            advice="not proved yet; use 1",
        ),
        _Refusal(
            option="prefill_context_parallel_size",
            given=above_one("prefill_context_parallel_size"),
            advice="tokens are permuted over ranks; use 1",
        ),
        _Refusal(
            option="enable_expert_parallel",
            given=getattr(parallel, "enable_expert_parallel", False),
            advice="not proved yet; tensor parallelism splits each expert instead",
        ),
        _Refusal(
            option="data_parallel_size",
            # A rank of a dense model is told that it is alone, and keeps only its index (vLLM 0.32
            # `ParallelConfig.reconfigure_for_independent_dp_rank`).
            given=above_one("data_parallel_size") or is_later_rank,
            advice="start one server per GPU",
        ),
        _Refusal(
            option="api_server_count",
            given=above_one("_api_process_count"),
            advice="not proved yet; use 1",
        ),
        _Refusal(
            option="distributed_executor_backend",
            # It calls the runner past the worker (vLLM 0.32 `ray_utils.RayWorkerWrapper.execute_model_ray`); another
            # one, which does not, is not told by this name.
            given="ray" if getattr(parallel, "distributed_executor_backend", None) == "ray" else "",
            advice="it goes past the worker that steers; use mp",
        ),
        _Refusal(
            option="enable_batch_sharded_sampling",
            given=getattr(parallel, "enable_batch_sharded_sampling", None),
            advice="it goes past what tells of a step; switch it off",
        ),
        _Refusal(
            option="enable_dbo", given=getattr(parallel, "enable_dbo", False), advice="micro-batches split the row map"
        ),
        _Refusal(
            option="speculative_config",
            given=config.speculative_config is not None and _unproved_speculation(config, options),
            advice="only method 'ngram' on model runner V1 is proved; start without it",
        ),
        _Refusal(
            option="enable_lora", given=config.lora_config is not None, advice="a bundle is bound to base weights"
        ),
        _Refusal(
            option="kv_transfer_config",
            given=config.kv_transfer_config is not None,
            advice="edited KV must not leave this engine",
        ),
        _Refusal(
            option="enable_prompt_embeds", given=model.enable_prompt_embeds, advice="tensors from clients are refused"
        ),
        _Refusal(option="enable_sleep_mode", given=model.enable_sleep_mode, advice="the bank would be discarded"),
        _Refusal(
            option="runner",
            given=model.runner_type if model.runner_type != "generate" else "",
            advice="generation only",
        ),
        _Refusal(
            option="kv_sharing_fast_prefill",
            given=cache.kv_sharing_fast_prefill,
            advice="prompt positions are skipped in the upper layers",
        ),
    ]


def _unproved_speculation(config: VllmConfig, options: SteeringOptions) -> str:
    """The method, and what it does not go with; empty where nothing stands against it.

    Whatever is edited goes by position, which rejected drafts do not change. What looks at tokens themselves would take
    a draft for what the model said.
    """
    assert config.speculative_config is not None
    method = str(config.speculative_config.method)
    if method != "ngram":
        return method
    for what, is_there in (
        ("model runner V2", bool(getattr(config, "use_v2_model_runner", False))),
        ("a bundle's response probe", any(bundle.manifest.response is not None for bundle in options.bundles)),
        ("a profile that spares reasoning", any(bundle.manifest.is_sparing for bundle in options.bundles)),
        ("capture", options.capture is not None),
    ):
        if is_there:
            return f"{method} with {what}"
    return ""
