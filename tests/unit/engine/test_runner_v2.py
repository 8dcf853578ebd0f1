"""The state class of Model Runner V2: vLLM's own choice with steering on top, whichever way a version chooses it."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from steering.engine.model import SteeredModel
from steering.engine.runner_v2 import SteeredState, state_class


class Default:
    """VLLM's state of most models."""


class Hybrid:
    """VLLM's state of models with Mamba or linear attention."""


class Model(SteeredModel):
    """A steered model, as far as the choice looks at it."""

    def __init__(self, *, is_hybrid: bool, steering: Any) -> None:
        nn.Module.__init__(self)
        self.steering = steering
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(is_hybrid=is_hybrid, is_attention_free=False))


def resolve(config: Any, model: Any) -> type[Any]:
    """As vLLM 0.32 has it: a model that defines a class of its own is asked first."""
    assert not hasattr(model, "get_model_state_cls")
    assert list(model.modules())
    return Hybrid if config.model_config.is_hybrid else Default


@pytest.mark.parametrize("resolver", [resolve, None], ids=["0.32", "0.25 to 0.28"])
@pytest.mark.parametrize("is_hybrid", [False, True])
def test_steering_goes_on_top_of_vllms_choice(
    resolver: Callable[..., type[Any]] | None, is_hybrid: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without the function that newer versions have; without bundles it is vLLM's class itself."""
    path = "vllm.v1.worker.gpu.model_states"
    parts = path.split(".")
    names = [".".join(parts[: length + 1]) for length in range(len(parts))]
    modules = {name: types.ModuleType(name) for name in [*names, f"{path}.default", f"{path}.mamba_hybrid"]}
    vars(modules[f"{path}.default"])["DefaultModelState"] = Default
    vars(modules[f"{path}.mamba_hybrid"])["MambaHybridModelState"] = Hybrid
    vars(modules["vllm.v1.worker.gpu"])["model_states"] = modules[path]
    if resolver is not None:
        vars(modules[path])["resolve_model_state_cls"] = resolver
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    own = Hybrid if is_hybrid else Default
    assert state_class(Model(is_hybrid=is_hybrid, steering=None)) is own
    steered = state_class(Model(is_hybrid=is_hybrid, steering=object()))
    assert steered.__mro__[1:3] == (SteeredState, own)
