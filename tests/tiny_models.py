"""Tiny random models of the supported families, made on the spot, for the real engine and for transformers alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WIDTH, LAYERS, VOCABULARY = 64, 4, 256

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    # Wide enough for answers that vary: a model that repeats one token would pass any test of tokens.
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}

# Transformers' configuration class and what differs from `_COMMON`.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3_moe": ("Qwen3MoeConfig", _EXPERTS),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **_EXPERTS,
            # vLLM's gated delta net computes in bfloat16 only on the CPU: with fewer experts than all, rounding would
            # flip routes, and with larger weights it would grow too large to compare with float32.
            "num_experts_per_tok": 4,
            "initializer_range": 0.06,
            "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        },
    ),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 32, "sliding_window": 512, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", {"query_pre_attn_scalar": 32, "sliding_window": 512, "tie_word_embeddings": True}),
    "phi3": ("Phi3Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128}),
}


def make_tiny_model(family: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a random model of `family` into `folder / family`, in float32; returns that path."""
    import transformers

    name, overrides = FAMILIES[family]
    config = getattr(transformers, name)(**{**_COMMON, **overrides})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" in parameter_name:
                # Norm weights away from 1, so that a norm read at the wrong place shows.
                parameter.add_(0.1 * torch.randn_like(parameter))
    path = folder / family
    model.save_pretrained(path)
    return path
