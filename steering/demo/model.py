"""The demo's architecture: a small Llama, and how it is written to a folder that vLLM and transformers load."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LAYERS, WIDTH, INNER, HEADS = 6, 192, 512, 6
LENGTH = 1024


def demo_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """6 blocks of width 192, 6 heads of 32, tied embeddings: 3.4 million parameters with 4096 tokens."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH // HEADS,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )


def write_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights (bf16 safetensors), configs and tokenizer to `folder`, replacing what was there at once."""
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    half = LlamaForCausalLM(model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    half.tie_weights()
    half.config.dtype = torch.bfloat16
    half.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=64,
        do_sample=False,
    )
    half.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    fresh.chmod(0o755)  # a temporary folder is private, a model is not
    for written in fresh.iterdir():
        written.chmod(0o644)
    old = folder.with_name(f".{folder.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
