"""Residuals of generated tokens on disk: shards of some answers each, read one layer at a time.

Twelve layers of a thousand answers to an 8B model are gigabytes. Knows nothing of what the residuals are for.

Shapes: `N` answers, `G` generated tokens kept of each, `D` width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from steering.fit.activations import LoadedModel, generated_residuals
from steering.fit.passes import Sequences
from steering.fit.shards import SHARD_BYTES
from steering.terms import Edit


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedShards:
    """What `write_generated` left.

    Attributes:
        files: in the order they were written.
        mask: [N, G] bool, tokens that there are.
    """

    files: tuple[Path, ...]
    mask: Tensor

    def layer(self, layer: int) -> Tensor:
        """Residuals [N, G, D] at one block, in the model's dtype, zeros where there is no token."""
        result: Tensor | None = None
        for path in self.files:
            with safe_open(path, framework="pt") as shard:
                part = shard.get_tensor(f"layer.{layer}")
                if result is None:
                    result = torch.zeros(*self.mask.shape, part.shape[-1], dtype=part.dtype)
                result[shard.get_tensor("index")] = part
        assert result is not None, "no answers were written"
        return result


def write_generated(
    loaded: LoadedModel,
    prompts: Sequences,
    answers: Sequences,
    folder: Path,
    *,
    layers: Sequence[int],
    most: int,
    edits: Sequence[Edit | None],
    shard_bytes: int = SHARD_BYTES,
) -> GeneratedShards:
    """`generated_residuals` of any number of answers, into `folder`; arguments are its own."""
    row = len(layers) * most * loaded.width * loaded.model.dtype.itemsize
    size = max(1, shard_bytes // row)
    # Prompts of one length lie together, so that few passes are small.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    mask = torch.zeros(len(prompts), most, dtype=torch.bool)
    files: list[Path] = []
    for start in range(0, len(order), size):
        part = order[start : start + size]
        residuals, mask[part] = generated_residuals(
            loaded,
            [prompts[index] for index in part],
            [answers[index] for index in part],
            layers=layers,
            most=most,
            edits=[edits[index] for index in part],
        )
        path = folder / f"generated-{len(files):05d}.safetensors"
        tensors = {f"layer.{layer}": found for layer, found in residuals.items()}
        save_file(tensors | {"index": torch.tensor(part)}, path)
        files.append(path)
    return GeneratedShards(files=tuple(files), mask=mask)
