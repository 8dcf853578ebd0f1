"""Model Runner V1 (CPU default, GPU fallback): feeds the row map from the runner's own batch.

The map is built inside `_prepare_inputs`, after `_update_states` has put the step's requests into the batch: a map
built before `execute_model` belongs to the step before (vLLM 0.32 `v1/worker/gpu_model_runner.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from steering.engine.model import Steering

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class RewindableGenerator(torch.Generator):
    """A CPU generator that vLLM can rewind.

    vLLM 0.32 rewinds the generator of a seeded request whose prompt is prefilled in chunks by its offset, which a CPU
    generator does not have: one such request would end the engine for all. Rewinding does nothing here, so on the CPU
    what a seed gives depends on how the prompt was chunked.
    """

    def get_offset(self) -> int:
        """The offset vLLM subtracts from; of no consequence."""
        return 4

    def set_offset(self, offset: int) -> torch.Generator:  # noqa: ARG002 - the signature is torch's
        """Stay where the stream is."""
        return self


class SteeredRunner:
    """Mixed into the runner's class once it is made."""

    model: Any
    input_batch: Any
    requests: dict[str, Any]
    device: torch.device

    def _steering(self) -> Steering | None:
        return getattr(self.model, "steering", None)

    def _update_states(self, scheduler_output: Any) -> Any:
        result = super()._update_states(scheduler_output)  # type: ignore[misc]
        if self.device.type == "cpu":
            self._make_generators_rewindable(scheduler_output)
        steering = self._steering()
        if steering is not None:
            _follow(steering, scheduler_output)
        return result

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: NDArray[np.int32]) -> Any:
        steering = self._steering()
        if steering is not None:
            batch = self.input_batch
            steering.before_forward(
                batch.req_ids, num_scheduled_tokens, batch.num_computed_tokens_cpu[: batch.num_reqs]
            )
        return super()._prepare_inputs(scheduler_output, num_scheduled_tokens)  # type: ignore[misc]

    def _make_generators_rewindable(self, scheduler_output: Any) -> None:
        for new in scheduler_output.scheduled_new_reqs:
            request = self.requests[new.req_id]
            if request.generator is not None:
                rewindable = RewindableGenerator(device=self.device)
                rewindable.set_state(request.generator.get_state())
                request.generator = rewindable
                self.input_batch.generators[self.input_batch.req_id_to_index[new.req_id]] = rewindable


def _follow(steering: Steering, scheduler_output: Any) -> None:
    """Give and take rows as requests start, end, are preempted and come back."""
    rows = steering.rows
    if steering.live:
        for request_id in scheduler_output.finished_req_ids:
            steering.end(request_id)
        for request_id in scheduler_output.preempted_req_ids or ():
            rows.preempt(request_id)
        cached = scheduler_output.scheduled_cached_reqs
        for request_id in cached.resumed_req_ids:
            # vLLM sends all tokens of what was not in the step before, and preempts and resumes nothing in one.
            computed = cached.num_computed_tokens[cached.req_ids.index(request_id)]
            rows.resume(request_id, cached.all_token_ids[request_id], computed)
    for new in scheduler_output.scheduled_new_reqs:
        steering.start(new, len(new.prompt_token_ids))


def steer(runner: Any) -> None:
    """Mix `SteeredRunner` into one runner's class."""
    runner.__class__ = type(f"Steered{type(runner).__name__}", (SteeredRunner, type(runner)), {})
