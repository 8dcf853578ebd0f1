"""Residuals of many prompts on disk: safetensors shards, written as they are made and read one layer at a time.

A shard holds whole prompts of similar length, every layer of them. A run that was interrupted goes on after its last
shard. Knows nothing of data sets or of what the residuals are for.

Shapes: `N` prompts, `L` layers, `D` width of the residual stream.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steering.fit.activations import LoadedModel, last_residuals_and_tokens
from steering.fit.passes import Sequences

SHARD_BYTES = 96 * 1024 * 1024
"""Most bytes of residuals in one shard; making one takes about twice that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """Residuals at the last token of `count` prompts, on disk.

    Attributes:
        files: in the order they were written.
        count: prompts, N.
        layers: decoder blocks, L.
        width: of the residual stream, D.
    """

    files: tuple[Path, ...]
    count: int
    layers: int
    width: int

    def layer(self, layer: int) -> Tensor:
        """Residuals [N, D] float32 at the output of one block, in the order of the prompts."""
        result = torch.empty(self.count, self.width)
        for path in self.files:
            with safe_open(path, framework="pt") as shard:
                result[shard.get_tensor("index")] = shard.get_tensor(f"layer.{layer}").to(torch.float32)
        return result

    def first_tokens(self) -> Tensor:
        """The greedy first answer token of each prompt, [N] int64."""
        result = torch.empty(self.count, dtype=torch.int64)
        for path in self.files:
            with safe_open(path, framework="pt") as shard:
                result[shard.get_tensor("index")] = shard.get_tensor("first_token")
        return result

    def batches(self, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each shard the indices [n] of its prompts and their residuals [n, D] float32 at one block."""
        for path in self.files:
            with safe_open(path, framework="pt") as shard:
                yield shard.get_tensor("index"), shard.get_tensor(f"layer.{layer}").to(torch.float32)


def write_shards(
    loaded: LoadedModel,
    sequences: Sequences,
    folder: Path,
    name: str,
    *,
    batch: int,
    shard_bytes: int = SHARD_BYTES,
    identity: str = "",
    say: Callable[[str], None] = lambda _line: None,
) -> Shards:
    """Run the model over every prompt and leave its residuals in `folder`, in the model's own dtype.

    Args:
        name: beginning of the files' names.
        batch: prompts of one length that are run together at most.
        identity: what the residuals depend on beside the prompts; shards of another identity are made again.
        say: is told of each shard.
    """
    layers, width = len(loaded.blocks), loaded.width
    row = layers * width * torch.empty(0, dtype=loaded.model.dtype).element_size()
    size = max(1, min(shard_bytes // row, 4096))
    # Prompts of one length lie together, so that few batches are small.
    order = sorted(range(len(sequences)), key=lambda index: (len(sequences[index]), index))
    digest = hashlib.sha256(identity.encode())
    for index in order:
        digest.update(json.dumps(list(sequences[index])).encode())
    wanted = digest.hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    files = []
    for number, part in enumerate(parts):
        path = folder / f"{name}-{number:05d}.safetensors"
        files.append(path)
        if _is_made(path, wanted, len(part)):
            continue
        residuals, tokens = last_residuals_and_tokens(loaded, [sequences[index] for index in part], most=batch)
        tensors = {f"layer.{layer}": residuals[layer] for layer in range(layers)}
        tensors |= {"index": torch.tensor(part), "first_token": tokens}
        fresh = path.with_suffix(".part")
        save_file(tensors, fresh, metadata={"identity": wanted})
        fresh.replace(path)
        say(f"  {name}: {min((number + 1) * size, len(order))} of {len(order)} prompts")
    return Shards(files=tuple(files), count=len(sequences), layers=layers, width=width)


def _is_made(path: Path, identity: str, count: int) -> bool:
    try:
        with safe_open(path, framework="pt") as shard:
            found = (shard.metadata() or {}).get("identity") == identity
            return found and shard.get_slice("index").get_shape() == [count]
    except (OSError, SafetensorError):
        return False
