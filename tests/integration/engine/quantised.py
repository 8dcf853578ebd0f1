"""A model with weights and activations of eight bits (compressed-tensors W8A8), and what the oracle needs for it.

Its layers round their inputs for themselves, one scale a token, so the oracle's have to as well.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MOST, MOST_OF_WEIGHTS = 127, 63
"""Largest whole numbers. Half as much for weights: where the CPU has AVX2 and no more, oneDNN adds two products of
eight bits in sixteen, and vLLM 0.32's matrix product of larger weights is wrong by a quarter there."""


def make_quantised_model(source: Path, folder: Path) -> tuple[Path, Path]:
    """Round the linear layers of a model's decoder blocks to eight bits, one scale for each output.

    Returns:
        Folders of the quantised model, and of a plain one that has the rounded weights.
    """
    small_folder, plain_folder = folder / "quantised", folder / "plain"
    for target in (small_folder, plain_folder):
        shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    small, plain = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if _is_rounded(name.removesuffix(".weight")):
            whole, scale = _rounded(weight, MOST_OF_WEIGHTS)
            plain[name] = whole * scale
            small[name] = whole.to(torch.int8)
            small[f"{name}_scale"] = scale
    save_file(small, small_folder / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, plain_folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((small_folder / "config.json").read_text())
    integers = {"num_bits": 8, "type": "int", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": {**integers, "strategy": "channel", "dynamic": False},
        "input_activations": {**integers, "strategy": "token", "dynamic": True},
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
    }
    (small_folder / "config.json").write_text(json.dumps(config))
    return small_folder, plain_folder


def round_inputs(model: nn.Module) -> None:
    """Have the same layers of a transformers model round what they are given, as vLLM's do."""

    def rounding(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        whole, scale = _rounded(inputs[0], MOST)
        return (whole * scale, *inputs[1:])

    for name, layer in model.named_modules():
        if _is_rounded(name):
            layer.register_forward_pre_hook(rounding)


def _is_rounded(name: str) -> bool:
    return name.endswith("_proj")


def _rounded(values: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Whole numbers from -most to most and the scale of each row."""
    scale = values.abs().amax(-1, keepdim=True) / most
    return (values / scale).round(), scale
