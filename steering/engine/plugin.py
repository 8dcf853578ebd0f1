"""The `vllm.general_plugins` entry point: puts steered classes in place of vLLM's own.

vLLM calls `register` in every process, possibly twice. Classes are named, not imported, so no CUDA context is made.
"""

from __future__ import annotations

from steering.engine.compat import ARCHITECTURES
from steering.engine.options import engine_arguments

__all__ = ["engine_arguments", "register"]


def register() -> None:
    """Register a steered class for every architecture this vLLM knows; without bundles it behaves as vLLM's own."""
    from vllm import ModelRegistry

    known = set(ModelRegistry.get_supported_archs())
    for architecture in ARCHITECTURES:
        if architecture in known:
            ModelRegistry.register_model(architecture, f"steering.engine.model:Steered{architecture}")
