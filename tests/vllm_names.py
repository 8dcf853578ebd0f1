"""Whether an unpacked vLLM has the names that the plugin uses, by reading its source, where it cannot be run.

`python -m tests.vllm_names FOLDER...`, each the folder that holds `vllm/`. A name that is there may mean something
else: what was only read has not been proved.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ENGINE = Path(__file__).parents[1] / "steering" / "engine"

USED: dict[str, dict[str, str]] = {
    "vllm.v1.worker.gpu_model_runner": {
        "GPUModelRunner": "_update_states _prepare_inputs input_batch requests device model",
    },
    "vllm.v1.worker.gpu_input_batch": {
        "InputBatch": "req_ids num_reqs num_computed_tokens_cpu generators req_id_to_index",
    },
    "vllm.v1.worker.gpu_worker": {"Worker": "init_device load_model execute_model sample_tokens shutdown model_runner"},
    "vllm.v1.worker.gpu.model_runner": {"GPUModelRunner": "model_state add_request remove_request prepare_inputs"},
    "vllm.v1.worker.gpu.input_batch": {"InputBatch": "req_ids num_reqs num_scheduled_tokens num_computed_tokens_np"},
    "vllm.v1.worker.gpu.model_states.interface": {"ModelState": "add_request remove_request prepare_inputs"},
    "vllm.v1.core.sched.scheduler": {"Scheduler": "add_request has_finished_requests update_from_output"},
    "vllm.v1.core.sched.output": {
        "SchedulerOutput": "finished_req_ids preempted_req_ids scheduled_new_reqs scheduled_cached_reqs",
        "CachedRequestData": "req_ids resumed_req_ids num_computed_tokens all_token_ids",
        "NewRequestData": "req_id prompt_token_ids prefill_token_ids sampling_params num_computed_tokens",
    },
    "vllm.v1.request": {
        "Request": "_block_hasher block_hashes update_block_hashes skip_reading_prefix_cache resumable client_index",
    },
    "vllm.v1.engine": {
        "EngineCoreOutput": "request_id new_token_ids finish_reason kv_transfer_params",
        "EngineCoreOutputs": "outputs",
        "FinishReason": "ERROR",
    },
    "vllm.v1.engine.output_processor": {"OutputProcessor": "process_outputs"},
    "vllm.v1.engine.async_llm": {"AsyncLLM": "output_processor"},
    "vllm.v1.engine.llm_engine": {"LLMEngine": "output_processor"},
    "vllm.config.vllm": {"VllmConfig": "additional_config compute_hash use_v2_model_runner"},
    "vllm.config.parallel": {"ParallelConfig": "worker_cls"},
    "vllm.config.scheduler": {"SchedulerConfig": "scheduler_cls get_scheduler_cls async_scheduling"},
}
"""Module, class, and what is read, called or overridden of it, in the class or in what it inherits there."""


class Missing(NamedTuple):
    """A name that is not there."""

    module: str
    name: str


def imported() -> Iterator[Missing]:
    """Names that the plugin imports from vLLM, as its source has them."""
    for path in sorted(ENGINE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                yield from (Missing(node.module or "", alias.name) for alias in node.names)


def missing(folder: Path) -> list[Missing]:
    """What an unpacked vLLM lacks.

    Args:
        folder: holds `vllm/`.
    """
    found = [
        each
        for each in dict.fromkeys(imported())
        if not (_has(_source(folder, each.module), each.name) or _source(folder, f"{each.module}.{each.name}"))
    ]
    for module, classes in USED.items():
        source = _source(folder, module)
        for name, members in classes.items():
            if name not in {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}:
                found.append(Missing(module, name))
            # A base class of the same module counts as the class.
            found += [Missing(module, f"{name}.{each}") for each in members.split() if not _has(source, each)]
    return found


def _source(folder: Path, module: str) -> str:
    path = folder.joinpath(*module.split("."))
    if path.with_suffix(".py").exists():
        return path.with_suffix(".py").read_text()
    if not (path / "__init__.py").exists():
        return ""
    text = (path / "__init__.py").read_text()
    # Packages that pass on all of a module's names hold them, too.
    passed_on = [path / f"{name}.py" for name in re.findall(r"^from \.(\w+) import \*", text, re.MULTILINE)]
    return "\n".join([text, *(each.read_text() for each in passed_on)])


def _has(source: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", source) is not None


if __name__ == "__main__":
    for given in map(Path, sys.argv[1:]):
        lacking = [f"{each.module}: {each.name}" for each in missing(given)]
        sys.stdout.write(f"{given.name}: {', '.join(lacking) or 'nothing is missing'}\n")
