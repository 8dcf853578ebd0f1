"""Shapes: configurations of models whose weights are drawn, so that nothing need be fetched to time them.

Time per token depends on a model's shape and not on its numbers. Knows nothing of torch or vLLM.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any


class Shape(StrEnum):
    """Models by the dimensions their makers publish, one small enough for any machine, and the demo with its own."""

    DEMO = "demo"
    TINY = "tiny"
    LLAMA3_8B = "llama3-8b"
    QWEN3_4B = "qwen3-4b"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What is measured where nothing else is asked: requests of a round, tokens of their prompts and of answers."""

    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    tokens: int


_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
    "dtype": "bfloat16",
    "use_cache": True,
}

CONFIGS: dict[Shape, dict[str, Any]] = {
    Shape.TINY: {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    },
    # Meta-Llama-3-8B, config.json: 8 030 261 248 parameters.
    Shape.LLAMA3_8B: {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    # Qwen3-4B, config.json: 4 022 468 096 parameters.
    Shape.QWEN3_4B: {
        **_COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
}

GRIDS: dict[Shape, Grid] = {
    Shape.DEMO: Grid(batches=(1, 32, 256), prompts=(128,), tokens=32),
    Shape.TINY: Grid(batches=(1, 32, 256), prompts=(128, 2048), tokens=16),
    Shape.LLAMA3_8B: Grid(batches=(1, 8, 32, 256), prompts=(128, 2048), tokens=128),
    Shape.QWEN3_4B: Grid(batches=(1, 8, 32, 256), prompts=(128, 2048), tokens=128),
}
"""The demo's context of 1024 tokens has no room for a prompt of 2048."""


def make(shape: Shape, folder: Path) -> Path:
    """Write the configuration of a shape into `folder`, which vLLM serves with `load_format="dummy"`; its path.

    Raises:
        KeyError: the demo, which has weights of its own and is not made.
    """
    config = CONFIGS[shape]
    path = folder / shape.value
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return path
