"""An engine taken step by step, so that requests can be aborted in a phase that is known."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any


def step_through(
    engine: Any, prompts: Sequence[Any], parameters: Sequence[Any], abort_at: Sequence[int | None]
) -> tuple[list[Any], dict[int, str]]:
    """Add every request at once and abort each after its number of steps.

    Args:
        engine: `vllm.LLM` whose engine core runs in this process.
        prompts, parameters, abort_at: by request; None is left to finish.

    Returns:
        What vLLM gave last of each request, in order, and by number what an aborted one was at: `waiting`, `prefill`
        or `decode`.
    """
    core = engine.llm_engine
    outputs: dict[str, Any] = {}
    phases: dict[int, str] = {}
    for number, (prompt, each) in enumerate(zip(prompts, parameters, strict=True)):
        core.add_request(f"stepped-{number}", prompt, each)
    steps = 0
    while core.has_unfinished_requests():
        for number, step in enumerate(abort_at):
            if step == steps:
                phases[number] = _phase(core, f"stepped-{number}")
                core.abort_request([f"stepped-{number}"])
        for output in core.step():
            outputs[output.request_id] = output
        steps += 1
    nothing = SimpleNamespace(outputs=[], num_cached_tokens=0, prompt_logprobs=None)
    return [outputs.get(f"stepped-{number}", nothing) for number in range(len(prompts))], phases


def _phase(core: Any, name: str) -> str:
    scheduler = core.engine_core.engine_core.scheduler
    (request,) = (each for each in scheduler.requests.values() if each.request_id.startswith(f"{name}-"))
    if request.num_computed_tokens == 0:
        return "waiting"
    return "prefill" if request.num_computed_tokens < request.num_prompt_tokens else "decode"
