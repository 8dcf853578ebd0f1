"""Model Runner V2 (GPU default): feeds the row map through the model's own state class.

`get_model_state_cls` is vLLM's sanctioned hook: the runner calls `add_request`, `remove_request` (also for preempted
requests, which come back as new ones) and `prepare_inputs` of the state it returns (vLLM 0.32 `v1/worker/gpu`).
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np


class SteeredState:
    """Mixed into the state class vLLM would have chosen for the model."""

    model: Any

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """A request starts, or comes back after a preemption."""
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        # Not the length of `prefill_token_ids`, which counts tokens generated before a preemption.
        self.model.steering.start(new_req_data, len(new_req_data.prompt_token_ids))

    def remove_request(self, req_id: str) -> None:
        """A request ended or was preempted: the runner does not say which, and `SteeringWorker` forgets the former."""
        super().remove_request(req_id)  # type: ignore[misc]
        self.model.steering.rows.preempt(req_id)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Write the row map of the step; dummy batches have unknown request ids and so get row 0 throughout."""
        count = input_batch.num_reqs
        self.model.steering.before_forward(
            input_batch.req_ids[:count],
            np.asarray(input_batch.num_scheduled_tokens[:count], dtype=np.int32),
            np.asarray(input_batch.num_computed_tokens_np[:count], dtype=np.int32),
        )
        result: dict[str, Any] = super().prepare_inputs(input_batch, req_states)  # type: ignore[misc]
        return result


def state_class(model: Any) -> type[Any]:
    """The state class for a steered model; vLLM's own when the model has no steering."""
    parent = super(_first_steered(type(model)), model)
    if hasattr(parent, "get_model_state_cls"):
        own: type[Any] = parent.get_model_state_cls()
    else:
        own = _vllms_choice(model)
    return own if model.steering is None else type(f"Steered{own.__name__}", (SteeredState, own), {})


def _vllms_choice(model: Any) -> type[Any]:
    """The class that vLLM would have chosen, had the model not defined one."""
    from vllm.v1.worker.gpu import model_states

    config = _config(model)
    if hasattr(model_states, "resolve_model_state_cls"):
        # vLLM looks at the model's modules and configuration; the stand-in hides the method that led here.
        stand_in: Any = types.SimpleNamespace(modules=model.modules)
        return model_states.resolve_model_state_cls(config, stand_in)
    # vLLM 0.25 to 0.28 chooses and makes it in one function; a text decoder has one of these two.
    if config.model_config.is_hybrid or config.model_config.is_attention_free:
        from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

        return MambaHybridModelState
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    return DefaultModelState


def _first_steered(model_class: type[Any]) -> type[Any]:
    from steering.engine.model import SteeredModel

    assert issubclass(model_class, SteeredModel)
    return SteeredModel


def _config(model: Any) -> Any:
    own = getattr(model, "vllm_config", None)
    if own is not None:
        return own
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config()
